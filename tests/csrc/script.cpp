// What is drawn, what its buffers hold, and what must come out.
#include "script.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

namespace tpmp::test {

namespace {

constexpr DType kDTypes[] = {DType::f32, DType::f64, DType::i32, DType::i64};
constexpr ReduceOp kOps[] = {ReduceOp::sum, ReduceOp::avg, ReduceOp::max, ReduceOp::min, ReduceOp::prod};
constexpr Kind kKinds[] = {Kind::barrier,   Kind::all_reduce, Kind::all_reduce, Kind::reduce,  Kind::reduce_scatter,
                           Kind::all_gather, Kind::broadcast, Kind::all_to_all, Kind::scatter, Kind::gather};

// Multiples of 12 up to 48: sums, products and averages over up to four ranks are exact in every type.
double value(int call, int rank, uint64_t at) {
  const uint64_t hash = (uint64_t(call) * 1000003 + uint64_t(rank) * 7919 + at) * 0x9e3779b97f4a7c15;
  return 12.0 * (double(hash >> 40 & 7) - 3.0);
}

void put(char* data, DType dtype, uint64_t at, double value) {
  switch (dtype) {
    case DType::f32: reinterpret_cast<float*>(data)[at] = float(value); break;
    case DType::f64: reinterpret_cast<double*>(data)[at] = value; break;
    case DType::i32: reinterpret_cast<int32_t*>(data)[at] = int32_t(value); break;
    default: reinterpret_cast<int64_t*>(data)[at] = int64_t(value);
  }
}

double get(const char* data, DType dtype, uint64_t at) {
  switch (dtype) {
    case DType::f32: return reinterpret_cast<const float*>(data)[at];
    case DType::f64: return reinterpret_cast<const double*>(data)[at];
    case DType::i32: return reinterpret_cast<const int32_t*>(data)[at];
    default: return double(reinterpret_cast<const int64_t*>(data)[at]);
  }
}

double reduced(ReduceOp op, double a, double b) {
  switch (op) {
    case ReduceOp::max: return std::max(a, b);
    case ReduceOp::min: return std::min(a, b);
    case ReduceOp::prod: return a * b;
    default: return a + b;
  }
}

// Nothing, a few, about a cache line, one round or two, more than a slot holds.
uint64_t draw_numel(std::mt19937_64& random) {
  constexpr uint64_t kLimits[] = {1, 8, 200, 5'000, 40'000, 300'000};
  const int kinds[] = {0, 1, 1, 2, 2, 2, 3, 3, 4, 5};
  return random() % kLimits[kinds[random() % std::size(kinds)]];
}

}  // namespace

// Ordinary memory, or the transport's.
struct Script::Buffer {
  std::vector<char> own;
  std::shared_ptr<shm::Block> lent;
  char* data() { return lent != nullptr ? lent->data : own.data(); }
};

struct Script::Call {
  int number;
  Collective call;
  int shift = 0;  // of a transfer
  Buffer input, output;
  char* out = nullptr;
  uint64_t result = 0;  // elements of the output
  std::shared_ptr<Work> work;
};

Script::Script(std::shared_ptr<shm::ShmTransport> transport, int rank, int world, uint64_t seed, double timeout)
    : transport_(std::move(transport)), rank_(rank), world_(world), timeout_(timeout), shared_(seed),
      own_(seed * 64 + uint64_t(rank) + 1) {}

Script::Buffer Script::buffer(uint64_t numel, DType dtype) {
  const size_t bytes = numel * element_bytes(dtype);
  Buffer made;
  if (choose_alone(3) == 0)
    made.lent = transport_->allocate(bytes);
  else
    made.own.resize(bytes + 1);
  return made;
}

std::unique_ptr<Script::Call> Script::draw() {
  auto drawn = std::make_unique<Call>();
  Collective& call = drawn->call;
  drawn->number = calls_++;
  call.kind = kKinds[choose(std::size(kKinds))];
  call.dtype = kDTypes[choose(std::size(kDTypes))];
  const bool reduces = call.kind >= Kind::all_reduce && call.kind <= Kind::reduce_scatter;
  const bool floats = call.dtype == DType::f32 || call.dtype == DType::f64;
  if (reduces) call.op = kOps[choose(std::size(kOps))];
  if (call.op == ReduceOp::avg && !floats) call.op = ReduceOp::sum;
  call.root = choose(world_);
  const bool rooted = call.kind == Kind::reduce || call.kind == Kind::broadcast || call.kind == Kind::scatter ||
                      call.kind == Kind::gather;
  if (!rooted) call.root = -1;
  if (call.kind != Kind::barrier) call.numel = draw_numel(shared_);
  call.tag = "call " + std::to_string(drawn->number);
  if (call.kind == Kind::all_to_all && choose(2) == 0) {  // rank i has (i + 2 j) % 5 parts of numel for rank j
    for (int peer = 0; peer < world_; ++peer) {
      call.input_splits.push_back(call.numel * uint64_t((rank_ + 2 * peer) % 5));
      call.output_splits.push_back(call.numel * uint64_t((peer + 2 * rank_) % 5));
    }
    call.numel = 0;
  }
  make_buffers(*drawn);
  return drawn;
}

void Script::make_buffers(Call& drawn) {
  Collective& call = drawn.call;
  const auto total = [](const std::vector<uint64_t>& splits) {
    uint64_t sum = 0;
    for (const uint64_t split : splits) sum += split;
    return sum;
  };
  const bool root = call.root < 0 || call.root == rank_;
  const uint64_t all = call.numel * uint64_t(world_);
  uint64_t given = call.numel, taken = call.numel;
  switch (call.kind) {
    case Kind::barrier: return;
    case Kind::all_reduce: break;
    case Kind::reduce: taken = root ? taken : 0; break;
    case Kind::reduce_scatter: given = all; break;
    case Kind::all_gather: taken = all; break;
    case Kind::broadcast: given = root ? given : 0; taken = root ? 0 : taken; break;
    case Kind::all_to_all:
      given = call.input_splits.empty() ? all : total(call.input_splits);
      taken = call.output_splits.empty() ? all : total(call.output_splits);
      break;
    case Kind::scatter: given = root ? all : 0; break;
    default: taken = root ? all : 0;
  }
  drawn.input = buffer(given, call.dtype);
  for (uint64_t i = 0; i < given; ++i) put(drawn.input.data(), call.dtype, i, value(drawn.number, rank_, i));
  const bool in_place = call.kind == Kind::all_reduce && choose_alone(2) == 0;
  if (!in_place) drawn.output = buffer(taken, call.dtype);
  drawn.out = in_place ? drawn.input.data() : drawn.output.data();
  drawn.result = taken;
  const bool gives = call.kind != Kind::broadcast && call.kind != Kind::scatter;
  if (gives || root) call.input = drawn.input.data();
  const bool takes = call.kind != Kind::reduce && call.kind != Kind::gather;
  if (takes || root) call.output = call.kind == Kind::broadcast ? (root ? drawn.input.data() : drawn.out) : drawn.out;
}

std::unique_ptr<Script::Call> Script::draw_transfer(bool sends, int shift, uint64_t numel, DType dtype) {
  auto drawn = std::make_unique<Call>();
  drawn->number = calls_;
  drawn->shift = shift;
  drawn->call.kind = sends ? Kind::send : Kind::recv;
  drawn->call.dtype = dtype;
  drawn->call.numel = numel;
  drawn->input = buffer(numel, dtype);
  drawn->out = drawn->input.data();
  const std::string tag = "shift " + std::to_string(shift);
  if (sends) {
    for (uint64_t i = 0; i < numel; ++i) put(drawn->out, dtype, i, value(drawn->number + shift, rank_, i));
    drawn->work = transport_->isend({drawn->out, numel, dtype, (rank_ + shift) % world_, tag}, false);
  } else {
    drawn->result = numel;
    drawn->work = transport_->irecv({drawn->out, numel, dtype, (rank_ + world_ - shift) % world_, tag}, false);
  }
  ++transfers_;
  return drawn;
}

double Script::expected(const Call& drawn, uint64_t at) const {
  const Collective& call = drawn.call;
  const int number = drawn.number;
  switch (call.kind) {
    case Kind::recv: return value(number + drawn.shift, (rank_ + world_ - drawn.shift) % world_, at);
    case Kind::broadcast: return value(number, call.root, at);
    case Kind::all_gather: case Kind::gather: return value(number, int(at / call.numel), at % call.numel);
    case Kind::scatter: return value(number, call.root, at + uint64_t(rank_) * call.numel);
    case Kind::all_to_all: {
      if (call.output_splits.empty())
        return value(number, int(at / call.numel), at % call.numel + uint64_t(rank_) * call.numel);
      int from = 0;
      for (; at >= call.output_splits[size_t(from)]; ++from) at -= call.output_splits[size_t(from)];
      // What that rank has for those before this one; its splits follow the same rule as these.
      const uint64_t unit = call.output_splits[size_t(from)] / uint64_t((from + 2 * rank_) % 5);
      for (int before = 0; before < rank_; ++before) at += unit * uint64_t((from + 2 * before) % 5);
      return value(number, from, at);
    }
    default: break;
  }
  const uint64_t index = call.kind == Kind::reduce_scatter ? at + uint64_t(rank_) * call.numel : at;
  double sum = value(number, 0, index);
  for (int rank = 1; rank < world_; ++rank) sum = reduced(call.op, sum, value(number, rank, index));
  return call.op == ReduceOp::avg ? sum / world_ : sum;
}

void Script::check(const Call& drawn) const {
  for (uint64_t i = 0; i < drawn.result; ++i) {
    const double got = get(drawn.out, drawn.call.dtype, i), right = expected(drawn, i);
    if (got != right)
      throw wrong_result("rank " + std::to_string(rank_) + ": call " + std::to_string(drawn.number) + " of kind " +
                         std::to_string(int(drawn.call.kind)) + ", element " + std::to_string(i) + " of " +
                         std::to_string(drawn.result) + ": expected " + std::to_string(right) + ", got " +
                         std::to_string(got));
  }
}

// Some transfers and some collectives, blocking or posted; what is posted is waited for in any order.
void Script::batch() {
  std::vector<std::unique_ptr<Call>> open;
  for (int n = choose(3); n > 0; --n) {
    const int shift = 1 + choose(world_ - 1);
    const uint64_t numel = draw_numel(shared_);
    const DType dtype = kDTypes[choose(std::size(kDTypes))];
    open.push_back(draw_transfer(true, shift, numel, dtype));
    open.push_back(draw_transfer(false, shift, numel, dtype));
  }
  for (int n = 1 + choose(4); n > 0; --n) {
    std::unique_ptr<Call> drawn = draw();
    if (choose_alone(2) == 0) {
      drawn->work = transport_->post(drawn->call, timeout_);
      open.push_back(std::move(drawn));
    } else {
      transport_->run(drawn->call, timeout_);
      check(*drawn);
    }
  }
  std::shuffle(open.begin(), open.end(), own_);
  for (const auto& drawn : open) {
    drawn->work->wait(timeout_);
    check(*drawn);
  }
}

}  // namespace tpmp::test
