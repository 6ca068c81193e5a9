// Life of the transport, and posting.
#include "transport.hpp"

#include <time.h>

#include <chrono>
#include <cstring>

namespace tpmp::nccl {

namespace {

constexpr size_t kRemembered = 32;
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

bool capturing(cuda::Stream stream) {
  int status = 0;
  cuda::check(cuda::api().stream_is_capturing(stream, &status), "cuStreamIsCapturing");
  return status != 0;
}

cuda::Stream stream_at(uintptr_t address) { return reinterpret_cast<cuda::Stream>(address); }

int64_t after(double seconds) { return now_ns() + int64_t(seconds * 1e9); }

}  // namespace

void pause(int64_t nanoseconds) { std::this_thread::sleep_for(std::chrono::nanoseconds(nanoseconds)); }

int64_t now_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t(now.tv_sec) * 1'000'000'000 + now.tv_nsec;
}

// ---- events, marks, operations

Events::~Events() {
  for (const cuda::Event event : free_) cuda::api().event_destroy(event);
}

cuda::Event Events::take() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!free_.empty()) {
      const cuda::Event event = free_.back();
      free_.pop_back();
      return event;
    }
  }
  cuda::Event event = nullptr;
  cuda::check(cuda::api().event_create(&event, cuda::kEventDisableTiming), "cuEventCreate");
  return event;
}

void Events::give(cuda::Event event) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (event != nullptr) free_.push_back(event);
}

Operation::~Operation() {
  events->give(begun);
  events->give(over);
}

Mark::Mark(std::shared_ptr<Events> events, cuda::Stream stream) : events_(std::move(events)), event_(events_->take()) {
  cuda::check(cuda::api().event_record(event_, stream), "cuEventRecord");
}

Mark::~Mark() { events_->give(event_); }

void NcclWork::order(uintptr_t stream) {
  const std::optional<Failure> failure = transport_->failure();
  if (failure) transport_->throw_failure(operation_->what);
  cuda::check(cuda::api().stream_wait_event(stream_at(stream), operation_->over, 0), "cuStreamWaitEvent");
}

// ---- life

NcclTransport::NcclTransport(const std::string& id, int rank, int size, double timeout, int max_ctas)
    : rank_(rank), size_(size), max_ctas_(max_ctas), context_(current_context()) {
  timeout_.store(timeout);
  try {
    collectives_ = open("collectives", size, rank, id, timeout);
    rescue_ = urgent_stream();
    cuda::check(cuda::api().allocate(&barrier_word_, sizeof(float)), "cuMemAlloc");
    cuda::check(cuda::api().memset32(barrier_word_, 0, 1, rescue_), "cuMemsetD32Async");
    cuda::check(cuda::api().stream_synchronize(rescue_), "cuStreamSynchronize");
  } catch (...) {
    abort_lanes();
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
  const int64_t deadline = after(timeout);
  Result result = api().init_rank(&lane->comm, ranks, unique, rank, &config);
  while (result == kInProgress && now_ns() < deadline && !failure()) {
    pause(1'000'000);
    interruptible();
    if (api().async_error(lane->comm, &result) != kSuccess) result = kInternalError;
  }
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

std::shared_ptr<Lane> NcclTransport::lane_of(const Message& message, bool sends) {
  const std::lock_guard<std::mutex> lock(state_);
  const auto found = messages_.find({message.peer, sends});
  if (found != messages_.end()) return found->second;
  throw transport_error(ErrorCode::system, -1, identity() + " is not connected for messages " +
                                                   (sends ? "to" : "from") + " rank " + std::to_string(message.peer));
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
  if (!failure()) finalize_lanes(after(std::min(timeout_.load(), kCloseSeconds)));
  if (!abort_lanes()) return;  // NCCL may still be at work on the streams: they stay
  under_way_.clear();
  for (const auto& lane : lanes()) cuda::api().stream_destroy(lane->stream);
  cuda::api().stream_destroy(rescue_);
  cuda::api().release(barrier_word_);
}

std::string NcclTransport::identity() const {
  return "rank " + std::to_string(rank_) + " of " + std::to_string(size_);
}

std::vector<std::string> NcclTransport::last_ops() {
  const std::lock_guard<std::mutex> lock(state_);
  return {last_.begin(), last_.end()};
}

// ---- posting

void NcclTransport::check_usable(const std::string& what) {
  if (closed_.load()) throw transport_error(ErrorCode::closed, -1, "the communicator is closed, in " + what);
  if (failure()) throw_failure(what);
}

void NcclTransport::throw_failure(const std::string& what) {
  const Failure found = *failure();
  throw transport_error(found.code, found.culprit, found.text + ", in " + what);
}

std::shared_ptr<Operation> NcclTransport::prepare(const std::shared_ptr<Lane>& lane, std::string what,
                                                  double timeout, cuda::Stream caller, const Gate* gate) {
  auto operation = std::make_shared<Operation>();
  operation->what = std::move(what);
  operation->lane = lane;
  operation->events = events_;
  operation->timeout = timeout;
  operation->begun = events_->take();
  operation->over = events_->take();
  if (gate != nullptr) {
    operation->gate = *gate;
    cuda::check(cuda::api().stream_wait_event(lane->stream, gate->after, 0), "cuStreamWaitEvent");
    cuda::check(cuda::api().wait_value(lane->stream, gate->address, gate->value, cuda::kWaitGeq),
                "cuStreamWaitValue32");
  } else {
    operation->captured = capturing(caller);
    const Mark ready(events_, caller);
    cuda::check(cuda::api().stream_wait_event(lane->stream, ready.event(), 0), "cuStreamWaitEvent");
  }
  cuda::check(cuda::api().event_record(operation->begun, lane->stream), "cuEventRecord");
  return operation;
}

void NcclTransport::finish(const std::shared_ptr<Operation>& operation) {
  cuda::check(cuda::api().event_record(operation->over, operation->lane->stream), "cuEventRecord");
  {
    const std::lock_guard<std::mutex> lock(state_);
    last_.push_back(operation->what);
    if (last_.size() > kRemembered) last_.pop_front();
    if (operation->captured) return;  // its events belong to the graph
    under_way_.push_back(operation);
  }
  wake_.notify_all();
}

std::shared_ptr<Operation> NcclTransport::enqueue(const std::shared_ptr<Lane>& lane, std::string what,
                                                  double timeout, cuda::Stream caller, const Issue& issue,
                                                  const Gate* gate) {
  const std::lock_guard<std::mutex> order(order_);
  check_usable(what);
  const cuda::Current current(context_);
  const auto operation = prepare(lane, std::move(what), timeout, caller, gate);
  const Result result = inside({lane.get()}, timeout, [&] { return issue(lane->comm, lane->stream); });
  judge(result, *lane, operation->what, timeout);
  finish(operation);
  return operation;
}

Result NcclTransport::inside(const std::vector<Lane*>& lanes, double timeout, const std::function<Result()>& step) {
  std::deque<Inside> stays;
  for (Lane* lane : lanes) {
    stays.emplace_back(*lane);
    if (lane->comm == nullptr) return kInvalidUsage;  // aborted meanwhile: the failure is known, and judge tells it
  }
  Result result = step();
  const int64_t deadline = after(timeout);
  for (Lane* lane : lanes)
    while (result == kInProgress || result == kSuccess) {
      Result state = kSuccess;
      if (api().async_error(lane->comm, &state) != kSuccess) state = kInternalError;
      result = state;
      if (state != kInProgress || now_ns() > deadline) break;
      pause(20'000);
      interruptible();
    }
  return result;
}

void NcclTransport::judge(Result result, Lane& lane, const std::string& what, double timeout) {
  if (result == kSuccess) return;
  if (result == kInProgress)
    fail(ErrorCode::timeout, -1, "NCCL did not take the call within " + std::to_string(int(timeout)) + " s");
  else
    fail(error_code(result), -1, "NCCL says: " + said(result, lane));
  throw_failure(what);
}

std::shared_ptr<Work> NcclTransport::post(Collective call, double timeout) {
  return posted(std::move(call), timeout, nullptr);
}

std::shared_ptr<Work> NcclTransport::post_gated(Collective call, double timeout, const Mark& after, uint64_t address,
                                                uint32_t value) {
  if (cuda::api().wait_value == nullptr)
    throw transport_error(ErrorCode::system, -1, "the CUDA driver at " + cuda::api().path +
                                                     " has no cuStreamWaitValue32; gate by a kernel that waits");
  if (capturing(stream_at(call.stream)))
    throw transport_error(ErrorCode::system, -1, "a gated call cannot be captured into a graph; post it in chunks");
  const Gate gate{after.event(), address, value};
  return posted(std::move(call), timeout, &gate);
}

std::shared_ptr<Work> NcclTransport::posted(Collective call, double timeout, const Gate* gate) {
  const std::string what = words(call);
  if (call.kind == Kind::barrier) {  // of NCCL there is none
    call.kind = Kind::all_reduce;
    call.dtype = DType::f32;
    call.numel = 1;
    call.input = call.output = reinterpret_cast<void*>(barrier_word_);
  }
  const auto step = [&](Comm comm, cuda::Stream stream) { return issue(api(), call, rank_, size_, comm, stream); };
  const auto nothing = [](Comm, cuda::Stream) { return kSuccess; };
  const cuda::Stream caller = stream_at(call.stream);
  const Issue issue_it = empty(call) ? Issue(nothing) : Issue(step);
  const auto operation = enqueue(collectives_, what, timeout, caller, issue_it, gate);
  return std::make_shared<NcclWork>(shared_from_this(), operation);
}

void NcclTransport::run(const Collective& call, double timeout) {
  if (capturing(stream_at(call.stream)))
    throw transport_error(ErrorCode::system, -1, words(call) + " would wait on the host, which a graph cannot; post it");
  post(call, timeout)->wait(timeout);
}

std::shared_ptr<Work> NcclTransport::isend(const Message& message, bool) { return exchange({message}, {}).front(); }

std::shared_ptr<Work> NcclTransport::irecv(const Message& message, bool) { return exchange({}, {message}).front(); }

std::vector<std::shared_ptr<Work>> NcclTransport::exchange(const std::vector<Message>& sends,
                                                           const std::vector<Message>& recvs) {
  const std::lock_guard<std::mutex> order(order_);
  const cuda::Current current(context_);
  std::map<Lane*, std::shared_ptr<Operation>> operations;  // in one order of locking
  std::vector<std::shared_ptr<Work>> works;
  const auto join = [&](const Message& m, bool sending) {
    const std::string what = std::string(sending ? "send to rank " : "recv from rank ") + std::to_string(m.peer) +
                             (m.tag.empty() ? "" : " '" + m.tag + "'");
    check_usable(what);
    const auto lane = lane_of(m, sending);
    std::shared_ptr<Operation>& operation = operations[lane.get()];
    if (operation) operation->what += ", " + what;
    else operation = prepare(lane, what, timeout_.load(), stream_at(m.stream), nullptr);
    works.push_back(std::make_shared<NcclWork>(shared_from_this(), operation));
  };
  for (const Message& m : sends) join(m, true);
  for (const Message& m : recvs) join(m, false);
  if (works.empty()) return works;
  std::vector<Lane*> lanes;
  for (const auto& [lane, operation] : operations) lanes.push_back(lane);
  const Result result = inside(lanes, timeout_.load(), [&] { return transfer(sends, recvs); });
  judge(result, *lanes.front(), operations.begin()->second->what, timeout_.load());
  for (const auto& [lane, operation] : operations) finish(operation);
  return works;
}

Result NcclTransport::transfer(const std::vector<Message>& sends, const std::vector<Message>& recvs) {
  const bool grouped = sends.size() + recvs.size() > 1;
  Result result = grouped ? api().group_start() : kSuccess;
  const auto step = [&](const Message& m, bool sending) {
    const auto lane = lane_of(m, sending);
    const size_t bytes = m.numel * element_bytes(m.dtype);
    if (bytes == 0) return;
    const Result own = sending ? api().send(m.data, bytes, kUint8, lane->peer, lane->comm, lane->stream)
                               : api().recv(m.data, bytes, kUint8, lane->peer, lane->comm, lane->stream);
    result = worse(result, own);
  };
  for (const Message& m : sends) step(m, true);
  for (const Message& m : recvs) step(m, false);
  return grouped ? worse(result, api().group_end()) : result;
}

std::shared_ptr<Mark> NcclTransport::mark(uintptr_t stream) {
  const cuda::Current current(context_);
  return std::make_shared<Mark>(events_, stream_at(stream));
}

// ---- waiting on the host

void NcclTransport::interruptible() {
  try {
    if (interrupt_hook != nullptr) interrupt_hook();
  } catch (...) {
    abort("a signal interrupted its wait");
    throw;
  }
}

void NcclTransport::wait_host(const Operation& operation, double timeout) {
  if (operation.captured)
    throw transport_error(ErrorCode::system, -1, operation.what + " is part of a graph: it is over when a launch is");
  const int64_t start = now_ns(), deadline = after(timeout);
  for (int64_t slice = 5'000;; slice = std::min<int64_t>(slice * 2, 1'000'000)) {
    if (failure()) throw_failure(operation.what);
    const cuda::Result state = cuda::api().event_query(operation.over);
    if (state == cuda::kSuccess) return;
    if (state != cuda::kNotReady) {
      fail(ErrorCode::system, -1, "the device failed: " + cuda::words(state));
      continue;
    }
    if (now_ns() > deadline) {
      fail(ErrorCode::timeout, -1, "waited " + std::to_string((now_ns() - start) / 1'000'000'000) + " s");
      continue;
    }
    interruptible();
    pause(slice);
  }
}

}  // namespace tpmp::nccl
