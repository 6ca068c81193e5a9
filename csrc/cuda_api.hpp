// The part of the CUDA driver's interface that is used here, declared by hand: names, types and values are the
// driver's own (CUDA Driver API reference, 11.8 and later), found in libcuda at run time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "dynlib.hpp"

namespace tpmp::cuda {

using Result = int;
using DevicePtr = unsigned long long;
using Context = struct ContextHandle*;
using Stream = struct StreamHandle*;
using Event = struct EventHandle*;

constexpr Result kSuccess = 0, kNotReady = 600;
constexpr unsigned kStreamNonBlocking = 1;
constexpr unsigned kEventDisableTiming = 2;
constexpr unsigned kWaitGeq = 0;      // CU_STREAM_WAIT_VALUE_GEQ: (int32_t)(*address - value) >= 0
constexpr int kCaptureRelaxed = 2;    // CU_STREAM_CAPTURE_MODE_RELAXED

// One table a process. A member is null where the driver lacks it: `wait_value` and `write_value` alone.
struct Api {
  Result (*init)(unsigned flags);
  Result (*error_name)(Result, const char**);
  Result (*error_string)(Result, const char**);
  Result (*context_get)(Context*);
  Result (*context_set)(Context);
  Result (*priority_range)(int* least, int* greatest);
  Result (*stream_create)(Stream*, unsigned flags, int priority);
  Result (*stream_destroy)(Stream);
  Result (*stream_wait_event)(Stream, Event, unsigned flags);
  Result (*stream_is_capturing)(Stream, int* status);
  Result (*stream_synchronize)(Stream);
  Result (*capture_mode)(int* mode);  // exchanges this thread's
  Result (*event_create)(Event*, unsigned flags);
  Result (*event_destroy)(Event);
  Result (*event_record)(Event, Stream);
  Result (*event_query)(Event);
  Result (*wait_value)(Stream, DevicePtr, uint32_t value, unsigned flags);
  Result (*write_value)(Stream, DevicePtr, uint32_t value, unsigned flags);
  Result (*memset32)(DevicePtr, unsigned value, size_t count, Stream);
  Result (*allocate)(DevicePtr*, size_t bytes);
  Result (*release)(DevicePtr);
  std::string path;
};

// The driver's table: `override` or the copy already loaded or the system's. The first call decides; throws
// transport_error where there is no driver.
const Api& api(const std::string& override = "");
std::string words(Result result);                     // "CUDA_ERROR_INVALID_VALUE: invalid argument"
void check(Result result, const char* call);          // throws transport_error on anything but success

// Makes a context current on this thread for as long as it lives.
class Current {
 public:
  explicit Current(Context context);
  ~Current();
  Current(const Current&) = delete;

 private:
  Context before_ = nullptr;
};

}  // namespace tpmp::cuda
