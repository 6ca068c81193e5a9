#include "nccl_api.hpp"

#include <mutex>
#include <optional>

#include "transport.hpp"

namespace tpmp::nccl {

namespace {

constexpr int kOldest = 21800;

template <class F>
void bind(F& member, const Library& library, const char* symbol) {
  member = reinterpret_cast<F>(library.need(symbol));
}

template <class F>
void bind_optional(F& member, const Library& library, const char* symbol, const char* since, Api& a) {
  member = reinterpret_cast<F>(library.find(symbol));
  if (member == nullptr)
    a.absent.push_back(std::string(symbol) + ": NCCL " + version_words(a.version) + " at " + a.path +
                       " has none (it came with " + since + ")");
}

Api load(const std::string& override, const std::vector<std::string>& files) {
  const Library lib = Library::open("NCCL", "libnccl.so.2", override, files);
  Api a{};
  a.path = lib.path();
  bind(a.get_version, lib, "ncclGetVersion");
  a.get_version(&a.version);
  if (a.version < kOldest)
    throw transport_error(ErrorCode::system, -1, "NCCL at " + a.path + " is " + version_words(a.version) +
                                                     "; expected 2.18 or later, whose communicators do not block");
  bind(a.get_unique_id, lib, "ncclGetUniqueId");
  bind(a.init_rank, lib, "ncclCommInitRankConfig");
  bind(a.finalize, lib, "ncclCommFinalize");
  bind(a.destroy, lib, "ncclCommDestroy");
  bind(a.abort, lib, "ncclCommAbort");
  bind(a.async_error, lib, "ncclCommGetAsyncError");
  bind(a.error_string, lib, "ncclGetErrorString");
  bind(a.group_start, lib, "ncclGroupStart");
  bind(a.group_end, lib, "ncclGroupEnd");
  bind(a.all_reduce, lib, "ncclAllReduce");
  bind(a.reduce, lib, "ncclReduce");
  bind(a.broadcast, lib, "ncclBroadcast");
  bind(a.all_gather, lib, "ncclAllGather");
  bind(a.reduce_scatter, lib, "ncclReduceScatter");
  bind(a.send, lib, "ncclSend");
  bind(a.recv, lib, "ncclRecv");
  bind_optional(a.last_error, lib, "ncclGetLastError", "2.13", a);
  return a;
}

}  // namespace

const Api& api(const std::string& override, const std::vector<std::string>& files) {
  static std::mutex mutex;
  static std::optional<Api> table;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!table) table = load(override, files);
  return *table;
}

std::string version_words(int version) {
  return std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." +
         std::to_string(version % 100);
}

std::string words(Result result, Comm comm) {
  const char* text = api().error_string(result);
  std::string said = text != nullptr ? text : "NCCL result " + std::to_string(int(result));
  const char* last = comm != nullptr && api().last_error != nullptr ? api().last_error(comm) : nullptr;
  if (last != nullptr && *last != '\0') said += std::string(" (") + last + ")";
  return said;
}

}  // namespace tpmp::nccl
