// One NCCL communicator with the stream on which its operations take place. Everything that touches a communicator
// holds its lane's mutex; the time since when says whether a call into NCCL itself hangs.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <string>
#include <thread>

#include "../cuda_api.hpp"
#include "../nccl_api.hpp"

namespace tpmp::nccl {

int64_t now_ns();
int64_t after(double seconds);  // from now

// NCCL and CUDA wake nobody: they can only be asked again. Asks until `done`, at most until `deadline`; the last answer.
template <class Done>
bool ask_until(Done&& done, int64_t deadline, int64_t pause_ns) {
  for (; !done(); std::this_thread::sleep_for(std::chrono::nanoseconds(pause_ns)))
    if (now_ns() > deadline) return false;
  return true;
}

struct Lane {
  std::string name;               // "collectives", "messages to rank 1", "messages from rank 1"
  int peer = -1;                  // of messages: its rank in `comm`, where the sender is 0 and the receiver 1
  Comm comm = nullptr;            // null once it was aborted or destroyed
  cuda::Stream stream = nullptr;
  std::timed_mutex mutex;
  std::atomic<int64_t> entered_ns{0};  // when the thread inside NCCL entered it; 0 where none is
};

// A stay inside NCCL: locks the lane, and notes since when.
class Inside {
 public:
  explicit Inside(Lane& lane) : lock_(lane.mutex), lane_(lane) { lane.entered_ns.store(now_ns()); }
  ~Inside() { lane_.entered_ns.store(0); }
  Inside(const Inside&) = delete;

 private:
  const std::lock_guard<std::timed_mutex> lock_;
  Lane& lane_;
};

}  // namespace tpmp::nccl
