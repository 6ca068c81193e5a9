// The transport between CPU ranks of one host over one Segment. A caller's thread does the work of its own calls; one
// keeper thread holds the lease, watches the peers' leases and moves posted calls while the caller computes.
#pragma once

#include <array>
#include <atomic>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "shm/calls.hpp"
#include "shm/heap.hpp"
#include "shm/segment.hpp"
#include "shm/wait.hpp"
#include "../transport.hpp"

namespace tpmp::shm {

constexpr int64_t kKeeperSpinNs = 20'000;  // a little more than a piece takes; the core is the caller's

constexpr double kForever = 1e9;  // seconds

struct Posted;
struct Transfer;

class ShmTransport final : public Transport, public std::enable_shared_from_this<ShmTransport> {
 public:
  ShmTransport(std::shared_ptr<Segment> segment, int rank);  // returns once the lease is held
  ~ShmTransport() override;

  void run(const Collective&, double timeout) override;
  std::shared_ptr<Work> post(Collective, double timeout) override;
  std::shared_ptr<Work> isend(const Message&, bool waits) override;
  std::shared_ptr<Work> irecv(const Message&, bool waits) override;
  void abort(const std::string& reason) override;
  void close() override;
  std::vector<std::string> last_ops() override;
  std::shared_ptr<Block> allocate(size_t bytes);  // memory that calls lend to the peers instead of copying it in

 private:
  friend class CallerWatch;
  friend class KeeperWatch;
  friend class PostedWork;
  friend class Rounds;
  friend class ShmWork;

  // transport.cpp: life, faults
  void keep();
  bool forked() const;
  bool poisoned() const { return segment_->header().poison.load(std::memory_order_acquire) != 0; }
  void check_usable(const Call& call) const;
  void poison(ErrorCode code, int culprit, const std::string& text);
  [[noreturn]] void throw_poison(const std::string& where) const;
  int lost_peer() const;  // a peer whose lease ended without `closed`, or -1
  bool closed(int peer) const { return segment_->control(peer).closed.load(std::memory_order_acquire) != 0; }
  std::string died_words(int peer) const;
  std::vector<int> stopped_peers() const;
  std::string identity() const;
  Bell doorbell(int rank) const;
  void ring_others() const;
  void wake_keeper();

  // queue.cpp
  std::shared_ptr<Posted> enqueue(Collective, double timeout);
  void execute(const Collective&, const Call& said, uint64_t seq, double timeout, bool on_keeper);
  void run_posted(bool on_keeper, const Posted* until, double most_seconds);
  void await_posted(const std::shared_ptr<Posted>& posted, double timeout);
  bool awaits(int peer) const;  // whether the collective under way waits for that peer

  // deadlock.cpp
  std::string deadlock_words() const;  // empty where this rank is in none
  void note_caller();
  bool only_caller() const;  // whether this thread makes all the calls: what it sleeps in, the rank sleeps in

  // transfers.cpp
  std::shared_ptr<Work> post(const Call& call, char* data, bool waits);
  void await(const Transfer& transfer, double timeout);
  bool settled(const Transfer& transfer);
  void release_buffers();
  bool progress();  // true where something moved
  size_t piece_bytes(size_t message_bytes) const;
  bool push(int dst);
  bool pull(int src);
  bool accept(const Transfer& transfer, const SlotHeader& slot);
  void finish(std::deque<std::shared_ptr<Transfer>>& queue);
  bool in_one_piece(const Transfer& transfer) const;  // long, and in this rank's heap
  bool outlasts_ring(const Transfer& transfer) const;
  void offer(const Transfer& recv);
  char* landing_of(const Transfer& send);

  const std::shared_ptr<Segment> segment_;
  const std::shared_ptr<Heap> heap_;
  const int rank_, size_;
  const uint64_t fork_generation_;
  int64_t spin_ns_;
  std::atomic<bool> closed_{false};
  std::atomic<pthread_t> caller_{};    // the first thread that called
  std::atomic<bool> more_callers_{false};

  std::unique_ptr<std::thread> keeper_;
  std::atomic<uint32_t> keeper_word_{0}, keeper_sleepers_{0};  // its own bell, where it has no transfer to move

  std::mutex turn_;            // held by whoever carries out a collective; guards the two below
  uint64_t round_ = 0;         // last one of slots; equal on all ranks at the same point of the same program
  uint64_t collective_id_ = 0;
  std::atomic<uint64_t> awaiting_{0};  // the round that the collective under way waits for
  std::mutex queue_mutex_;             // guards the queue
  std::deque<std::shared_ptr<Posted>> queue_;
  std::atomic<int> posted_{0};         // its length
  std::atomic<int64_t> keepers_turn_{kNever};  // when the keeper may take the first of it

  std::mutex progress_mutex_;  // guards all below
  struct Lane {
    std::deque<std::shared_ptr<Transfer>> queue;
    std::deque<std::shared_ptr<Transfer>> lent;  // sends that the receiver has yet to take out of this rank's heap
    uint64_t piece = 0;        // next piece of this ordered pair
  };
  std::array<Lane, kMaxWorld> out_, in_;
  std::atomic<int> pending_{0};          // posted transfers that are not done
  std::atomic<int> inline_waiters_{0};   // threads that move transfers in a wait of their own
};

// Says in a rank's control block, as long as it lives, what its caller sleeps for.
class Asleep {
 public:
  Asleep(RankControl& control, const Call& call, uint64_t seq, uint64_t number);
  ~Asleep();
  Asleep(const Asleep&) = delete;

 private:
  Waiting& waiting_;
  bool told_ = false;
};

// The watch of a call's waits: throws what ends it.
class CallerWatch {
 public:
  // `number`: of the collective, or of the message in its pair. `awaited(peer)` says whether the wait still depends on
  // that peer. `own_thread`: it is the caller's.
  CallerWatch(ShmTransport& transport, const Call& call, uint64_t seq, uint64_t number, double timeout,
              std::function<bool(int)> awaited, bool own_thread = true);
  void glance() const;
  bool look(bool tick);
  [[noreturn]] void fail();
  [[noreturn]] void fail_poisoned() const;
  Bell bell() const { return transport_.doorbell(transport_.rank_); }
  int64_t deadline_ns() const { return deadline_; }

 private:
  std::string where() const;
  std::string late_words();
  enum class Fault { none, died, left, stuck, late };
  ShmTransport& transport_;
  const Call& call_;
  const uint64_t seq_, number_;
  const double timeout_;
  const std::function<bool(int)> awaited_;
  const bool own_thread_;
  const int64_t start_, deadline_;
  std::optional<Asleep> asleep_;
  std::string stuck_;
  Fault fault_ = Fault::none;
  int culprit_ = -1;
};

// A wait in a call; whatever else than a transport_error leaves it (Ctrl-C) poisons the group first.
template <class Pred>
void watched_wait(ShmTransport& transport, CallerWatch& watch, int64_t spin_ns, Pred&& pred) {
  try {
    wait_until(pred, watch, spin_ns);
  } catch (const transport_error&) {
    throw;
  } catch (...) {
    transport.abort("a signal interrupted its wait");
    throw;
  }
}

}  // namespace tpmp::shm
