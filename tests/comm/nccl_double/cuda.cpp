// Test double of the CUDA driver: the symbols that csrc/cuda_api.cpp binds, and a copy for the tests, with the driver's
// ABI, on host memory.
//
// A stream is a queue that a thread of its own works off, so that order comes from events alone, as on a device. While
// a stream captures, what it gets is noted instead and done at each launch. fake_cuda_* are the test's controls.
#include "cuda.hpp"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

namespace {

constexpr int kSuccess = 0, kInvalid = 1, kNotReady = 600;
constexpr int kUnsafe = 900, kCapturedEvent = 907;
constexpr int kGlobal = 0;

std::atomic<int> live_streams{0}, live_events{0};
std::atomic<int> captures{0};       // under way
std::atomic<bool> broken{false};    // the capture under way was broken off by a call that it forbids
thread_local int capture_mode = kGlobal;

void nap() { std::this_thread::sleep_for(std::chrono::microseconds(50)); }

struct Graph {
  std::vector<Step> steps;
};

}  // namespace

struct FakeStream {
  FakeStream() {
    std::thread([own = state] { work(*own); }).detach();  // it may be inside what never ends, as a kernel may
    ++live_streams;
  }
  ~FakeStream() {
    {
      const std::lock_guard<std::mutex> lock(state->mutex);
      state->ending = true;
    }
    state->wake.notify_all();
    --live_streams;
  }
  void push(Step step) {
    if (graph != nullptr) return graph->steps.push_back(std::move(step));
    {
      const std::lock_guard<std::mutex> lock(state->mutex);
      state->queue.push_back(std::move(step));
    }
    state->wake.notify_all();
  }
  bool idle() {
    const std::lock_guard<std::mutex> lock(state->mutex);
    return state->queue.empty() && !state->busy;
  }

  Graph* graph = nullptr;  // being captured

 private:
  // What the worker touches; it outlives the stream.
  struct State {
    std::mutex mutex;
    std::condition_variable wake;
    std::deque<Step> queue;
    bool busy = false, ending = false;
  };
  const std::shared_ptr<State> state = std::make_shared<State>();

  static void work(State& own) {
    std::unique_lock<std::mutex> lock(own.mutex);
    for (;;) {
      own.wake.wait(lock, [&] { return own.ending || !own.queue.empty(); });
      if (own.queue.empty()) return;  // a stream that is destroyed still does what it has
      const Step step = std::move(own.queue.front());
      own.queue.pop_front();
      own.busy = true;
      lock.unlock();
      step();
      lock.lock();
      own.busy = false;
    }
  }
};

struct FakeEvent {
  std::shared_ptr<std::atomic<uint64_t>> reached = std::make_shared<std::atomic<uint64_t>>(0);
  uint64_t recorded = 0;
  Graph* graph = nullptr;  // of the capture that recorded it
};

namespace {

FakeStream& of(FakeStream* stream) {
  static FakeStream* null = new FakeStream;
  return stream != nullptr ? *stream : *null;
}

// Whether a call that looks at the device is allowed to this thread at this moment.
bool forbidden() {
  if (captures == 0 || capture_mode != kGlobal) return false;
  broken = true;
  return true;
}

}  // namespace

void fake_cuda_push(FakeStream* stream, Step step) { of(stream).push(std::move(step)); }

extern "C" {

int cuInit(unsigned) { return kSuccess; }
int cuGetErrorName(int result, const char** name) {
  *name = result == kSuccess ? "CUDA_SUCCESS" : result == kNotReady ? "CUDA_ERROR_NOT_READY" : "CUDA_ERROR_OF_DOUBLE";
  return kSuccess;
}
int cuGetErrorString(int, const char** text) { return *text = "as the test asked", kSuccess; }

thread_local void* context = reinterpret_cast<void*>(0x1000);
int cuCtxGetCurrent(void** found) { return *found = context, kSuccess; }
int cuCtxSetCurrent(void* wanted) { return context = wanted, kSuccess; }
int cuCtxGetStreamPriorityRange(int* least, int* greatest) { return *least = 0, *greatest = -5, kSuccess; }

int cuStreamCreateWithPriority(FakeStream** stream, unsigned, int) { return *stream = new FakeStream, kSuccess; }
int cuStreamDestroy_v2(FakeStream* stream) { return delete stream, kSuccess; }
int cuStreamIsCapturing(FakeStream* stream, int* status) { return *status = of(stream).graph != nullptr, kSuccess; }
int cuStreamSynchronize(FakeStream* stream) {
  if (forbidden()) return kUnsafe;
  while (!of(stream).idle()) nap();
  return kSuccess;
}
int cuThreadExchangeStreamCaptureMode(int* mode) { return std::swap(*mode, capture_mode), kSuccess; }

int cuStreamWaitEvent(FakeStream* stream, FakeEvent* event, unsigned) {
  if (event->graph != nullptr) of(stream).graph = event->graph;  // the stream joins the capture
  if (of(stream).graph != nullptr) return kSuccess;              // steps of a graph are done in the order of the calls
  of(stream).push([reached = event->reached, wanted = event->recorded] {
    while (reached->load() < wanted) nap();
  });
  return kSuccess;
}

int cuEventCreate(FakeEvent** event, unsigned) { return ++live_events, *event = new FakeEvent, kSuccess; }
int cuEventDestroy_v2(FakeEvent* event) { return --live_events, delete event, kSuccess; }
int cuEventRecord(FakeEvent* event, FakeStream* stream) {
  event->graph = of(stream).graph;
  if (event->graph != nullptr) return kSuccess;
  ++event->recorded;
  of(stream).push([reached = event->reached, ticket = event->recorded] { reached->store(ticket); });
  return kSuccess;
}
int cuEventQuery(FakeEvent* event) {
  if (forbidden()) return kUnsafe;
  if (event->graph != nullptr && captures > 0) return broken = true, kCapturedEvent;
  return event->reached->load() >= event->recorded ? kSuccess : kNotReady;
}

int cuStreamWaitValue32_v2(FakeStream* stream, uint64_t address, uint32_t value, unsigned) {
  of(stream).push([=] {
    while (int32_t(reinterpret_cast<volatile uint32_t*>(address)[0] - value) < 0) nap();
    std::atomic_thread_fence(std::memory_order_acquire);
  });
  return kSuccess;
}
int cuStreamWriteValue32_v2(FakeStream* stream, uint64_t address, uint32_t value, unsigned) {
  of(stream).push([=] { *reinterpret_cast<volatile uint32_t*>(address) = value; });
  return kSuccess;
}
int cuMemsetD32Async(uint64_t address, unsigned value, size_t count, FakeStream* stream) {
  of(stream).push([=] { std::fill_n(reinterpret_cast<uint32_t*>(address), count, value); });
  return kSuccess;
}
int cuMemcpyAsync(uint64_t to, uint64_t from, size_t bytes, FakeStream* stream) {
  of(stream).push([=] { std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes); });
  return kSuccess;
}
int cuMemAlloc_v2(uint64_t* address, size_t bytes) {
  return *address = reinterpret_cast<uint64_t>(std::aligned_alloc(256, (bytes + 255) / 256 * 256)), kSuccess;
}
int cuMemFree_v2(uint64_t address) { return std::free(reinterpret_cast<void*>(address)), kSuccess; }

// ---- controls

int fake_cuda_live_streams() { return live_streams; }
int fake_cuda_live_events() { return live_events; }

int fake_cuda_capture_begin(FakeStream* stream) {
  if (of(stream).graph != nullptr) return kInvalid;
  ++captures;
  of(stream).graph = new Graph;
  return kSuccess;
}

// The graph; null where a forbidden call broke the capture off. Streams that joined leave it: `joined` of them.
void* fake_cuda_capture_end(FakeStream* stream, FakeStream** joined, int count) {
  Graph* graph = of(stream).graph;
  of(stream).graph = nullptr;
  for (int i = 0; i < count; ++i) of(joined[i]).graph = nullptr;
  return --captures, broken.exchange(false) ? nullptr : graph;
}

int fake_cuda_graph_launch(void* graph, FakeStream* stream) {
  for (const Step& step : static_cast<Graph*>(graph)->steps) of(stream).push(step);
  return kSuccess;
}

}  // extern "C"
