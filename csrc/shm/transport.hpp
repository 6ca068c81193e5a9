// The transport between CPU ranks of one host over one Segment. A caller's thread does the work of its own calls; one
// keeper thread holds the lease, watches the peers' leases and moves posted transfers while the caller computes.
#pragma once

#include <array>
#include <atomic>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "shm/calls.hpp"
#include "shm/segment.hpp"
#include "shm/wait.hpp"
#include "../transport.hpp"

namespace tpmp::shm {

struct Transfer;

class ShmTransport final : public Transport, public std::enable_shared_from_this<ShmTransport> {
 public:
  ShmTransport(std::shared_ptr<Segment> segment, int rank);  // returns once the lease is held
  ~ShmTransport() override;

  void all_reduce(void* data, uint64_t numel, DType, ReduceOp, const std::string& tag, double timeout) override;
  void barrier(const std::string& tag, double timeout) override;
  std::shared_ptr<Work> isend(const void* data, uint64_t numel, DType, int dst, const std::string& tag,
                              bool waits) override;
  std::shared_ptr<Work> irecv(void* data, uint64_t numel, DType, int src, const std::string& tag,
                              bool waits) override;
  void abort(const std::string& reason) override;
  void close() override;
  std::vector<std::string> last_ops() override;

 private:
  friend class CallerWatch;
  friend class KeeperWatch;
  friend class ShmWork;
  struct Collective;  // one collective call under way

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
  std::string identity() const;
  Bell doorbell(int rank) const;
  void ring_others() const;
  void wake_keeper();

  // collectives.cpp
  void run_collective(const Call& call, double timeout, const std::function<void(Collective&)>& body);
  void one_shot(Collective& c, char* data, size_t numel);
  void two_shot(Collective& c, char* data, size_t numel);
  SlotHeader& open_round();
  void publish(Collective& c, SlotHeader& slot, size_t bytes, size_t offset);
  void await_round(Collective& c);
  void check_round(const Collective& c);

  // transfers.cpp
  std::shared_ptr<Work> post(const Call& call, char* data, bool waits);
  void await(const Transfer& transfer, double timeout);
  bool settled(const Transfer& transfer);
  void release_buffers();
  void progress();
  bool push(int dst);
  bool pull(int src);
  bool accept(const Transfer& transfer, const SlotHeader& slot);
  void finish(std::deque<std::shared_ptr<Transfer>>& queue);

  const std::shared_ptr<Segment> segment_;
  const int rank_, size_;
  const uint64_t fork_generation_;
  int64_t spin_ns_;
  std::atomic<bool> closed_{false};

  std::unique_ptr<std::thread> keeper_;
  std::atomic<uint32_t> keeper_word_{0}, keeper_sleepers_{0};  // its own bell, where it has no transfer to move

  std::mutex collective_mutex_;
  uint64_t round_ = 0;         // of slots; equal on all ranks at the same point of the same program
  uint64_t collective_id_ = 0;

  std::mutex progress_mutex_;  // guards all below
  struct Lane {
    std::deque<std::shared_ptr<Transfer>> queue;
    uint64_t piece = 0;        // next piece of this ordered pair
    uint64_t message = 0;      // number of messages begun
  };
  std::array<Lane, kMaxWorld> out_, in_;
  std::atomic<int> pending_{0};          // posted transfers that are not done
  std::atomic<int> inline_waiters_{0};   // threads that move transfers in a wait of their own
};

// The watch of a wait on the caller's thread: throws what ends it.
class CallerWatch {
 public:
  // `awaited(peer)` says whether the wait still depends on that peer.
  CallerWatch(ShmTransport& transport, const Call& call, uint64_t seq, double timeout,
              std::function<bool(int)> awaited);
  void glance() const;
  bool look(bool tick);
  [[noreturn]] void fail();
  Bell bell() const { return transport_.doorbell(transport_.rank_); }
  int64_t deadline_ns() const { return deadline_; }

 private:
  std::string where() const;
  std::string late_words();
  enum class Fault { none, died, left, late };
  ShmTransport& transport_;
  const Call& call_;
  const uint64_t seq_;
  const double timeout_;
  const std::function<bool(int)> awaited_;
  const int64_t start_, deadline_;
  Fault fault_ = Fault::none;
  int culprit_ = -1;
};

// A wait on the caller's thread; whatever else than a transport_error leaves it (Ctrl-C) poisons the group first.
template <class Pred>
void caller_wait(ShmTransport& transport, CallerWatch& watch, int64_t spin_ns, Pred&& pred) {
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
