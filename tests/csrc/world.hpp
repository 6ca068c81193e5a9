// Ranks as processes: forked while this process has one thread, over a segment that they inherit; what they have to say
// stands in a page that all of them share.
#pragma once

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <functional>
#include <new>
#include <vector>

#include "shm/transport.hpp"

namespace tpmp::test {

constexpr int kMost = 4;            // ranks
constexpr unsigned kPatience = 30;  // seconds, after which a rank has hung and its alarm kills it

struct Outcome {
  std::atomic<int> told;
  int code, culprit;  // code 0: no error
  int64_t error_ns;
  char text[6000];
};

struct Page {
  std::atomic<int64_t> when_ns;
  std::atomic<uint32_t> gate;
  std::atomic<int> count;
  char address[64], nonce[64];
  Outcome outcomes[kMost];
};

inline Page& shared_page() {
  void* memory = mmap(nullptr, sizeof(Page), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  return *new (memory) Page();
}

inline void drop(Page& page) { munmap(&page, sizeof page); }

inline std::shared_ptr<shm::Segment> new_segment(int world) {
  const uint8_t nonce[16] = {1, 2, 3};
  return shm::Segment::create(world, nonce);
}

inline void tell(Outcome& outcome, int code, int culprit, const char* text) {
  outcome.code = code;
  outcome.culprit = culprit;
  outcome.error_ns = shm::now_ns();
  std::strncpy(outcome.text, text, sizeof outcome.text - 1);
  outcome.told.store(1, std::memory_order_release);
}

// Ends without destructors, which belong to the process that this one was forked from.
inline pid_t fork_rank(const std::function<void()>& program) {
  const pid_t pid = fork();
  if (pid != 0) return pid;
  alarm(kPatience);
  program();
  _exit(0);
}

struct Line {  // "group=kill world=3 runs=12", for whoever reads the output
  explicit Line(const char* group) { std::printf("group=%s", group); }
  ~Line() {
    std::printf("\n");
    std::fflush(stdout);
  }
  Line& operator()(const char* name, double value) {
    std::printf(" %s=%.10g", name, value);
    return *this;
  }
};

}  // namespace tpmp::test
