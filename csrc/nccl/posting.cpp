// Posting: an event of the caller's stream, an operation of NCCL, an event behind it; and waiting for that on the host.
#include "transport.hpp"

namespace tpmp::nccl {

namespace {

constexpr size_t kRemembered = 32;

bool capturing(cuda::Stream stream) {
  int status = 0;
  cuda::check(cuda::api().stream_is_capturing(stream, &status), "cuStreamIsCapturing");
  return status != 0;
}

cuda::Stream stream_at(uintptr_t address) { return reinterpret_cast<cuda::Stream>(address); }

}  // namespace

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
  const Result result = inside(*lane, timeout, issue);
  judge(result, *lane, operation->what, timeout);
  finish(operation);
  return operation;
}

Result NcclTransport::inside(Lane& lane, double timeout, const Issue& issue) {
  const Inside stay(lane);
  if (lane.comm == nullptr) return kInvalidUsage;  // aborted meanwhile: the failure is known, and judge tells it
  Result result = issue(lane.comm, lane.stream);
  const auto taken = [&] {
    if (result == kSuccess || result == kInProgress) result = state_of(lane.comm);
    if (result != kInProgress) return true;
    interruptible();
    return false;
  };
  ask_until(taken, after(timeout), 20'000);
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
  const auto step = [&](Comm comm, cuda::Stream stream) {
    return empty(call) ? kSuccess : issue(api(), call, rank_, size_, comm, stream);
  };
  const auto operation = enqueue(collectives_, what, timeout, stream_at(call.stream), step, gate);
  return std::make_shared<NcclWork>(shared_from_this(), operation);
}

void NcclTransport::run(const Collective& call, double timeout) {
  if (capturing(stream_at(call.stream)))
    throw transport_error(ErrorCode::system, -1,
                          words(call) + " would wait on the host, which a graph cannot; post it");
  post(call, timeout)->wait(timeout);
}

std::shared_ptr<Work> NcclTransport::isend(const Message& message, bool) { return posted(message, true); }

std::shared_ptr<Work> NcclTransport::irecv(const Message& message, bool) { return posted(message, false); }

std::shared_ptr<Work> NcclTransport::posted(const Message& m, bool sends) {
  const auto lane = lane_of(m.peer, sends);
  const std::string what = std::string(sends ? "send to rank " : "recv from rank ") + std::to_string(m.peer) +
                           (m.tag.empty() ? "" : " '" + m.tag + "'");
  const size_t bytes = m.numel * element_bytes(m.dtype);
  const auto step = [&](Comm comm, cuda::Stream stream) {
    if (bytes == 0) return kSuccess;
    return sends ? api().send(m.data, bytes, kUint8, lane->peer, comm, stream)
                 : api().recv(m.data, bytes, kUint8, lane->peer, comm, stream);
  };
  const auto operation = enqueue(lane, what, timeout_, stream_at(m.stream), step, nullptr);
  return std::make_shared<NcclWork>(shared_from_this(), operation);
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
  const int64_t start = now_ns();
  const auto over = [&] {
    if (failure()) throw_failure(operation.what);
    const cuda::Result state = cuda::api().event_query(operation.over);
    if (state == cuda::kSuccess) return true;
    if (state != cuda::kNotReady) fail(ErrorCode::system, -1, "the device failed: " + cuda::words(state));
    interruptible();
    return false;
  };
  if (ask_until(over, after(timeout), 100'000)) return;
  fail(ErrorCode::timeout, -1, "waited " + std::to_string((now_ns() - start) / 1'000'000'000) + " s");
  throw_failure(operation.what);
}

}  // namespace tpmp::nccl
