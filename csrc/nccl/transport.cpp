// Life of the transport: its streams and communicators, from connecting to close.
#include "transport.hpp"

#include <time.h>

#include <cstring>

namespace tpmp::nccl {

namespace {

constexpr double kCloseSeconds = 10;

cuda::Context current_context() {
  cuda::Context context = nullptr;
  cuda::check(cuda::api().context_get(&context), "cuCtxGetCurrent");
  if (context == nullptr)
    throw transport_error(ErrorCode::system, -1, "this thread has no CUDA context; select a device first "
                                                 "(torch.cuda.set_device)");
  return context;
}

cuda::Stream urgent_stream() {
  int least = 0, greatest = 0;
  cuda::check(cuda::api().priority_range(&least, &greatest), "cuCtxGetStreamPriorityRange");
  cuda::Stream stream = nullptr;
  cuda::check(cuda::api().stream_create(&stream, cuda::kStreamNonBlocking, greatest), "cuStreamCreateWithPriority");
  return stream;
}

}  // namespace

int64_t now_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t(now.tv_sec) * 1'000'000'000 + now.tv_nsec;
}

int64_t after(double seconds) { return now_ns() + int64_t(seconds * 1e9); }

NcclTransport::NcclTransport(const std::string& id, int rank, int size, double timeout, int max_ctas)
    : rank_(rank), size_(size), max_ctas_(max_ctas), timeout_(timeout), context_(current_context()) {
  try {
    collectives_ = open("collectives", size, rank, id, timeout);
    rescue_ = urgent_stream();
    cuda::check(cuda::api().allocate(&barrier_word_, sizeof(float)), "cuMemAlloc");
    cuda::check(cuda::api().memset32(barrier_word_, 0, 1, rescue_), "cuMemsetD32Async");
    cuda::check(cuda::api().stream_synchronize(rescue_), "cuStreamSynchronize");
  } catch (...) {
    let_go();
    throw;
  }
  watch_ = std::thread([this] { watch(); });
}

NcclTransport::~NcclTransport() { close(); }

void NcclTransport::connect(int peer, bool sends, const std::string& id, double timeout) {
  const std::string name = std::string("messages ") + (sends ? "to" : "from") + " rank " + std::to_string(peer);
  check_usable("connecting for " + name);
  const cuda::Current current(context_);
  const auto lane = open(name, 2, sends ? 0 : 1, id, timeout);
  lane->peer = sends ? 1 : 0;
  const std::lock_guard<std::mutex> lock(state_);
  messages_[{peer, sends}] = lane;
}

// The lane is the transport's from its first moment on: whatever comes of it is aborted with the others.
std::shared_ptr<Lane> NcclTransport::open(const std::string& name, int ranks, int rank, const std::string& id,
                                          double timeout) {
  UniqueId unique{};
  if (id.size() != sizeof unique.bytes)
    throw transport_error(ErrorCode::system, -1, "a unique id has " + std::to_string(id.size()) + " bytes, expected " +
                                                     std::to_string(sizeof unique.bytes));
  std::memcpy(unique.bytes, id.data(), sizeof unique.bytes);
  const auto lane = std::make_shared<Lane>();
  lane->name = name;
  lane->stream = urgent_stream();
  const std::lock_guard<std::timed_mutex> inside(lane->mutex);
  {
    const std::lock_guard<std::mutex> lock(state_);
    lanes_.push_back(lane);
  }
  Config config;
  if (max_ctas_ > 0) config.max_ctas = max_ctas_;
  Result result = api().init_rank(&lane->comm, ranks, unique, rank, &config);
  const auto connected = [&] {
    if (result == kInProgress) result = state_of(lane->comm);
    if (result != kInProgress || failure()) return true;
    interruptible();
    return false;
  };
  ask_until(connected, after(timeout), 1'000'000);
  if (result == kSuccess) return lane;
  if (failure()) throw_failure("connecting for " + name);
  const std::string where = "NCCL " + version_words(api().version) + " could not connect " + identity() + " for " +
                            name + ": ";
  if (result == kInProgress)
    throw transport_error(ErrorCode::timeout, -1, where + "not all ranks came within " +
                                                      std::to_string(int(timeout)) + " s");
  throw transport_error(error_code(result), -1, where + nccl::words(result, lane->comm));
}

std::vector<std::shared_ptr<Lane>> NcclTransport::lanes() {
  const std::lock_guard<std::mutex> lock(state_);
  return lanes_;
}

std::vector<uintptr_t> NcclTransport::streams() {
  std::vector<uintptr_t> found;
  for (const auto& lane : lanes()) found.push_back(reinterpret_cast<uintptr_t>(lane->stream));
  return found;
}

std::shared_ptr<Lane> NcclTransport::lane_of(int peer, bool sends) {
  const std::lock_guard<std::mutex> lock(state_);
  const auto found = messages_.find({peer, sends});
  if (found != messages_.end()) return found->second;
  throw transport_error(ErrorCode::system, -1, identity() + " is not connected for messages " +
                                                   (sends ? "to" : "from") + " rank " + std::to_string(peer));
}

void NcclTransport::close() {
  if (closed_.exchange(true)) return;
  {
    const std::lock_guard<std::mutex> lock(state_);
    leaving_ = true;
  }
  wake_.notify_all();
  if (watch_.joinable()) watch_.join();
  const cuda::Current current(context_);
  if (!failure()) finalize_lanes(after(std::min(timeout_, kCloseSeconds)));
  let_go();
}

void NcclTransport::let_go() {
  if (!abort_lanes()) return;  // NCCL may still be at work on the streams: they stay
  for (const auto& lane : lanes()) cuda::api().stream_destroy(lane->stream);
  if (rescue_ != nullptr) cuda::api().stream_destroy(rescue_);
  if (barrier_word_ != 0) cuda::api().release(barrier_word_);
  const std::lock_guard<std::mutex> lock(state_);
  under_way_.clear();
}

std::string NcclTransport::identity() const {
  return "rank " + std::to_string(rank_) + " of " + std::to_string(size_);
}

std::vector<std::string> NcclTransport::last_ops() {
  const std::lock_guard<std::mutex> lock(state_);
  return {last_.begin(), last_.end()};
}

}  // namespace tpmp::nccl
