// Fingerprints, records and their words.
#include "shm/calls.hpp"

#include <cstdio>
#include <cstring>

#include "shm/wait.hpp"

namespace tpmp::shm {

namespace {

const char* const kKinds[] = {"?",         "barrier",    "all_reduce", "reduce", "reduce_scatter", "all_gather",
                              "broadcast", "all_to_all", "scatter",    "gather", "send",           "recv"};
const char* const kDTypes[] = {"?",      "fp64",   "fp32",   "bf16",      "fp16",       "int64",   "int32",   "int16",   "int8",
                               "uint8",  "bool",   "uint16", "uint32",    "uint64",     "complex64", "complex128",
                               "fp8 e4m3", "fp8 e5m2"};
const char* const kOps[] = {"", "sum", "avg", "max", "min", "prod"};

uint64_t mix(uint64_t hash, uint64_t value) {  // one round of a multiply-xorshift hash
  hash = (hash ^ value) * 0x9e3779b97f4a7c15;
  return hash ^ hash >> 29;
}

uint64_t pack_what(const Call& call, bool done) {
  return uint64_t(call.kind) | uint64_t(call.dtype) << 8 | uint64_t(call.op) << 16 | uint64_t(done) << 24 |
         uint64_t(uint32_t(call.peer)) << 32;
}

std::string number(const char* format, double value) {
  char text[32];
  std::snprintf(text, sizeof text, format, value);
  return text;
}

// A consistent enough copy of a record: the sequence number is read before and after.
struct Copied {
  uint64_t seq;
  bool done;
  int64_t start_ns, end_ns;
  char tag[33];
  Call call;
};

bool read_record(const OpRecord& record, uint64_t seq, Copied& copied) {
  copied.seq = record.seq.load(std::memory_order_acquire);
  const uint64_t what = record.what.load(std::memory_order_acquire);
  copied.done = what >> 24 & 1;
  copied.start_ns = record.start_ns.load(std::memory_order_relaxed);
  copied.end_ns = record.end_ns.load(std::memory_order_relaxed);
  for (int i = 0; i < 4; ++i) {
    const uint64_t word = record.tag[i].load(std::memory_order_relaxed);
    std::memcpy(copied.tag + 8 * i, &word, 8);
  }
  copied.tag[32] = 0;
  copied.call = {Kind(what & 0xff), DType(what >> 8 & 0xff), ReduceOp(what >> 16 & 0xff), int(int32_t(what >> 32)),
               record.numel.load(std::memory_order_relaxed), {}};
  return copied.seq == seq && record.seq.load(std::memory_order_acquire) == seq;
}

std::string numbered_words(const Copied& copied) {
  Call call = copied.call;
  call.tag = copied.tag;
  return words(call) + " (call #" + std::to_string(copied.seq) + ")";
}

}  // namespace

uint64_t fingerprint(const Call& call) {
  uint64_t hash = mix(0x7470, pack_what(call, false));
  hash = mix(mix(hash, call.numel), call.tag.size());
  for (size_t at = 0; at < call.tag.size(); at += 8) {
    uint64_t word = 0;
    std::memcpy(&word, call.tag.data() + at, std::min<size_t>(8, call.tag.size() - at));
    hash = mix(hash, word);
  }
  return hash;
}

uint64_t transfer_fingerprint(const Call& call, int dst) {
  Call wire = call;
  wire.kind = Kind::send;
  wire.peer = dst;
  return fingerprint(wire);
}

std::string words(const Call& call) {
  std::string text = kKinds[size_t(call.kind) < std::size(kKinds) ? size_t(call.kind) : 0];
  if (call.op != ReduceOp::none && size_t(call.op) < std::size(kOps)) text += std::string(" ") + kOps[size_t(call.op)];
  if (call.kind != Kind::barrier)
    text += std::string(" ") + kDTypes[size_t(call.dtype) < std::size(kDTypes) ? size_t(call.dtype) : 0] + "[" +
            std::to_string(call.numel) + "]";
  if (call.kind < Kind::send && call.peer >= 0) text += " of root " + std::to_string(call.peer);
  if (call.kind == Kind::send) text += " to rank " + std::to_string(call.peer);
  if (call.kind == Kind::recv) text += " from rank " + std::to_string(call.peer);
  if (!call.tag.empty()) text += " '" + std::string(call.tag) + "'";
  return text;
}

std::string differing(const Call& a, const Call& b) {
  std::string fields;
  const auto add = [&](bool differs, const char* name) {
    if (differs) fields += fields.empty() ? name : std::string(", ") + name;
  };
  const bool transfers = a.kind >= Kind::send && b.kind >= Kind::send;
  add(a.kind != b.kind && !transfers, "kind");
  add(a.dtype != b.dtype, "dtype");
  add(a.numel != b.numel, "count");
  add(a.op != b.op, "reduce op");
  add(a.peer != b.peer && !transfers, "root");
  add(a.tag.substr(0, kTagBytes) != b.tag.substr(0, kTagBytes), "tag");
  return fields.empty() ? "tag, beyond its first bytes" : fields;
}

void describe(SlotHeader& slot, const Call& call, uint64_t print) {
  slot.fingerprint = print;
  slot.numel = call.numel;
  slot.peer = call.peer;
  slot.kind = uint8_t(call.kind);
  slot.dtype = uint8_t(call.dtype);
  slot.redop = uint8_t(call.op);
  slot.tag_bytes = uint32_t(std::min(call.tag.size(), kTagBytes));
  std::memcpy(slot.tag, call.tag.data(), slot.tag_bytes);
}

Call call_in(const SlotHeader& slot) {
  return {Kind(slot.kind), DType(slot.dtype), ReduceOp(slot.redop), slot.peer, slot.numel,
          std::string_view(slot.tag, std::min<size_t>(slot.tag_bytes, kTagBytes))};
}

uint64_t record_start(RankControl& control, const Call& call) {
  const uint64_t seq = control.op_count.fetch_add(1, std::memory_order_relaxed) + 1;
  OpRecord& record = control.ops[seq % kOpRecords];
  uint64_t tag[4] = {};
  std::memcpy(tag, call.tag.data(), std::min(call.tag.size(), sizeof tag));
  record.seq.store(0, std::memory_order_release);
  record.numel.store(call.numel, std::memory_order_relaxed);
  record.start_ns.store(now_ns(), std::memory_order_relaxed);
  for (int i = 0; i < 4; ++i) record.tag[i].store(tag[i], std::memory_order_relaxed);
  record.what.store(pack_what(call, false), std::memory_order_relaxed);
  record.seq.store(seq, std::memory_order_release);
  return seq;
}

void record_done(RankControl& control, uint64_t seq) {
  OpRecord& record = control.ops[seq % kOpRecords];
  if (record.seq.load(std::memory_order_acquire) != seq) return;  // a transfer outlived by 64 later calls
  record.end_ns.store(now_ns(), std::memory_order_relaxed);
  record.what.fetch_or(1u << 24, std::memory_order_release);
}

std::string call_words(const RankControl& control, uint64_t seq) {
  Copied copied;
  if (!read_record(control.ops[seq % kOpRecords], seq, copied)) return "call #" + std::to_string(seq);
  return numbered_words(copied);
}

std::string record_words(const RankControl& control, int rank) {
  const uint64_t count = control.op_count.load(std::memory_order_acquire);
  const uint64_t oldest = count > kOpRecords ? count - kOpRecords + 1 : 1;
  const int64_t now = now_ns();
  std::string line = "rank " + std::to_string(rank) + " pid " + std::to_string(control.pid.load());
  std::string open, last = "nothing done yet";
  int opened = 0;
  for (uint64_t seq = oldest; seq <= count; ++seq) {
    Copied copied;
    if (!read_record(control.ops[seq % kOpRecords], seq, copied)) continue;
    if (copied.done) {
      last = "last done " + numbered_words(copied) + number(" %.1f s ago", double(now - copied.end_ns) * 1e-9);
    } else if (++opened <= 3) {
      open += (opened > 1 ? " and " : " in ") + numbered_words(copied) +
              number(" for %.1f s", double(now - copied.start_ns) * 1e-9);
    }
  }
  if (opened > 3) open += " and " + std::to_string(opened - 3) + " more";
  if (control.closed.load(std::memory_order_acquire) != 0) line += " closed its communicator,";
  return line + ":" + (open.empty() ? " in no call" : open) + "; " + last;
}

}  // namespace tpmp::shm
