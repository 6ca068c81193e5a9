// Collectives in rounds. In a round every rank publishes one slot, then reads the slots of all. Slots alternate: who
// publishes round k + 1 has read round k, so that the slot of round k + 2 is free without another barrier.
#include <cstring>

#include "shm/reduce.hpp"
#include "shm/transport.hpp"

namespace tpmp::shm {

namespace {

constexpr size_t kOneShotBytes = 64 << 10;  // below it one round that reads everything beats two rounds that share it

size_t one_shot_limit(int ranks) { return kOneShotBytes * 2 / size_t(ranks); }

struct Slice {
  size_t begin, count;
};

// The elements of a chunk that `rank` reduces; boundaries on cache lines.
Slice slice_of(size_t numel, int ranks, int rank, size_t element) {
  const size_t grain = kLine / element;
  const size_t each = (numel + size_t(ranks) * grain - 1) / (size_t(ranks) * grain) * grain;
  const size_t begin = std::min(numel, each * size_t(rank));
  return {begin, std::min(each, numel - begin)};
}

}  // namespace

struct ShmTransport::Collective {
  const Call& call;
  const uint64_t print, id;
  CallerWatch watch;
};

void ShmTransport::run_collective(const Call& call, double timeout, const std::function<void(Collective&)>& body) {
  check_usable(call);
  const std::lock_guard<std::mutex> lock(collective_mutex_);
  RankControl& control = segment_->control(rank_);
  const uint64_t seq = record_start(control, call);
  const auto awaited = [this](int peer) {
    return segment_->collective_slot(peer, round_).seq.load(std::memory_order_acquire) != round_;
  };
  Collective c{call, fingerprint(call), ++collective_id_, {*this, call, seq, timeout, awaited}};
  body(c);
  record_done(control, seq);
}

void ShmTransport::all_reduce(void* data, uint64_t numel, DType dtype, ReduceOp op, const std::string& tag,
                              double timeout) {
  const Call call{Kind::all_reduce, dtype, op, -1, numel, tag};
  const size_t element = element_bytes(dtype), chunk = segment_->header().collective_bytes / element;
  char* bytes = static_cast<char*>(data);
  run_collective(call, timeout, [&](Collective& c) {
    if (numel * element <= one_shot_limit(size_)) return one_shot(c, bytes, numel);
    for (size_t at = 0; at < numel; at += chunk) two_shot(c, bytes + at * element, std::min(chunk, numel - at));
  });
}

void ShmTransport::barrier(const std::string& tag, double timeout) {
  const Call call{Kind::barrier, DType::u8, ReduceOp::none, -1, 0, tag};
  run_collective(call, timeout, [&](Collective& c) {
    publish(c, open_round(), 0, 0);
    await_round(c);
  });
}

// Every rank publishes all of its data and reduces all of it.
void ShmTransport::one_shot(Collective& c, char* data, size_t numel) {
  const size_t bytes = numel * element_bytes(c.call.dtype);
  SlotHeader& mine = open_round();
  std::memcpy(mine.payload(), data, bytes);
  publish(c, mine, bytes, 0);
  await_round(c);
  std::array<const void*, kMaxWorld> sources;
  for (int r = 0; r < size_; ++r) sources[r] = segment_->collective_slot(r, round_).payload();
  reduce_tree(sources.data(), size_, numel, c.call.dtype, c.call.op, data);
}

// Reduce-scatter, then all-gather, of one chunk: each rank reduces its slice and publishes the result.
void ShmTransport::two_shot(Collective& c, char* data, size_t numel) {
  const size_t element = element_bytes(c.call.dtype), bytes = numel * element;
  const Slice own = slice_of(numel, size_, rank_, element);
  const size_t begin = own.begin * element, end = begin + own.count * element;
  SlotHeader& inputs = open_round();
  std::memcpy(inputs.payload(), data, begin);  // the own slice stays where it is: nobody else reads it
  std::memcpy(inputs.payload() + end, data + end, bytes - end);
  publish(c, inputs, bytes, 0);
  await_round(c);
  std::array<const void*, kMaxWorld> sources;
  for (int r = 0; r < size_; ++r) sources[r] = segment_->collective_slot(r, round_).payload() + begin;
  sources[rank_] = data + begin;

  SlotHeader& result = open_round();
  reduce_tree(sources.data(), size_, own.count, c.call.dtype, c.call.op, result.payload());
  publish(c, result, end - begin, begin);
  await_round(c);
  for (int r = 0; r < size_; ++r) {
    const Slice slice = slice_of(numel, size_, r, element);
    std::memcpy(data + slice.begin * element, segment_->collective_slot(r, round_).payload(), slice.count * element);
  }
}

SlotHeader& ShmTransport::open_round() { return segment_->collective_slot(rank_, ++round_); }

void ShmTransport::publish(Collective& c, SlotHeader& slot, size_t bytes, size_t offset) {
  describe(slot, c.call, c.print);
  slot.op_id = c.id;
  slot.bytes = bytes;
  slot.offset = offset;
  slot.seq.store(round_, std::memory_order_release);
  ring_others();
}

void ShmTransport::await_round(Collective& c) {
  int next = 0;  // ranks below it have arrived
  caller_wait(*this, c.watch, spin_ns_, [&] {
    for (; next < size_; ++next)
      if (segment_->collective_slot(next, round_).seq.load(std::memory_order_acquire) != round_) return false;
    return true;
  });
  check_round(c);
}

// Before any payload is touched. The group's majority is right where there is one, so that the odd rank is named.
void ShmTransport::check_round(const Collective& c) {
  const auto slot = [&](int rank) -> const SlotHeader& { return segment_->collective_slot(rank, round_); };
  const auto agrees = [&](int a, int b) {
    return slot(a).fingerprint == slot(b).fingerprint && slot(a).op_id == slot(b).op_id;
  };
  int odd = -1;
  for (int r = 0; r < size_ && odd < 0; ++r)
    if (!agrees(r, rank_)) odd = r;
  if (odd < 0) return;
  const auto votes = [&](int rank) {
    int count = 0;
    for (int r = 0; r < size_; ++r) count += agrees(r, rank);
    return count;
  };
  int right = 0, wrong = -1;
  for (int r = 1; r < size_; ++r)
    if (votes(r) > votes(right)) right = r;
  for (int r = 0; r < size_; ++r)
    if (!agrees(r, right) && wrong < 0) wrong = r;
  const bool alone = size_ > 2 && votes(right) == size_ - 1;
  const Call a = call_in(slot(right)), b = call_in(slot(wrong));
  const std::string calls = "rank " + std::to_string(wrong) + " called " + words(b) + ", but rank " +
                            std::to_string(right) + " called " + words(a) + "; they differ in " + differing(a, b);
  poison(ErrorCode::mismatch, alone ? wrong : -1, calls);
  c.watch.glance();
}

}  // namespace tpmp::shm
