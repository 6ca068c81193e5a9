// Point-to-point: messages of an ordered pair stream in pieces through the pair's ring, in the order of posting. A
// piece may be written while the receiver has consumed all but the ring's length of those before it (its credit).
// A long message is one piece where it need not pass through the ring: lent, if it lies in the sender's heap (the piece
// says where, and is done when it was taken), or put straight into the buffer of a posted receive that lies in the
// receiver's heap. What is longer than the ring, and so cannot be over before its receive is posted, waits for that.
#include <cstring>

#include "failpoint.hpp"
#include "shm/transport.hpp"

namespace tpmp::shm {

namespace {

constexpr size_t kLeastPiece = 16 << 10;

}  // namespace

struct Transfer {
  std::string tag;
  Call call;              // call.tag views `tag`
  char* data;
  size_t bytes;
  uint64_t print;
  uint64_t seq;           // number in the record of operations
  uint64_t message = 0;   // number in its pair, from 1
  uint64_t piece = 0;     // of a lent send
  size_t moved = 0;
  std::atomic<bool> done{false};
};

class ShmWork final : public Work {
 public:
  ShmWork(std::shared_ptr<ShmTransport> transport, std::shared_ptr<Transfer> transfer)
      : transport_(std::move(transport)), transfer_(std::move(transfer)) {}
  void wait(double timeout) override { transport_->await(*transfer_, timeout); }
  bool done() override { return transport_->settled(*transfer_); }

 private:
  const std::shared_ptr<ShmTransport> transport_;
  const std::shared_ptr<Transfer> transfer_;
};

std::shared_ptr<Work> ShmTransport::isend(const Message& m, bool waits) {
  return post({Kind::send, m.dtype, ReduceOp::none, m.peer, m.numel, m.tag}, static_cast<char*>(m.data), waits);
}

std::shared_ptr<Work> ShmTransport::irecv(const Message& m, bool waits) {
  return post({Kind::recv, m.dtype, ReduceOp::none, m.peer, m.numel, m.tag}, static_cast<char*>(m.data), waits);
}

std::shared_ptr<Work> ShmTransport::post(const Call& call, char* data, bool waits) {
  check_usable(call);
  note_caller();
  auto transfer = std::make_shared<Transfer>();
  transfer->tag = call.tag;
  transfer->call = call;
  transfer->call.tag = transfer->tag;
  transfer->data = data;
  transfer->bytes = call.numel * element_bytes(call.dtype);
  transfer->print = transfer_fingerprint(call, call.kind == Kind::send ? call.peer : rank_);
  transfer->seq = record_start(segment_->control(rank_), call);
  {
    const std::lock_guard<std::mutex> lock(progress_mutex_);
    const bool sends = call.kind == Kind::send;
    (sends ? out_ : in_)[call.peer].queue.push_back(transfer);
    auto& posted = sends ? segment_->pair(rank_, call.peer).sends : segment_->pair(call.peer, rank_).recvs;
    transfer->message = posted.load(std::memory_order_relaxed) + 1;
    if (!sends) offer(*transfer);
    posted.store(transfer->message, std::memory_order_release);
    pending_.fetch_add(1);
  }
  if (call.kind == Kind::recv && outlasts_ring(*transfer)) ring(doorbell(call.peer));
  progress();
  if (!waits && !transfer->done.load()) wake_keeper();
  return std::make_shared<ShmWork>(shared_from_this(), transfer);
}

void ShmTransport::await(const Transfer& transfer, double timeout) {
  if (transfer.done.load(std::memory_order_acquire)) return;
  check_usable(transfer.call);
  CallerWatch watch(*this, transfer.call, transfer.seq, transfer.message, timeout,
                    [&](int peer) { return peer == transfer.call.peer; });
  struct Inline {
    ShmTransport& t;
    explicit Inline(ShmTransport& t) : t(t) { t.inline_waiters_.fetch_add(1); }
    ~Inline() {
      t.inline_waiters_.fetch_sub(1);
      if (t.pending_.load() == 0) return;
      if (t.poisoned()) t.release_buffers();
      t.wake_keeper();  // what is left to move is the keeper's again
    }
  };
  const Inline here(*this);
  watched_wait(*this, watch, spin_ns_, [&] {
    const bool moved = progress();
    return transfer.done.load(std::memory_order_acquire) ? Seen::all : moved ? Seen::some : Seen::nothing;
  });
}

bool ShmTransport::settled(const Transfer& transfer) {
  if (transfer.done.load(std::memory_order_acquire) || forked()) return true;
  if (!poisoned() && !closed_.load()) return false;
  release_buffers();
  return true;
}

// In a failed or closed group nobody begins to move a transfer; who is in the middle of it holds this lock.
void ShmTransport::release_buffers() { const std::lock_guard<std::mutex> lock(progress_mutex_); }

bool ShmTransport::progress() {
  if (pending_.load() == 0) return false;
  const std::lock_guard<std::mutex> lock(progress_mutex_);
  bool moved = false;
  try {
    for (int peer = 0; peer < size_; ++peer) {
      if (poisoned() || closed_.load()) return false;  // the buffers are their owners' again
      const bool pushed = !(out_[peer].queue.empty() && out_[peer].lent.empty()) && push(peer);
      const bool pulled = !in_[peer].queue.empty() && pull(peer);
      if (pushed || pulled) ring(doorbell(peer));
      moved = moved || pushed || pulled;
    }
  } catch (const std::exception& error) {
    abort(error.what());  // while nobody else can go on in the middle of a piece
    throw;
  }
  return moved;
}

bool ShmTransport::in_one_piece(const Transfer& transfer) const {
  return transfer.bytes > segment_->header().p2p_bytes && segment_->in_heap(rank_, transfer.data, transfer.bytes);
}

bool ShmTransport::outlasts_ring(const Transfer& transfer) const {
  return transfer.bytes > segment_->header().p2p_bytes * segment_->header().p2p_slots;
}

// Shows the sender where a receive's buffer lies. The message that had this landing before is done when so few wait.
// After a fault a sender may still be writing there: a failed group's heap is not used again (allocate).
void ShmTransport::offer(const Transfer& recv) {
  const int src = recv.call.peer;
  if (!in_one_piece(recv) || in_[src].queue.size() > kLandings) return;
  Landing& landing = segment_->pair(src, rank_).landings[recv.message % kLandings];
  landing.place = uint64_t(recv.data - segment_->heap(rank_));
  landing.bytes = recv.bytes;
  landing.fingerprint = recv.print;
  landing.message.store(recv.message, std::memory_order_release);
}

// Where a send may be put whole; null where the receive is not posted yet, lies elsewhere, or is of another message,
// which the receiver then finds in the slot's header.
char* ShmTransport::landing_of(const Transfer& send) {
  const int dst = send.call.peer;
  const Landing& landing = segment_->pair(rank_, dst).landings[send.message % kLandings];
  if (send.moved > 0 || landing.message.load(std::memory_order_acquire) != send.message) return nullptr;
  if (landing.fingerprint != send.print || landing.bytes != send.bytes) return nullptr;
  return segment_->heap(dst) + landing.place;
}

// A short message goes in several pieces, too, so that the receiver takes the first while the next is written.
size_t ShmTransport::piece_bytes(size_t message_bytes) const {
  const size_t fourth = (message_bytes / 4 + kLine - 1) / kLine * kLine;
  return std::min<size_t>(segment_->header().p2p_bytes, std::max(kLeastPiece, fourth));
}

// Writes as many pieces as there is credit for; true where at least one was published.
bool ShmTransport::push(int dst) {
  Lane& lane = out_[dst];
  const SegmentHeader& h = segment_->header();
  const uint64_t consumed = segment_->pair(rank_, dst).consumed.load(std::memory_order_acquire);
  for (size_t left = lane.lent.size(); left > 0 && lane.lent.front()->piece < consumed; --left) finish(lane.lent);
  const uint64_t received = segment_->pair(rank_, dst).recvs.load(std::memory_order_acquire);  // posted
  const uint64_t first = lane.piece, end = consumed + h.p2p_slots;
  for (; lane.piece < end && !lane.queue.empty(); ++lane.piece) {
    Transfer& transfer = *lane.queue.front();
    const bool lent = in_one_piece(transfer);
    if (!lent && outlasts_ring(transfer) && received < transfer.message) break;
    SlotHeader& slot = segment_->p2p_slot(rank_, dst, lane.piece);
    describe(slot, transfer.call, transfer.print);
    slot.op_id = transfer.message;
    slot.offset = transfer.moved;
    char* const landing = lent ? nullptr : landing_of(transfer);
    slot.lent = lent ? uint64_t(transfer.data - segment_->heap(rank_)) + 1 : landing != nullptr ? kPut : 0;
    slot.bytes = slot.lent ? transfer.bytes : std::min(piece_bytes(transfer.bytes), transfer.bytes - transfer.moved);
    if (!lent) std::memcpy(landing ? landing : slot.payload(), transfer.data + transfer.moved, slot.bytes);
    transfer.moved += slot.bytes;
    TPMP_FAILPOINT("transfer.before_publish");
    slot.seq.store(lane.piece + 1, std::memory_order_release);
    TPMP_FAILPOINT("transfer.after_publish");
    if (lent) {
      transfer.piece = lane.piece;
      lane.lent.push_back(lane.queue.front());
      lane.queue.pop_front();
    } else if (transfer.moved == transfer.bytes) {
      finish(lane.queue);
    }
  }
  return lane.piece != first;
}

// Takes as many pieces as have arrived; true where at least one credit was given back.
bool ShmTransport::pull(int src) {
  Lane& lane = in_[src];
  const uint64_t first = lane.piece, end = first + segment_->header().p2p_slots;
  for (; lane.piece < end && !lane.queue.empty(); ++lane.piece) {
    SlotHeader& slot = segment_->p2p_slot(src, rank_, lane.piece);
    if (slot.seq.load(std::memory_order_acquire) != lane.piece + 1) break;
    Transfer& transfer = *lane.queue.front();
    if (!accept(transfer, slot)) break;
    const char* from = slot.lent == 0 ? slot.payload() : segment_->heap(src) + slot.lent - 1;
    if (slot.lent != kPut) std::memcpy(transfer.data + transfer.moved, from, slot.bytes);
    transfer.moved += slot.bytes;
    TPMP_FAILPOINT("transfer.before_credit");
    segment_->pair(src, rank_).consumed.store(lane.piece + 1, std::memory_order_release);
    TPMP_FAILPOINT("transfer.after_credit");
    if (transfer.moved == transfer.bytes) finish(lane.queue);
  }
  return lane.piece != first;
}

// Checks the header before the payload is touched; poisons and refuses where it is not what this recv expects.
bool ShmTransport::accept(const Transfer& transfer, const SlotHeader& slot) {
  if (slot.fingerprint == transfer.print && slot.op_id == transfer.message && slot.offset == transfer.moved &&
      slot.bytes <= transfer.bytes - transfer.moved)
    return true;
  const Call sent = call_in(slot);
  poison(ErrorCode::mismatch, -1,
         "rank " + std::to_string(transfer.call.peer) + " called " + words(sent) + ", but rank " +
             std::to_string(rank_) + " called " + words(transfer.call) + "; they differ in " +
             differing(sent, transfer.call));
  return false;
}

void ShmTransport::finish(std::deque<std::shared_ptr<Transfer>>& queue) {
  const std::shared_ptr<Transfer> transfer = std::move(queue.front());
  queue.pop_front();
  record_done(segment_->control(rank_), transfer->seq);
  pending_.fetch_sub(1);
  transfer->done.store(true, std::memory_order_release);
}

}  // namespace tpmp::shm
