// Ranks that wait for each other. Whoever sleeps in a call says so; once all of a cycle have slept for a while and none
// of them has meanwhile called what its neighbour waits for, none ever will: the one thread that calls sleeps. (Another
// may wait for what that one posted. A rank whose calls come from several threads never counts as asleep.) A collective
// on one rank against a transfer on another is found so, and two receives that face each other.
#include "shm/transport.hpp"

namespace tpmp::shm {

namespace {

constexpr int64_t kPatienceNs = 250'000'000;

struct Sleeper {
  int rank;
  uint64_t version, seq, number;
  Kind kind;
  int peer;
};

// What `rank` has slept for since before `latest`; false where it does not.
bool asleep(const Segment& segment, int rank, int64_t latest, Sleeper& sleeper) {
  const Waiting& waiting = segment.control(rank).waiting;
  sleeper.rank = rank;
  sleeper.version = waiting.version.load(std::memory_order_acquire);
  if (sleeper.version % 2 == 0 || waiting.since_ns.load(std::memory_order_acquire) > latest) return false;
  sleeper.seq = waiting.seq.load(std::memory_order_acquire);
  sleeper.number = waiting.number.load(std::memory_order_acquire);
  const uint64_t what = waiting.what.load(std::memory_order_acquire);
  sleeper.kind = Kind(what & 0xff);
  sleeper.peer = int(what >> 32);
  return waiting.version.load(std::memory_order_acquire) == sleeper.version;
}

// Whether `peer` has not yet called what `sleeper` waits for.
bool waits_for(const Segment& segment, const Sleeper& sleeper, int peer) {
  if (peer == sleeper.rank) return false;
  const auto behind = [&](const std::atomic<uint64_t>& called) {
    return called.load(std::memory_order_acquire) < sleeper.number;
  };
  if (sleeper.kind == Kind::send) return peer == sleeper.peer && behind(segment.pair(sleeper.rank, peer).recvs);
  if (sleeper.kind == Kind::recv) return peer == sleeper.peer && behind(segment.pair(peer, sleeper.rank).sends);
  return behind(segment.control(peer).collectives);
}

class Search {
 public:
  Search(const Segment& segment, int64_t latest) : segment_(segment), latest_(latest) {}

  // Whether a cycle of sleepers can be reached from `rank`; it then stands at the end of path(), from `entry`.
  bool from(int rank, size_t& entry) {
    for (entry = 0; entry < path_.size(); ++entry)
      if (path_[entry].rank == rank) return true;
    Sleeper sleeper;
    if (seen_ >> rank & 1 || !asleep(segment_, rank, latest_, sleeper)) return false;
    seen_ |= uint64_t(1) << rank;
    path_.push_back(sleeper);
    for (int peer = 0; peer < segment_.world(); ++peer)
      if (waits_for(segment_, sleeper, peer) && from(peer, entry)) return true;
    path_.pop_back();
    return false;
  }
  bool unchanged() const {
    for (const Sleeper& s : path_)
      if (segment_.control(s.rank).waiting.version.load(std::memory_order_acquire) != s.version) return false;
    return true;
  }
  const std::vector<Sleeper>& path() const { return path_; }

 private:
  const Segment& segment_;
  const int64_t latest_;
  uint64_t seen_ = 0;
  std::vector<Sleeper> path_;
};

}  // namespace

Asleep::Asleep(RankControl& control, const Call& call, uint64_t seq, uint64_t number) : waiting_(control.waiting) {
  uint64_t awake = waiting_.version.load();
  // Where another thread of this rank sleeps already, what that one waits for stands.
  if (awake % 2 != 0 || !waiting_.version.compare_exchange_strong(awake, awake + 1)) return;
  waiting_.seq.store(seq, std::memory_order_relaxed);
  waiting_.number.store(number, std::memory_order_relaxed);
  waiting_.what.store(uint64_t(call.kind) | uint64_t(uint32_t(call.peer)) << 32, std::memory_order_relaxed);
  waiting_.since_ns.store(now_ns(), std::memory_order_release);
  told_ = true;
}

Asleep::~Asleep() {
  if (!told_) return;
  waiting_.since_ns.store(kNever, std::memory_order_relaxed);
  waiting_.version.fetch_add(1, std::memory_order_release);
}

void ShmTransport::note_caller() {
  pthread_t nobody{};
  if (!caller_.compare_exchange_strong(nobody, pthread_self()) && !pthread_equal(nobody, pthread_self()))
    more_callers_.store(true);
}

bool ShmTransport::only_caller() const {
  return !more_callers_.load() && pthread_equal(caller_.load(), pthread_self());
}

std::string ShmTransport::deadlock_words() const {
  Search search(*segment_, now_ns() - kPatienceNs);
  size_t entry = 0;
  if (!search.from(rank_, entry) || !search.unchanged()) return "";
  std::string text = "the ranks wait for each other:";
  const std::vector<Sleeper>& path = search.path();
  for (size_t i = entry; i < path.size(); ++i) {
    const int next = path[i + 1 < path.size() ? i + 1 : entry].rank;
    text += std::string(i > entry ? ";" : "") + " rank " + std::to_string(path[i].rank) + " called " +
            call_words(segment_->control(path[i].rank), path[i].seq) + ", which needs rank " + std::to_string(next);
  }
  return text + "; they differ in kind, order or peer";
}

}  // namespace tpmp::shm
