// Collectives as NCCL knows them. What it lacks (all_to_all, scatter, gather before 2.28) is a group of messages.
#include "transport.hpp"

namespace tpmp::nccl {

namespace {

RedOp op_of(ReduceOp op) {
  switch (op) {
    case ReduceOp::prod: return kProd;
    case ReduceOp::max: return kMax;
    case ReduceOp::min: return kMin;
    case ReduceOp::avg: return kAvg;
    default: return kSum;
  }
}

const char* kind_name(Kind kind) {
  switch (kind) {
    case Kind::barrier: return "barrier";
    case Kind::all_reduce: return "all_reduce";
    case Kind::reduce: return "reduce";
    case Kind::reduce_scatter: return "reduce_scatter";
    case Kind::all_gather: return "all_gather";
    case Kind::broadcast: return "broadcast";
    case Kind::all_to_all: return "all_to_all";
    case Kind::scatter: return "scatter";
    case Kind::gather: return "gather";
    case Kind::send: return "send";
    case Kind::recv: return "recv";
  }
  return "call";
}

// The parts of a call made of messages: at(r) is where rank r's begins, count(r) its bytes.
class Parts {
 public:
  Parts(const void* base, const std::vector<uint64_t>& splits, uint64_t numel, size_t bytes)
      : base_(static_cast<const char*>(base)), splits_(splits), numel_(numel), bytes_(bytes) {}
  char* at(int rank) const {
    uint64_t before = splits_.empty() ? numel_ * uint64_t(rank) : 0;
    for (int r = 0; !splits_.empty() && r < rank; ++r) before += splits_[size_t(r)];
    return const_cast<char*>(base_) + before * bytes_;
  }
  size_t count(int rank) const { return (splits_.empty() ? numel_ : splits_[size_t(rank)]) * bytes_; }

 private:
  const char* base_;
  const std::vector<uint64_t>& splits_;
  const uint64_t numel_;
  const size_t bytes_;
};

Result messages(const Api& api, const Collective& call, int rank, int size, Comm comm, cuda::Stream stream) {
  const size_t bytes = element_bytes(call.dtype);
  const Parts in(call.input, call.input_splits, call.numel, bytes);
  const Parts out(call.output, call.output_splits, call.numel, bytes);
  const bool gathers = call.kind == Kind::gather, scatters = call.kind == Kind::scatter;
  Result result = api.group_start();
  for (int peer = 0; peer < size; ++peer) {
    // Of a gather every rank sends its whole input to the root; of a scatter the root sends part `peer` to it.
    const bool sends = gathers ? peer == call.root : scatters ? rank == call.root : true;
    const bool receives = gathers ? rank == call.root : scatters ? peer == call.root : true;
    const int from = gathers ? 0 : peer, to = scatters ? 0 : peer;
    if (sends && in.count(from) > 0)
      result = worse(result, api.send(in.at(from), in.count(from), kUint8, peer, comm, stream));
    if (receives && out.count(to) > 0)
      result = worse(result, api.recv(out.at(to), out.count(to), kUint8, peer, comm, stream));
  }
  return worse(result, api.group_end());
}

}  // namespace

Result worse(Result a, Result b) { return a == kSuccess || (a == kInProgress && b != kSuccess) ? b : a; }

Wire wire(DType dtype, bool reduced) {
  if (!reduced) return {kUint8, element_bytes(dtype)};
  switch (dtype) {
    case DType::f64: return {kFloat64, 1};
    case DType::f32: return {kFloat32, 1};
    case DType::bf16: return {kBfloat16, 1};
    case DType::f16: return {kFloat16, 1};
    case DType::i64: return {kInt64, 1};
    case DType::i32: return {kInt32, 1};
    case DType::i8: return {kInt8, 1};
    case DType::u8: return {kUint8, 1};
    default: throw transport_error(ErrorCode::system, -1, "NCCL reduces no elements of this dtype");
  }
}

Result issue(const Api& api, const Collective& c, int rank, int size, Comm comm, cuda::Stream stream) {
  const bool reduced = c.kind == Kind::all_reduce || c.kind == Kind::reduce || c.kind == Kind::reduce_scatter;
  const Wire w = wire(c.dtype, reduced);
  const size_t count = c.numel * w.factor;
  switch (c.kind) {
    case Kind::all_reduce: return api.all_reduce(c.input, c.output, count, w.dtype, op_of(c.op), comm, stream);
    case Kind::reduce: return api.reduce(c.input, c.output, count, w.dtype, op_of(c.op), c.root, comm, stream);
    case Kind::reduce_scatter: return api.reduce_scatter(c.input, c.output, count, w.dtype, op_of(c.op), comm, stream);
    case Kind::all_gather: return api.all_gather(c.input, c.output, count, w.dtype, comm, stream);
    case Kind::broadcast: {
      void* buffer = rank == c.root ? const_cast<void*>(c.input) : c.output;
      return api.broadcast(buffer, buffer, count, w.dtype, c.root, comm, stream);
    }
    default: return messages(api, c, rank, size, comm, stream);
  }
}

bool empty(const Collective& call) {
  for (const auto* splits : {&call.input_splits, &call.output_splits})
    for (const uint64_t count : *splits)
      if (count > 0) return false;
  return call.numel == 0;
}

std::string words(const Collective& call) {
  return std::string(kind_name(call.kind)) + (call.tag.empty() ? "" : " '" + call.tag + "'");
}

}  // namespace tpmp::nccl
