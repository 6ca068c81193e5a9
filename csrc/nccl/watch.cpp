// The watch of a transport: errors of the communicators, deadlines of what is under way, and the abort.
#include <chrono>

#include "transport.hpp"

namespace tpmp::nccl {

namespace {

constexpr auto kBusy = std::chrono::milliseconds(1), kIdle = std::chrono::milliseconds(50);
constexpr int64_t kAskNs = 1'000'000;
constexpr auto kGivesWay = std::chrono::seconds(1);  // that a thread inside NCCL has to come out before an abort

}  // namespace

ErrorCode error_code(Result result) {
  switch (result) {
    case kRemoteError: return ErrorCode::peer_died;
    case kTimeout: return ErrorCode::timeout;
    default: return ErrorCode::system;
  }
}

Result state_of(Comm comm) {
  Result state = kSuccess;
  const Result asked = api().async_error(comm, &state);
  return asked != kSuccess ? asked : state;
}

void NcclTransport::watch() {
  const cuda::Current current(context_);
  int mode = cuda::kCaptureRelaxed;  // another thread's capture must not see these queries
  cuda::api().capture_mode(&mode);
  for (bool aborted = false;;) {
    {
      std::unique_lock<std::mutex> lock(state_);
      wake_.wait_for(lock, under_way_.empty() || aborted ? kIdle : kBusy);
      if (leaving_) return;
    }
    if (aborted) continue;
    look_at_lanes();
    look_at_operations();
    if (failure()) {
      aborted = true;
      open_gates();
      if (!abort_lanes())
        add_to_failure("; NCCL has not aborted within " + std::to_string(int(abort_seconds())) +
                       " s: end this process");
    }
  }
}

void NcclTransport::look_at_lanes() {
  for (const auto& lane : lanes()) {
    const std::unique_lock<std::timed_mutex> lock(lane->mutex, std::try_to_lock);
    if (!lock.owns_lock()) {
      const int64_t entered = lane->entered_ns.load();
      if (entered != 0 && double(now_ns() - entered) > (timeout_ + 1) * 1e9)
        fail(ErrorCode::timeout, -1, "a call into NCCL itself (" + lane->name + ") does not return");
      continue;
    }
    if (lane->comm == nullptr) continue;
    const Result found = state_of(lane->comm);
    if (found != kSuccess && found != kInProgress)
      fail(error_code(found), -1, "NCCL says: " + nccl::words(found, lane->comm));
  }
}

void NcclTransport::look_at_operations() {
  std::deque<std::shared_ptr<Operation>> all;
  {
    const std::lock_guard<std::mutex> lock(state_);
    all = under_way_;
  }
  for (const auto& operation : all) {
    const cuda::Result state = cuda::api().event_query(operation->over);
    if (state == cuda::kSuccess) operation->done.store(true);
    else if (state != cuda::kNotReady) fail(ErrorCode::system, -1, "the device failed: " + cuda::words(state));
    else look_at(*operation);
  }
  const std::lock_guard<std::mutex> lock(state_);
  const auto done = [](const auto& operation) { return operation->done.load(); };
  under_way_.erase(std::remove_if(under_way_.begin(), under_way_.end(), done), under_way_.end());
}

void NcclTransport::look_at(Operation& operation) {
  // The clock starts when the device comes to the operation, however long it computes before.
  if (operation.begun_ns == 0) {
    if (cuda::api().event_query(operation.begun) == cuda::kSuccess) operation.begun_ns = now_ns();
    return;
  }
  const double waited = double(now_ns() - operation.begun_ns) / 1e9;
  if (waited <= operation.timeout) return;
  fail(ErrorCode::timeout, -1, identity() + " waited " + std::to_string(int(waited)) + " s for its peers in " +
                                   operation.what);
}

// ---- failure

std::optional<Failure> NcclTransport::failure() {
  const std::lock_guard<std::mutex> lock(state_);
  return failure_;
}

void NcclTransport::fail(ErrorCode code, int culprit, const std::string& text) {
  {
    const std::lock_guard<std::mutex> lock(state_);
    if (!failure_) failure_ = Failure{code, culprit, text};
  }
  wake_.notify_all();
}

void NcclTransport::add_to_failure(const std::string& text) {
  const std::lock_guard<std::mutex> lock(state_);
  failure_->text += text;
}

void NcclTransport::abort(const std::string& reason) {
  fail(ErrorCode::peer_failed, rank_, identity() + " failed: " + reason);
}

std::string NcclTransport::said(Result result, Lane& lane) {
  const std::lock_guard<std::timed_mutex> lock(lane.mutex);
  return nccl::words(result, lane.comm);
}

void NcclTransport::open_gates() {
  const std::lock_guard<std::mutex> lock(state_);
  for (const auto& operation : under_way_)
    if (operation->gate.address != 0 && cuda::api().write_value != nullptr)
      cuda::api().write_value(rescue_, operation->gate.address, operation->gate.value, 0);
}

// Each on a thread of its own: an abort may hang, and then that thread is left to it.
bool NcclTransport::abort_lanes() {
  std::vector<std::future<void>> answers;
  for (const auto& lane : lanes()) {
    // NCCL wants nobody inside when it aborts; whoever hangs there comes out by the abort alone.
    const std::unique_lock<std::timed_mutex> lock(lane->mutex, kGivesWay);
    if (lane->comm == nullptr) continue;
    auto returned = std::make_shared<std::promise<void>>();
    answers.push_back(returned->get_future());
    std::thread([returned, comm = lane->comm, context = context_] {
      cuda::api().context_set(context);
      api().abort(comm);
      returned->set_value();
    }).detach();
    lane->comm = nullptr;
  }
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(abort_seconds());
  for (std::future<void>& answer : answers)
    all_aborted_ = answer.wait_until(deadline) == std::future_status::ready && all_aborted_;
  return all_aborted_;
}

void NcclTransport::finalize_lanes(int64_t deadline) {
  for (const auto& lane : lanes()) {
    const std::lock_guard<std::timed_mutex> lock(lane->mutex);
    if (lane->comm != nullptr) api().finalize(lane->comm);
  }
  for (const auto& lane : lanes()) {
    const std::lock_guard<std::timed_mutex> lock(lane->mutex);
    Result state = kInProgress;
    const auto through = [&] {
      if (lane->comm != nullptr) state = state_of(lane->comm);
      return lane->comm == nullptr || state != kInProgress;
    };
    ask_until(through, deadline, kAskNs);
    if (lane->comm == nullptr || state != kSuccess) continue;  // what is not through is aborted
    api().destroy(lane->comm);
    lane->comm = nullptr;
  }
}

}  // namespace tpmp::nccl
