// The order of collectives. A blocking call with nothing posted before it runs on its caller's thread at once. Posted
// calls stand in a queue, which the keeper carries out, or whoever waits for one of them: first come, in order. The
// keeper lets a moment pass, because many callers post and wait at once; two threads of a rank at one call cost more.
#include <algorithm>

#include "failpoint.hpp"
#include "shm/rounds.hpp"

namespace tpmp::shm {

namespace {

constexpr int64_t kGraceNs = 30'000;

}  // namespace

struct Posted {
  Collective call;
  Call said;  // its tag views that of `call`
  double timeout;
  uint64_t seq = 0, number = 0;    // of the call, of the collective
  std::exception_ptr error;        // set before done
  std::atomic<bool> done{false};

  Posted(Collective c, double timeout)
      : call(std::move(c)), said{call.kind, call.dtype, call.op, call.root, call.numel, call.tag}, timeout(timeout) {}
};

class PostedWork final : public Work {
 public:
  PostedWork(std::shared_ptr<ShmTransport> transport, std::shared_ptr<Posted> posted)
      : transport_(std::move(transport)), posted_(std::move(posted)) {}
  void wait(double timeout) override { transport_->await_posted(posted_, timeout); }
  bool done() override { return posted_->done.load(std::memory_order_acquire) || transport_->forked(); }

 private:
  const std::shared_ptr<ShmTransport> transport_;
  const std::shared_ptr<Posted> posted_;
};

void ShmTransport::run(const Collective& call, double timeout) {
  const Call said{call.kind, call.dtype, call.op, call.root, call.numel, call.tag};
  check_usable(said);
  note_caller();
  if (posted_.load() == 0 && turn_.try_lock()) {
    const std::lock_guard<std::mutex> turn(turn_, std::adopt_lock);
    if (posted_.load() == 0) {
      RankControl& control = segment_->control(rank_);
      control.collectives.fetch_add(1, std::memory_order_release);
      execute(call, said, record_start(control, said), timeout, false);
      if (posted_.load() > 0) wake_keeper();  // by another thread, meanwhile
      return;
    }
  }
  await_posted(enqueue(call, timeout), timeout);
}

std::shared_ptr<Work> ShmTransport::post(Collective call, double timeout) {
  check_usable({call.kind, call.dtype, call.op, call.root, call.numel, call.tag});
  note_caller();
  auto posted = enqueue(std::move(call), timeout);
  TPMP_FAILPOINT("work.posted");
  wake_keeper();
  return std::make_shared<PostedWork>(shared_from_this(), std::move(posted));
}

std::shared_ptr<Posted> ShmTransport::enqueue(Collective call, double timeout) {
  auto posted = std::make_shared<Posted>(std::move(call), timeout);
  RankControl& control = segment_->control(rank_);
  const std::lock_guard<std::mutex> lock(queue_mutex_);
  posted->number = control.collectives.fetch_add(1, std::memory_order_release) + 1;
  posted->seq = record_start(control, posted->said);
  if (queue_.empty()) keepers_turn_.store(now_ns() + kGraceNs);
  queue_.push_back(posted);
  posted_.fetch_add(1);
  return posted;
}

void ShmTransport::execute(const Collective& call, const Call& said, uint64_t seq, double timeout, bool on_keeper) {
  try {
    Rounds rounds(*this, call, said, seq, timeout, on_keeper);
    carry_out(rounds);
  } catch (const std::exception& error) {
    if (!poisoned()) abort(error.what());  // this rank's rounds have come apart from the others'
    throw;
  }
  record_done(segment_->control(rank_), seq);
}

// Carries out what is posted, up to `until`, each in its own timeout and `most_seconds`; returns at once where another
// thread is at it.
void ShmTransport::run_posted(bool on_keeper, const Posted* until, double most_seconds) {
  for (bool more = true; more && posted_.load() > 0 && turn_.try_lock();) {
    const std::lock_guard<std::mutex> turn(turn_, std::adopt_lock);
    std::shared_ptr<Posted> front;
    {
      const std::lock_guard<std::mutex> lock(queue_mutex_);
      if (queue_.empty()) return;
      front = queue_.front();
    }
    const auto leave = [&] {
      const std::lock_guard<std::mutex> lock(queue_mutex_);
      queue_.pop_front();
      keepers_turn_.store(queue_.empty() ? kNever : 0);
      posted_.fetch_sub(1);
      front->done.store(true, std::memory_order_release);
    };
    try {
      check_usable(front->said);
      execute(front->call, front->said, front->seq, std::min(front->timeout, most_seconds), on_keeper);
    } catch (const transport_error&) {
      front->error = std::current_exception();
    } catch (const std::bad_alloc&) {
      front->error = std::current_exception();
    } catch (...) {  // a signal, on a caller's thread: the group is poisoned by now
      front->error = std::make_exception_ptr(
          transport_error(ErrorCode::peer_failed, rank_, identity() + " was interrupted in " + words(front->said)));
      leave();
      throw;
    }
    leave();
    ring(doorbell(rank_));
    more = front.get() != until;
    if (!more && posted_.load() > 0) wake_keeper();
  }
}

void ShmTransport::await_posted(const std::shared_ptr<Posted>& posted, double timeout) {
  CallerWatch watch(*this, posted->said, posted->seq, posted->number, timeout,
                    [this](int peer) { return awaits(peer); });
  try {
    watched_wait(*this, watch, spin_ns_, [&] {
      run_posted(false, posted.get(), double(watch.deadline_ns() - now_ns()) * 1e-9);
      return posted->done.load(std::memory_order_acquire) ? Seen::all : Seen::nothing;
    });
  } catch (...) {
    // Its buffers are the caller's again only when nobody is in the middle of it; in a failed group nobody begins.
    const std::lock_guard<std::mutex> turn(turn_);
    throw;
  }
  if (posted->error != nullptr) std::rethrow_exception(posted->error);
}

bool ShmTransport::awaits(int peer) const {
  const uint64_t round = awaiting_.load(std::memory_order_relaxed);
  return segment_->collective_slot(peer, round).seq.load(std::memory_order_acquire) != round;
}

}  // namespace tpmp::shm
