// What ends the wait of a call: poison, a death, a peer that left, a deadlock, the deadline, a signal.
#include <algorithm>
#include <cstdio>

#include "shm/transport.hpp"

namespace tpmp::shm {

namespace {

std::string seconds(double value) {
  char text[32];
  std::snprintf(text, sizeof text, value < 1e4 ? "%.2f" : "%.0f", value);
  return text;
}

}  // namespace

CallerWatch::CallerWatch(ShmTransport& transport, const Call& call, uint64_t seq, uint64_t number, double timeout,
                         std::function<bool(int)> awaited, bool own_thread)
    : transport_(transport), call_(call), seq_(seq), number_(number), timeout_(timeout), awaited_(std::move(awaited)),
      own_thread_(own_thread), start_(now_ns()), deadline_(start_ + int64_t(std::min(timeout, kForever) * 1e9)) {}

std::string CallerWatch::where() const {
  return " | in " + words(call_) + " (call #" + std::to_string(seq_) + ") | waited " +
         seconds(double(now_ns() - start_) * 1e-9) + " s of " + seconds(timeout_) + " s";
}

void CallerWatch::glance() const {
  if (transport_.poisoned()) fail_poisoned();
}

void CallerWatch::fail_poisoned() const { transport_.throw_poison(where()); }

bool CallerWatch::look(bool tick) {
  if (own_thread_ && !asleep_ && transport_.only_caller())
    asleep_.emplace(transport_.segment_->control(transport_.rank_), call_, seq_, number_);
  if (tick && own_thread_ && interrupt_hook != nullptr) interrupt_hook();
  if (transport_.closed_.load())
    throw transport_error(ErrorCode::closed, -1, "the communicator was closed in a call" + where());
  culprit_ = transport_.lost_peer();
  if (culprit_ >= 0) {
    fault_ = Fault::died;
    return true;
  }
  for (int peer = 0; peer < transport_.size_; ++peer) {
    if (peer == transport_.rank_ || !transport_.closed(peer) || !awaited_(peer)) continue;
    fault_ = Fault::left;
    culprit_ = peer;
    return true;
  }
  if (now_ns() >= deadline_) {
    fault_ = Fault::late;
  } else if (tick && asleep_ && !(stuck_ = transport_.deadlock_words()).empty()) {
    fault_ = Fault::stuck;
  } else {
    fault_ = Fault::none;
  }
  return fault_ != Fault::none;
}

void CallerWatch::fail() {
  ShmTransport& t = transport_;
  if (fault_ == Fault::died) {
    t.poison(ErrorCode::peer_died, culprit_, t.died_words(culprit_));
  } else if (fault_ == Fault::left) {
    t.poison(ErrorCode::peer_died, culprit_, "rank " + std::to_string(culprit_) +
             " left: it closed its communicator while " + t.identity() + " was waiting for it in " + words(call_));
  } else if (fault_ == Fault::stuck) {
    t.poison(ErrorCode::mismatch, -1, stuck_);
  } else {
    const std::string text = late_words();
    t.poison(ErrorCode::timeout, culprit_, text);
  }
  t.throw_poison(where());
}

// Whom this rank waited for, and what every rank was doing. One missing rank alone is the culprit, or else the one that
// is stopped, for whom the missing may be waiting too.
std::string CallerWatch::late_words() {
  std::string missing;
  int count = 0;
  for (int peer = 0; peer < transport_.size_; ++peer) {
    if (peer == transport_.rank_ || !awaited_(peer)) continue;
    missing += (count > 0 ? ", " : "") + std::to_string(peer);
    culprit_ = ++count == 1 ? peer : -1;
  }
  std::string text = transport_.identity() + " gave up after " + seconds(timeout_) + " s in " + words(call_) +
                     "; still waiting for rank " + missing + ". Last operations:";
  for (const std::string& line : transport_.last_ops()) text += "\n  " + line;
  const std::vector<int> stopped = transport_.stopped_peers();
  if (stopped.size() == 1) culprit_ = stopped[0];
  return text + "\n";
}

}  // namespace tpmp::shm
