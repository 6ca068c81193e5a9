// The rounds that all collectives consist of. In a round every rank publishes one slot, waits for the slots of all,
// checks that all call the same thing, and reads. A rank publishes round k + 1 before it waits for round k, so that a
// late peer is not felt at once. Hence four slots: whoever publishes k + 4 has waited for k + 2, which each peer
// published after it had read k.
//
// A tensor that lies in its rank's heap is lent: the slot says where it is, and peers read it there. The call that
// lent it ends with a round of its own, after which nobody reads it any more.
#include "shm/rounds.hpp"

#include <cstring>

#include "failpoint.hpp"

namespace tpmp::shm {

namespace {

constexpr int64_t kUnderWay = 4;

}  // namespace

Rounds::Rounds(ShmTransport& transport, const Collective& call, const Call& said, uint64_t seq, double timeout,
               bool on_keeper)
    : call(call), rank(transport.rank_), size(transport.size_), element(element_bytes(call.dtype)),
      capacity(transport.segment_->header().collective_bytes), t_(transport), said_(said), print_(fingerprint(said)),
      id_(++transport.collective_id_), on_keeper_(on_keeper),
      watch_(transport, said_, seq, id_, timeout, [&transport](int peer) { return transport.awaits(peer); }, !on_keeper) {}

void Rounds::run(uint64_t count, bool ahead, const Step& publish, const Step& read) {
  const uint64_t first = t_.round_ + 1;
  const auto out = [&](uint64_t k) {
    slot(rank, first + k).lent = 0;
    publish(k, first + k);
    seal(first + k);
  };
  for (uint64_t k = 0; k < count; ++k) {
    if (k == 0 || !ahead) out(k);
    if (ahead && k + 1 < count) out(k + 1);
    await(first + k);
    read(k, first + k);
    TPMP_FAILPOINT("collective.after_read");
  }
  t_.round_ = first + count - 1;
}

void Rounds::finish() {
  if (!lent_) return;
  const auto nothing = [](uint64_t, uint64_t) {};
  run(1, false, nothing, nothing);
}

void Rounds::copy(uint64_t round, const char* data, size_t bytes, size_t at) {
  std::memcpy(slot(rank, round).payload() + at, data, bytes);
}

bool Rounds::lends(const char* data, size_t bytes) const { return t_.segment_->in_heap(rank, data, bytes); }

void Rounds::lend(uint64_t round, const char* data) {
  slot(rank, round).lent = uint64_t(data - t_.segment_->heap(rank)) + 1;
}

void Rounds::lend_or_copy(uint64_t round, const char* data, size_t bytes) {
  lends(data, bytes) ? lend(round, data) : copy(round, data, bytes, 0);
}

const char* Rounds::source(int of, uint64_t round) const {
  SlotHeader& theirs = slot(of, round);
  return theirs.lent == 0 ? theirs.payload() : t_.segment_->heap(of) + theirs.lent - 1;
}

bool Rounds::lent(int of, uint64_t round) const { return slot(of, round).lent != 0; }

void Rounds::seal(uint64_t round) {
  SlotHeader& mine = slot(rank, round);
  describe(mine, said_, print_);
  mine.op_id = id_;
  TPMP_FAILPOINT("collective.before_publish");
  mine.seq.store(round, std::memory_order_release);
  t_.ring_others();
  TPMP_FAILPOINT("collective.after_publish");
}

void Rounds::await(uint64_t round) {
  t_.awaiting_.store(round, std::memory_order_relaxed);
  int next = 0;  // ranks below it have arrived
  const auto arrived = [&] {
    if (on_keeper_) t_.progress();
    for (; next < size; ++next)
      if (slot(next, round).seq.load(std::memory_order_acquire) != round) return Seen::nothing;
    return Seen::all;
  };
  // After the first round all are known to be at it: a sleep would cost more than the wait.
  const int64_t spin_ns = (on_keeper_ ? kKeeperSpinNs : t_.spin_ns_) * (under_way_ ? kUnderWay : 1);
  watched_wait(t_, watch_, spin_ns, arrived);
  under_way_ = true;
  TPMP_FAILPOINT("collective.after_wait");
  check(round);
  for (int r = 0; r < size; ++r) lent_ = lent_ || lent(r, round);
}

// Before any payload is touched. The group's majority is right where there is one, so that the odd rank is named.
void Rounds::check(uint64_t round) {
  const auto agrees = [&](int a, int b) {
    return slot(a, round).fingerprint == slot(b, round).fingerprint && slot(a, round).op_id == slot(b, round).op_id;
  };
  int odd = -1;
  for (int r = 0; r < size && odd < 0; ++r)
    if (!agrees(r, rank)) odd = r;
  if (odd < 0) return;
  const auto votes = [&](int of) {
    int count = 0;
    for (int r = 0; r < size; ++r) count += agrees(r, of);
    return count;
  };
  int right = 0, wrong = -1;
  for (int r = 1; r < size; ++r)
    if (votes(r) > votes(right)) right = r;
  for (int r = 0; r < size; ++r)
    if (!agrees(r, right) && wrong < 0) wrong = r;
  const bool alone = size > 2 && votes(right) == size - 1;
  const Call a = call_in(slot(right, round)), b = call_in(slot(wrong, round));
  fail(alone ? wrong : -1, "rank " + std::to_string(wrong) + " called " + words(b) + ", but rank " +
                               std::to_string(right) + " called " + words(a) + "; they differ in " + differing(a, b));
}

void Rounds::fail(int culprit, const std::string& text) {
  t_.poison(ErrorCode::mismatch, culprit, text);
  watch_.fail_poisoned();
}

}  // namespace tpmp::shm
