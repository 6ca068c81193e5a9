// Test double of NCCL: the symbols that csrc/nccl_api.cpp binds, with NCCL's ABI, between threads or processes of one
// host, over files of a folder, made in FAKE_NCCL_DIR, that the unique id names.
//
// As NCCL does, a call only enqueues on its stream; there the operation meets its peers' of the same number; a send is
// over when its receive has taken it; what stands in one group takes place together; an abort lets every operation go,
// and leaves garbage. fake_nccl_plan makes faults: entries "rank:function:hit:action" joined by ";", rank and hit "*"
// for all, actions return=CODE, async=CODE, inprogress=POLLS, delay=MS, hang.
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "cuda.hpp"
#include "faults.hpp"
#include "reductions.hpp"

namespace {

enum Code { kSuccess = 0, kInternal = 3, kInvalidArgument = 4, kInvalidUsage = 5, kInProgress = 7 };
constexpr size_t kBytes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2};  // by data type
constexpr int kLater = 20;  // ms after which an asynchronous error comes: when the call has returned
constexpr unsigned kMagic = 0xcafebeef;
struct UniqueId { char bytes[128]; };
struct Config { size_t size; unsigned magic, version; int blocking; };

void nap() { std::this_thread::sleep_for(std::chrono::microseconds(50)); }

// ---- communicators

}  // namespace

struct FakeComm {
  std::string folder;
  int rank, size;
  std::atomic<int> state{kInProgress};  // of connecting, then of what went wrong
  std::atomic<int> polls{0};            // that still say "in progress"
  std::atomic<bool> aborted{false};
  std::atomic<int> outstanding{0};
  uint64_t collectives = 0;
  std::map<std::pair<int, int>, uint64_t> messages;  // by (sender, receiver)

  std::string file(const std::string& name) const { return folder + "/" + name; }
};

namespace {

using Comm = std::shared_ptr<FakeComm>;
std::mutex comms_mutex;
std::map<FakeComm*, Comm> comms;

Comm of(FakeComm* handle) {
  const std::lock_guard<std::mutex> lock(comms_mutex);
  const auto found = comms.find(handle);
  return found == comms.end() ? nullptr : found->second;
}


void write_file(const std::string& path, const void* data, size_t bytes) {
  const std::string part = path + ".part";
  std::ofstream(part, std::ios::binary).write(static_cast<const char*>(data), std::streamsize(bytes));
  std::rename(part.c_str(), path.c_str());
}

// The last rank to go takes the folder along.
void forget(FakeComm* handle) {
  const Comm comm = of(handle);
  const auto left = [&](int rank) { return comm->file("left." + std::to_string(rank)); };
  write_file(left(comm->rank), "", 0);
  bool all = true;
  for (int rank = 0; rank < comm->size; ++rank) all = all && access(left(rank).c_str(), F_OK) == 0;
  std::error_code unable;
  if (all) std::filesystem::remove_all(comm->folder, unable);
  const std::lock_guard<std::mutex> lock(comms_mutex);
  comms.erase(handle);
}

// Waits for a file; false where the communicator was aborted meanwhile.
bool await(const Comm& comm, const std::string& path) {
  struct stat info;
  for (; stat(path.c_str(), &info) != 0; nap())
    if (comm->aborted) return false;
  return !comm->aborted;
}

Buffer read_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return Buffer(std::istreambuf_iterator<char>(in), {});
}

// ---- operations

// Every rank's input of a collective; empty where it was aborted.
std::vector<Buffer> met_inputs(const Comm& comm, uint64_t number, const void* input, size_t bytes) {
  const auto name = [&](int rank) { return comm->file("c" + std::to_string(number) + "." + std::to_string(rank)); };
  write_file(name(comm->rank), input, bytes);
  std::vector<Buffer> parts;
  for (int rank = 0; rank < comm->size; ++rank) {
    if (!await(comm, name(rank))) return {};
    parts.push_back(read_file(name(rank)));
    parts.back().resize(bytes);
  }
  return parts;
}

struct Message {
  bool sends;
  char* data;
  size_t bytes;
  std::string name;
};

void start(const Comm& comm, const Message& m) {
  if (m.sends) write_file(comm->file(m.name), m.data, m.bytes);
}

void finish(const Comm& comm, const Message& m) {
  if (m.sends) return void(await(comm, comm->file(m.name + ".taken")));
  if (!await(comm, comm->file(m.name))) return;
  const Buffer found = read_file(comm->file(m.name));
  std::memcpy(m.data, found.data(), std::min(found.size(), m.bytes));
  write_file(comm->file(m.name + ".taken"), "", 0);
}

struct Joint {
  Comm comm;
  FakeStream* stream;
  std::vector<Message> messages;
};

thread_local int depth = 0;
thread_local std::vector<Joint> group;

void enqueue(const Comm& comm, FakeStream* stream, const Fault& fault, Step step) {
  ++comm->outstanding;
  const bool lost = fault.action == "async";
  const int delay = lost ? kLater : fault.action == "delay" ? fault.value : 0;
  if (fault.action == "inprogress") comm->polls = fault.value;
  fake_cuda_push(stream, [=, value = fault.value] {
    std::this_thread::sleep_for(std::chrono::milliseconds(delay));
    if (lost) comm->state = value;
    while (lost && !comm->aborted) nap();
    if (!comm->aborted) step();
    --comm->outstanding;
  });
}

int outcome(const Comm& comm, const Fault& fault) {
  return fault.action == "inprogress" && comm->polls > 0 ? kInProgress : kSuccess;
}

using Fill = std::function<void(std::vector<Buffer>&)>;  // of the output, from all inputs

int collective(const char* function, FakeComm* handle, FakeStream* stream, const void* input, size_t bytes,
               const Fill& fill) {
  const Comm comm = of(handle);
  if (comm == nullptr) return kInvalidArgument;
  const Fault fault = met(function, comm->rank, "," + std::to_string(bytes));
  if (fault.action == "return") return fault.value;
  if (comm->state == kInProgress) return kInvalidUsage;
  // A graph does the step again at each launch: the number belongs to the launch.
  enqueue(comm, stream, fault, [=] {
    std::vector<Buffer> parts = met_inputs(comm, ++comm->collectives, input, bytes);
    if (!parts.empty()) fill(parts);
  });
  return outcome(comm, fault);
}

void copy(void* to, const Buffer& from) { std::memcpy(to, from.data(), from.size()); }

void enqueue_joint(const Joint& joint, const Fault& fault) {
  enqueue(joint.comm, joint.stream, fault, [joint] {
    for (const Message& m : joint.messages) start(joint.comm, m);
    for (const bool sends : {false, true})  // a peer's send is over when it is taken here
      for (const Message& m : joint.messages)
        if (m.sends == sends) finish(joint.comm, m);
  });
}

int message(const char* function, FakeComm* handle, FakeStream* stream, bool sends, void* data, size_t bytes,
            int peer) {
  const Comm comm = of(handle);
  if (comm == nullptr) return kInvalidArgument;
  const Fault fault = met(function, comm->rank, "," + std::to_string(bytes));
  if (fault.action == "return") return fault.value;
  if (comm->state == kInProgress) return kInvalidUsage;
  const auto [from, to] = sends ? std::pair(comm->rank, peer) : std::pair(peer, comm->rank);
  // Counted apart at the two ends, even where both are one rank.
  const uint64_t number = comm->messages[{sends ? from : -1 - from, to}]++;
  const std::string name = "m" + std::to_string(from) + "." + std::to_string(to) + "." + std::to_string(number);
  const Message m{sends, static_cast<char*>(data), bytes, name};
  if (depth == 0) {
    enqueue_joint({comm, stream, {m}}, fault);
    return outcome(comm, fault);
  }
  for (Joint& joint : group)
    if (joint.comm == comm && joint.stream == stream) return joint.messages.push_back(m), kSuccess;
  group.push_back({comm, stream, {m}});
  return kSuccess;
}

void connect(const Comm& comm) {
  write_file(comm->file("init." + std::to_string(comm->rank)), "", 0);
  for (int rank = 0; rank < comm->size; ++rank)
    if (!await(comm, comm->file("init." + std::to_string(rank)))) return;
  comm->state = kSuccess;
}

}  // namespace

extern "C" {

int ncclGetVersion(int* version) {
  const char* told = std::getenv("FAKE_NCCL_VERSION");
  return *version = told != nullptr ? std::atoi(told) : 22809, kSuccess;
}

const char* ncclGetErrorString(int result) {
  static const char* const texts[] = {"no error", "unhandled cuda error", "unhandled system error", "internal error",
                                      "invalid argument", "invalid usage", "remote process exited", "in progress",
                                      "timeout"};
  return texts[result];
}

#ifndef WITHOUT_LAST_ERROR
const char* ncclGetLastError(FakeComm*) { return "as the test asked"; }
#endif

int ncclGetUniqueId(UniqueId* id) {
  const char* told = std::getenv("FAKE_NCCL_DIR");
  const std::string pattern = std::string(told != nullptr ? told : "") + "/XXXXXX";
  if (told == nullptr || pattern.size() >= sizeof id->bytes) return kInternal;
  std::memset(id, 0, sizeof *id);
  std::memcpy(id->bytes, pattern.c_str(), pattern.size());
  return mkdtemp(id->bytes) != nullptr ? kSuccess : kInternal;
}

int ncclCommInitRankConfig(FakeComm** made, int size, UniqueId id, int rank, const Config* config) {
  const Fault fault = met("ncclCommInitRankConfig", rank);
  if (config->magic != kMagic || config->size < sizeof(Config) || config->blocking != 0) return kInvalidArgument;
  if (fault.action == "return") return fault.value;
  const Comm comm = std::make_shared<FakeComm>();
  comm->folder = id.bytes;
  comm->rank = rank;
  comm->size = size;
  if (fault.action == "async") comm->state = fault.value;
  else std::thread([comm] { connect(comm); }).detach();
  const std::lock_guard<std::mutex> lock(comms_mutex);
  comms[*made = comm.get()] = comm;
  return kInProgress;
}

int ncclCommGetAsyncError(FakeComm* handle, int* state) {
  const Comm comm = of(handle);
  if (comm == nullptr) return kInvalidArgument;
  if (comm->polls > 0) return --comm->polls, *state = kInProgress, kSuccess;
  return *state = comm->state, kSuccess;
}

int ncclCommFinalize(FakeComm* handle) {
  const Comm comm = of(handle);
  const Fault fault = met("ncclCommFinalize", comm->rank);
  if (fault.action == "return") return fault.value;
  comm->state = kInProgress;
  std::thread([comm] {
    while (comm->outstanding > 0 && !comm->aborted) nap();
    comm->state = kSuccess;
  }).detach();
  return kInProgress;
}

int ncclCommDestroy(FakeComm* handle) {
  met("ncclCommDestroy", handle->rank);
  return forget(handle), kSuccess;
}

int ncclCommAbort(FakeComm* handle) {
  const Comm comm = of(handle);
  met("ncclCommAbort", comm->rank);
  comm->aborted = true;
  return forget(handle), kSuccess;
}

int ncclGroupStart() {
  const Fault fault = met("ncclGroupStart", -1);
  if (fault.action == "return") return fault.value;
  return ++depth, kSuccess;
}

int ncclGroupEnd() {
  const Fault fault = met("ncclGroupEnd", -1);
  if (depth > 0 && --depth > 0) return kSuccess;
  const std::vector<Joint> joints = std::move(group);
  group.clear();
  if (fault.action == "return") return fault.value;
  for (const Joint& joint : joints) enqueue_joint(joint, fault);
  return kSuccess;
}

int ncclAllReduce(const void* in, void* out, size_t n, int dtype, int op, FakeComm* comm, FakeStream* stream) {
  return collective("ncclAllReduce", comm, stream, in, n * kBytes[dtype], [=](std::vector<Buffer>& parts) {
    reduce(parts, dtype, op);
    copy(out, parts[0]);
  });
}

int ncclReduce(const void* in, void* out, size_t n, int dtype, int op, int root, FakeComm* handle, FakeStream* stream) {
  const Comm comm = of(handle);
  return collective("ncclReduce", handle, stream, in, n * kBytes[dtype], [=](std::vector<Buffer>& parts) {
    reduce(parts, dtype, op);
    if (comm->rank == root) copy(out, parts[0]);
  });
}

int ncclBroadcast(const void* in, void* out, size_t n, int dtype, int root, FakeComm* comm, FakeStream* stream) {
  return collective("ncclBroadcast", comm, stream, in, n * kBytes[dtype],
                    [=](std::vector<Buffer>& parts) { copy(out, parts[size_t(root)]); });
}

int ncclAllGather(const void* in, void* out, size_t n, int dtype, FakeComm* comm, FakeStream* stream) {
  const size_t bytes = n * kBytes[dtype];
  return collective("ncclAllGather", comm, stream, in, bytes, [=](std::vector<Buffer>& parts) {
    for (size_t r = 0; r < parts.size(); ++r) copy(static_cast<char*>(out) + r * bytes, parts[r]);
  });
}

int ncclReduceScatter(const void* in, void* out, size_t n, int dtype, int op, FakeComm* handle, FakeStream* stream) {
  const Comm comm = of(handle);
  const size_t bytes = n * kBytes[dtype];
  return collective("ncclReduceScatter", handle, stream, in, bytes * size_t(comm->size),
                    [=](std::vector<Buffer>& parts) {
                      reduce(parts, dtype, op);
                      std::memcpy(out, parts[0].data() + bytes * size_t(comm->rank), bytes);
                    });
}

int ncclSend(const void* data, size_t n, int dtype, int peer, FakeComm* comm, FakeStream* stream) {
  return message("ncclSend", comm, stream, true, const_cast<void*>(data), n * kBytes[dtype], peer);
}

int ncclRecv(void* data, size_t n, int dtype, int peer, FakeComm* comm, FakeStream* stream) {
  return message("ncclRecv", comm, stream, false, data, n * kBytes[dtype], peer);
}

// ---- controls

void fake_nccl_plan(const char* text) {
  const std::lock_guard<std::mutex> lock(plan_mutex);
  faults = parsed(text);
  hits.clear();
}

void fake_nccl_release() {
  const std::lock_guard<std::mutex> lock(plan_mutex);
  ++release;
  released.notify_all();
}

int fake_nccl_live() {
  const std::lock_guard<std::mutex> lock(comms_mutex);
  return int(comms.size());
}

void fake_nccl_log(char* text, int size) {
  const std::lock_guard<std::mutex> lock(plan_mutex);
  std::string all;
  for (const std::string& line : called) all += line + "\n";
  std::snprintf(text, size_t(size), "%s", all.c_str());
}

}  // extern "C"
