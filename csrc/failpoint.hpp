// Failpoints: named places where a test build can be told to die, stop, throw, fail, flip a bit or pause, so that a
// fault happens there and nowhere else. TPMP_FAILPOINT("name") is nothing at all unless TPMP_FAILPOINTS is defined.
#pragma once

#ifndef TPMP_FAILPOINTS

#define TPMP_FAILPOINT(...) ((void)0)

#else

#define TPMP_FAILPOINT(...) ::tpmp::failpoint::pass(__VA_ARGS__)

#include <linux/futex.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <new>
#include <sstream>
#include <string>

#include "transport.hpp"

namespace tpmp::failpoint {

// "2:collective.after_wait:1:kill": the first time that rank 2 comes by, it is killed. Actions: kill, stop, exit (with
// 0), throw, bad_alloc, errno=N, flip=BIT (of the data that the place offers), pause.
struct Plan {
  int rank = -1, hit = 0, value = 0;
  std::string name, action;
  std::atomic<int> hits{0};
};

inline std::deque<Plan> plans;      // set while the process has one thread
inline std::atomic<int> rank{-1};   // of this process
// Where the next two are set, shared by the processes of a test: when the last plan took effect (CLOCK_MONOTONIC, just
// before it did), and a futex word of those who pause: 1 while one does, changed by whoever lets it go on.
inline std::atomic<int64_t>* when_ns = nullptr;
inline std::atomic<uint32_t>* gate = nullptr;

inline void arm(const std::string& text) {
  std::istringstream in(text);
  char colon;
  Plan& plan = plans.emplace_back();
  in >> plan.rank >> colon;
  std::getline(in, plan.name, ':');
  in >> plan.hit >> colon;
  std::getline(in, plan.action, '=');
  in >> plan.value;
}

inline const bool armed_from_environment = [] {
  const char* text = std::getenv("TPMP_FAILPOINT");
  const char* own = std::getenv("RANK");
  if (own != nullptr) rank = std::atoi(own);
  if (text != nullptr) arm(text);
  return text != nullptr;
}();

inline void pause() {
  gate->store(1);
  syscall(SYS_futex, gate, FUTEX_WAKE, 64, nullptr, nullptr, 0);
  for (; gate->load() == 1;) syscall(SYS_futex, gate, FUTEX_WAIT, 1, nullptr, nullptr, 0);
}

inline void act(const Plan& plan, void* data) {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  if (when_ns != nullptr) when_ns->store(int64_t(now.tv_sec) * 1'000'000'000 + now.tv_nsec);
  if (plan.action == "kill") kill(getpid(), SIGKILL);
  if (plan.action == "stop") raise(SIGSTOP);  // this thread at once, and the others with it
  if (plan.action == "exit") _exit(0);
  if (plan.action == "throw") throw transport_error(ErrorCode::system, -1, "failpoint " + plan.name);
  if (plan.action == "bad_alloc") throw std::bad_alloc();
  if (plan.action == "errno")
    throw transport_error(ErrorCode::system, -1, plan.name + " failed: " + std::strerror(plan.value));
  if (plan.action == "flip" && data != nullptr) static_cast<char*>(data)[plan.value / 8] ^= char(1 << plan.value % 8);
  if (plan.action == "pause") pause();
}

inline void pass(const char* name, void* data = nullptr) {
  for (Plan& plan : plans)
    if (plan.rank == rank.load() && plan.name == name && ++plan.hits == plan.hit) act(plan, data);
}

}  // namespace tpmp::failpoint

#endif
