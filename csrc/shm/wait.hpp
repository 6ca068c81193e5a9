// The only loop of the transport that waits. It has a deadline, watches the poison word and the leases of the peers,
// and sleeps on a doorbell that every publisher and the poisoner ring (a test greps that no other file loops).
#pragma once

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <limits>

namespace tpmp::shm {

constexpr int64_t kSliceNs = 20'000'000;  // the longest sleep: a death, which rings nobody, is seen after at most this
// Turns of the spin between two looks at the clock, about 2 us. Each look also yields: on a busy machine the peer may
// be waiting for this very core (measured: 140 us there and back without, 15 us with).
constexpr uint32_t kTurns = 32;
constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

inline int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t(t.tv_sec) * 1'000'000'000 + t.tv_nsec;
}

inline void cpu_relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A futex word and the count of those who sleep on it.
struct Bell {
  std::atomic<uint32_t>* word;
  std::atomic<uint32_t>* sleepers;
};

// Called after the release store of the flag that a sleeper waits for. Sequentially consistent on both sides: either
// the ringer sees the sleeper and wakes it, or the sleeper sees the new word and does not fall asleep.
inline void ring(Bell bell) {
  bell.word->fetch_add(1, std::memory_order_seq_cst);
  if (bell.sleepers->load(std::memory_order_seq_cst) != 0)
    syscall(SYS_futex, bell.word, FUTEX_WAKE, std::numeric_limits<int>::max(), nullptr, nullptr, 0);
}

class Sleeping {
 public:
  explicit Sleeping(Bell bell) : bell_(bell) { bell_.sleepers->fetch_add(1, std::memory_order_seq_cst); }
  ~Sleeping() { bell_.sleepers->fetch_sub(1, std::memory_order_seq_cst); }
  Sleeping(const Sleeping&) = delete;

 private:
  const Bell bell_;
};

// Sleeps while *word == seen. True where nobody rang: the slice passed or a signal came.
inline bool futex_sleep(Bell bell, uint32_t seen, int64_t ns) {
  const timespec limit{ns / 1'000'000'000, ns % 1'000'000'000};
  const long rc = syscall(SYS_futex, bell.word, FUTEX_WAIT, seen, &limit, nullptr, 0);  // relative, CLOCK_MONOTONIC
  return rc < 0 && (errno == ETIMEDOUT || errno == EINTR);
}

// What a predicate has seen: nothing new, some of what it waits for, or all of it.
enum class Seen { nothing, some, all };

// Returns once pred() has seen all. Whenever it has seen some, the time to spin begins anew: a stream that flows is not
// slept on (a sleep costs more than a piece of it). The watch decides what else may end the wait:
//   glance()        cheap, in every round; throws where the group is poisoned
//   look(tick)      before each sleep: leases, deadline, signals (where tick); true for a fault
//   fail()          throws the fault that look found. pred is asked once more before: what a peer published before it
//                   died or left still counts
//   bell()          what to sleep on; may change between two sleeps
//   deadline_ns()   CLOCK_MONOTONIC, or kNever
template <class Pred, class Watch>
void wait_until(Pred&& pred, Watch&& watch, int64_t spin_ns) {
  int64_t spin_end = spin_ns == 0 ? 0 : now_ns() + spin_ns;
  bool tick = false;
  for (uint32_t turn = 1;; ++turn) {
    const Seen seen = pred();
    if (seen == Seen::all) return;
    watch.glance();
    if (spin_ns != 0) {
      if (seen == Seen::some) spin_end = now_ns() + spin_ns;
      if (turn % kTurns != 0 || now_ns() < spin_end) {
        if (turn % kTurns == 0) sched_yield();
        cpu_relax();
        continue;
      }
    }
    const Bell bell = watch.bell();
    const uint32_t rung = bell.word->load(std::memory_order_acquire);
    const Sleeping announced(bell);
    if (pred() == Seen::all) return;
    watch.glance();
    if (watch.look(tick)) {
      if (pred() == Seen::all) return;
      watch.fail();
    }
    const int64_t left = watch.deadline_ns() == kNever ? kSliceNs : watch.deadline_ns() - now_ns();
    tick = futex_sleep(bell, rung, std::clamp<int64_t>(left, 1000, kSliceNs));
    turn = kTurns - 1;  // looks at the clock next
  }
}

}  // namespace tpmp::shm
