// The part of NCCL's interface that is used here, declared by hand (nccl.h of 2.18 and later), found at run time.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "cuda_api.hpp"

namespace tpmp::nccl {

enum Result {
  kSuccess, kUnhandledCudaError, kSystemError, kInternalError, kInvalidArgument, kInvalidUsage, kRemoteError,
  kInProgress, kTimeout
};
enum DataType { kInt8, kUint8, kInt32, kUint32, kInt64, kUint64, kFloat16, kFloat32, kFloat64, kBfloat16 };
enum RedOp { kSum, kProd, kMax, kMin, kAvg };
using Comm = struct CommHandle*;
struct UniqueId { char bytes[128]; };

// ncclConfig_t as of 2.18. A newer library reads `size` and `version`, and takes its own defaults for what came later.
struct Config {
  size_t size = sizeof(Config);
  unsigned magic = 0xcafebeef, version = 21800;
  int blocking = 0;
  int cga_cluster_size = kUnset, min_ctas = kUnset, max_ctas = kUnset;
  const char* net_name = nullptr;
  int split_share = kUnset;
  static constexpr int kUnset = -2147483647 - 1;
};

struct Api {
  Result (*get_version)(int*);
  Result (*get_unique_id)(UniqueId*);
  Result (*init_rank)(Comm*, int ranks, UniqueId, int rank, Config*);
  Result (*finalize)(Comm);
  Result (*destroy)(Comm);
  Result (*abort)(Comm);
  Result (*async_error)(Comm, Result*);
  const char* (*error_string)(Result);
  Result (*group_start)();
  Result (*group_end)();
  Result (*all_reduce)(const void*, void*, size_t, DataType, RedOp, Comm, cuda::Stream);
  Result (*reduce)(const void*, void*, size_t, DataType, RedOp, int root, Comm, cuda::Stream);
  Result (*broadcast)(const void*, void*, size_t, DataType, int root, Comm, cuda::Stream);
  Result (*all_gather)(const void*, void*, size_t, DataType, Comm, cuda::Stream);
  Result (*reduce_scatter)(const void*, void*, size_t, DataType, RedOp, Comm, cuda::Stream);
  Result (*send)(const void*, size_t, DataType, int peer, Comm, cuda::Stream);
  Result (*recv)(void*, size_t, DataType, int peer, Comm, cuda::Stream);
  const char* (*last_error)(Comm);  // null where the library has none

  int version = 0;   // 22809 for 2.28.9
  std::string path;
  std::vector<std::string> absent;  // one line for each optional function that this library lacks
};

// The table of the process: `override`, the copy already loaded, one of `files`, or the system's. The first call
// decides; throws transport_error where there is none, or one too old for communicators that do not block (2.18).
const Api& api(const std::string& override = "", const std::vector<std::string>& files = {});
std::string version_words(int version);   // "2.28.9"
// What a result means and, where `comm` is given and the library can tell, its own last words.
std::string words(Result result, Comm comm = nullptr);

}  // namespace tpmp::nccl
