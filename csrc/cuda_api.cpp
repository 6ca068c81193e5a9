#include "cuda_api.hpp"

#include <mutex>
#include <optional>

#include "transport.hpp"

namespace tpmp::cuda {

namespace {

template <class F>
void bind(F& member, const Library& library, const char* symbol) {
  member = reinterpret_cast<F>(library.need(symbol));
}

Api load(const std::string& override) {
  const Library lib = Library::open("the CUDA driver", "libcuda.so.1", override, {});
  Api a{};
  bind(a.init, lib, "cuInit");
  bind(a.error_name, lib, "cuGetErrorName");
  bind(a.error_string, lib, "cuGetErrorString");
  bind(a.context_get, lib, "cuCtxGetCurrent");
  bind(a.context_set, lib, "cuCtxSetCurrent");
  bind(a.priority_range, lib, "cuCtxGetStreamPriorityRange");
  bind(a.stream_create, lib, "cuStreamCreateWithPriority");
  bind(a.stream_destroy, lib, "cuStreamDestroy_v2");
  bind(a.stream_wait_event, lib, "cuStreamWaitEvent");
  bind(a.stream_is_capturing, lib, "cuStreamIsCapturing");
  bind(a.stream_synchronize, lib, "cuStreamSynchronize");
  bind(a.capture_mode, lib, "cuThreadExchangeStreamCaptureMode");
  bind(a.event_create, lib, "cuEventCreate");
  bind(a.event_destroy, lib, "cuEventDestroy_v2");
  bind(a.event_record, lib, "cuEventRecord");
  bind(a.event_query, lib, "cuEventQuery");
  bind(a.memset32, lib, "cuMemsetD32Async");
  bind(a.allocate, lib, "cuMemAlloc_v2");
  bind(a.release, lib, "cuMemFree_v2");
  a.wait_value = reinterpret_cast<decltype(a.wait_value)>(lib.find("cuStreamWaitValue32_v2"));
  a.write_value = reinterpret_cast<decltype(a.write_value)>(lib.find("cuStreamWriteValue32_v2"));
  a.path = lib.path();
  return a;
}

}  // namespace

const Api& api(const std::string& override) {
  static std::mutex mutex;
  static std::optional<Api> table;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!table) {
    Api loaded = load(override);
    const Result result = loaded.init(0);
    if (result != kSuccess)
      throw transport_error(ErrorCode::system, -1, "the CUDA driver at " + loaded.path + " does not start: error " +
                                                       std::to_string(result));
    table = std::move(loaded);
  }
  return *table;
}

std::string words(Result result) {
  const char *name = nullptr, *text = nullptr;
  api().error_name(result, &name);
  api().error_string(result, &text);
  return (name != nullptr ? name : "CUDA error " + std::to_string(result)) + (text != nullptr ? ": " : "") +
         (text != nullptr ? text : "");
}

void check(Result result, const char* call) {
  if (result != kSuccess)
    throw transport_error(ErrorCode::system, -1, std::string(call) + " failed: " + words(result));
}

Current::Current(Context context) {
  api().context_get(&before_);
  check(api().context_set(context), "cuCtxSetCurrent");
}

Current::~Current() { api().context_set(before_); }

}  // namespace tpmp::cuda
