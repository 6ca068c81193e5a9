// Life and faults of the transport: the keeper and its lease, the poison word, and the words of every error.
#include "shm/transport.hpp"

#include <sched.h>
#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <fstream>
#include <future>

#include "failpoint.hpp"

namespace tpmp::shm {

namespace {

constexpr int64_t kSpinNs = 50'000;
constexpr int64_t kBusyNs = 1'000'000;
constexpr int64_t kCrowdedSpinNs = 5'000;  // with more ranks than cores, where a peer needs the core
constexpr const char* kRemedy =
    " | do: close this communicator on every rank and make a new one (communicator(group) again)";

std::atomic<uint64_t> fork_count{0};
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { fork_count.fetch_add(1); });

int usable_cores() {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
}

bool lease_lost(const RankControl& control) {
  // The futex word of a glibc mutex; the kernel sets the bit when the owning thread is gone.
  const int word = __atomic_load_n(&control.lease.__data.__lock, __ATOMIC_ACQUIRE);
  return (uint32_t(word) & FUTEX_OWNER_DIED) != 0;
}

char process_state(uint32_t pid) {  // R, S, T (stopped), ...; '?' where it cannot be read
  std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
  std::string text((std::istreambuf_iterator<char>(file)), {});
  const size_t after = text.rfind(')');
  return after == std::string::npos || after + 2 >= text.size() ? '?' : text[after + 2];
}

bool stopped(const RankControl& control) { return process_state(control.pid.load()) == 'T'; }

}  // namespace

// Of the keeper's waits: they end when the transport closes, and turn a lost lease into poison.
class KeeperWatch {
 public:
  explicit KeeperWatch(ShmTransport& transport) : transport_(transport) {}
  void glance() const {}
  bool look(bool) const {
    if (transport_.poisoned()) return false;
    const int peer = transport_.lost_peer();
    if (peer >= 0) transport_.poison(ErrorCode::peer_died, peer, transport_.died_words(peer));
    return false;
  }
  void fail() const {}
  Bell bell() const {
    // With nothing to move, or with a caller that moves it, peers need not wake this thread.
    const bool idle = transport_.pending_.load() == 0 || transport_.inline_waiters_.load() > 0;
    if (idle) return {&transport_.keeper_word_, &transport_.keeper_sleepers_};
    return transport_.doorbell(transport_.rank_);
  }
  int64_t deadline_ns() const {
    const int64_t turn = transport_.keepers_turn_.load(), now = now_ns();
    // What is due and still there is another thread's at this moment, which wakes this one when it leaves any behind.
    return turn <= now ? now + kBusyNs : turn;
  }

 private:
  ShmTransport& transport_;
};

ShmTransport::ShmTransport(std::shared_ptr<Segment> segment, int rank)
    : segment_(std::move(segment)), heap_(std::make_shared<Heap>(segment_, rank)), rank_(rank),
      size_(segment_->world()), fork_generation_(fork_count.load()) {
  if (rank < 0 || rank >= size_) throw transport_error(ErrorCode::system, -1, "rank is outside the segment's world");
  segment_->control(rank).waiting.since_ns.store(kNever);
  spin_ns_ = size_ <= usable_cores() ? kSpinNs : kCrowdedSpinNs;
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);  // inherited by the keeper: signals go to the program's own threads
  std::promise<int> locked;
  std::future<int> lease = locked.get_future();
  keeper_ = std::make_unique<std::thread>([this, &locked] {
    const int rc = pthread_mutex_trylock(&segment_->control(rank_).lease);
    if (rc == 0) segment_->control(rank_).pid.store(uint32_t(getpid()));
    locked.set_value(rc);
    if (rc == 0) keep();
  });
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (lease.get() != 0) {
    keeper_->join();
    throw transport_error(ErrorCode::system, -1, "rank " + std::to_string(rank) + " of this segment is already taken");
  }
}

ShmTransport::~ShmTransport() { close(); }

void ShmTransport::keep() {
  pthread_setname_np(pthread_self(), "tpmp-keeper");
  const auto closing = [this] {
    bool moved = false;
    try {
      moved = progress();
      if (now_ns() >= keepers_turn_.load()) run_posted(true, nullptr, kForever);
    } catch (const std::exception& error) {  // a lack of memory, above all
      abort(error.what());
    }
    // What the peers see, not closed_: a death in between would find the lease given back and nobody told of a leave.
    return closed(rank_) ? Seen::all : moved ? Seen::some : Seen::nothing;
  };
  wait_until(closing, KeeperWatch(*this), kKeeperSpinNs);
  pthread_mutex_unlock(&segment_->control(rank_).lease);
}

void ShmTransport::close() {
  if (closed_.exchange(true)) return;
  TPMP_FAILPOINT("close.before");
  if (forked()) {
    (void)keeper_.release();  // the thread lives in the parent alone: neither to be joined nor destroyed here
    return;
  }
  segment_->control(rank_).closed.store(1, std::memory_order_release);
  ring_others();
  wake_keeper();
  keeper_->join();
}

bool ShmTransport::forked() const { return fork_count.load() != fork_generation_; }

Bell ShmTransport::doorbell(int rank) const {
  RankControl& control = segment_->control(rank);
  return {&control.doorbell, &control.sleepers};
}

void ShmTransport::ring_others() const {
  for (int peer = 0; peer < size_; ++peer)
    if (peer != rank_) ring(doorbell(peer));
}

void ShmTransport::wake_keeper() {
  ring({&keeper_word_, &keeper_sleepers_});
  ring(doorbell(rank_));  // where it sleeps in a collective, or with a transfer to move
}

void ShmTransport::check_usable(const Call& call) const {
  const std::string where = " | in " + words(call);
  if (forked())
    throw transport_error(ErrorCode::closed, -1, "this process was forked from " + identity() +
                          ", and the communicator stayed with the parent" + where +
                          " | do: make a communicator in the process that uses it");
  if (closed_.load()) throw transport_error(ErrorCode::closed, -1, "the communicator is closed" + where + kRemedy);
  if (poisoned()) throw_poison(where + ", refused: the group failed before");
}

void ShmTransport::poison(ErrorCode code, int culprit, const std::string& text) {
  std::atomic<uint64_t>& word = segment_->header().poison;
  if (word.load(std::memory_order_acquire) != 0) return;
  static std::mutex one_writer;  // caller and keeper may find a fault at once
  const std::lock_guard<std::mutex> lock(one_writer);
  if (word.load(std::memory_order_acquire) != 0) return;
  TPMP_FAILPOINT("poison.before");
  std::snprintf(segment_->control(rank_).poison_text, kTextBytes, "%s", text.c_str());
  uint64_t healthy = 0;
  word.compare_exchange_strong(healthy, Poison{code, culprit, rank_}.pack(), std::memory_order_acq_rel);
  ring_others();
  ring(doorbell(rank_));
}

void ShmTransport::throw_poison(const std::string& where) const {
  const Poison poison = Poison::unpack(segment_->header().poison.load(std::memory_order_acquire));
  const char* text = segment_->control(poison.reporter).poison_text;
  std::string message(text, strnlen(text, kTextBytes));
  message += " | " + identity() + where;
  if (poison.culprit >= 0) message += " | culprit rank " + std::to_string(poison.culprit);
  if (poison.reporter != rank_) message += " | reported by rank " + std::to_string(poison.reporter);
  throw transport_error(poison.code, poison.culprit, message + kRemedy);
}

int ShmTransport::lost_peer() const {
  for (int peer = 0; peer < size_; ++peer)
    if (peer != rank_ && lease_lost(segment_->control(peer)) && !closed(peer)) return peer;
  return -1;
}

std::string ShmTransport::died_words(int peer) const {
  return "rank " + std::to_string(peer) + " (pid " + std::to_string(segment_->control(peer).pid.load()) +
         ") died: its process was killed, crashed or exited without closing its communicator";
}

std::string ShmTransport::identity() const {
  return "rank " + std::to_string(rank_) + " pid " + std::to_string(segment_->control(rank_).pid.load());
}

void ShmTransport::abort(const std::string& reason) {
  if (closed_.load() || forked()) return;
  poison(ErrorCode::peer_failed, rank_, "rank " + std::to_string(rank_) + " failed: " + reason);
}

std::shared_ptr<Block> ShmTransport::allocate(size_t bytes) {
  if (forked() || closed_.load())
    throw transport_error(ErrorCode::closed, -1, std::string("comm.empty: the communicator ") +
                          (forked() ? "stayed with the process that this one was forked from" : "is closed"));
  if (poisoned()) throw_poison(" in comm.empty, refused: the group failed before");
  TPMP_FAILPOINT("heap.reserve");
  return std::make_shared<Block>(heap_, bytes);
}

std::vector<int> ShmTransport::stopped_peers() const {
  std::vector<int> peers;
  for (int peer = 0; peer < size_; ++peer)
    if (peer != rank_ && stopped(segment_->control(peer))) peers.push_back(peer);
  return peers;
}

std::vector<std::string> ShmTransport::last_ops() {
  std::vector<std::string> lines;
  for (int rank = 0; rank < size_; ++rank) {
    const RankControl& control = segment_->control(rank);
    lines.push_back(record_words(control, rank) + (stopped(control) ? "; it is stopped (SIGSTOP or a debugger)" : ""));
  }
  return lines;
}

}  // namespace tpmp::shm
