// What every transport offers to Python: collectives, point-to-point transfers, abort, and one error type.
// Buffers are plain pointers that the caller keeps alive; ranks are group ranks; timeouts are seconds.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <vector>

namespace tpmp {

enum class Kind : uint8_t {
  barrier = 1, all_reduce, reduce, reduce_scatter, all_gather, broadcast, all_to_all, scatter, gather, send, recv
};
// Those from `boolean` on are carried, but not reduced.
enum class DType : uint8_t {
  f64 = 1, f32, bf16, f16, i64, i32, i16, i8, u8, boolean, u16, u32, u64, c64, c128, f8_e4m3, f8_e5m2
};
enum class ReduceOp : uint8_t { none, sum, avg, max, min, prod };

inline size_t element_bytes(DType dtype) {
  switch (dtype) {
    case DType::c128: return 16;
    case DType::f64: case DType::i64: case DType::u64: case DType::c64: return 8;
    case DType::f32: case DType::i32: case DType::u32: return 4;
    case DType::bf16: case DType::f16: case DType::i16: case DType::u16: return 2;
    default: return 1;
  }
}

// One collective call of one rank. `numel` is what must agree between the ranks: elements that a rank contributes to or
// takes from the others (the whole of an all_reduce, one part of a reduce_scatter), 0 with splits. Dense buffers.
struct Collective {
  Kind kind;
  DType dtype = DType::u8;
  ReduceOp op = ReduceOp::none;
  int root = -1;
  uint64_t numel = 0;
  const void* input = nullptr;  // null where this rank contributes nothing
  void* output = nullptr;       // null where this rank gets nothing; may be the input
  std::string tag;
  std::vector<uint64_t> input_splits, output_splits;  // elements for each rank, of an all_to_all in uneven parts
  uintptr_t stream = 0;  // a GPU's: the CUDA stream on which the buffers are ready
};

// One message to or from `peer`; a send only reads its buffer.
struct Message {
  void* data = nullptr;
  uint64_t numel = 0;
  DType dtype = DType::u8;
  int peer = -1;
  std::string tag;
  uintptr_t stream = 0;  // as above
};

enum class ErrorCode : uint8_t { peer_died = 1, peer_failed, mismatch, timeout, closed, system };

// Thrown once, translated once (bindings.cpp), never printed. culprit is a group rank or -1.
class transport_error : public std::exception {
 public:
  transport_error(ErrorCode code, int culprit, std::string message)
      : code(code), culprit(culprit), message_(std::move(message)) {}
  const char* what() const noexcept override { return message_.c_str(); }

  const ErrorCode code;
  const int culprit;

 private:
  std::string message_;
};

// A posted call; its buffers belong to the transport until wait returned, done is true or the transport is closed.
class Work {
 public:
  virtual ~Work() = default;
  virtual void wait(double timeout) = 0;
  virtual bool done() = 0;
};

class Transport {
 public:
  virtual ~Transport() = default;
  // Blocking; collectives take place in the order of the calls, posted ones among them.
  virtual void run(const Collective&, double timeout) = 0;
  // Returns at once; `timeout` starts when its turn comes.
  virtual std::shared_ptr<Work> post(Collective, double timeout) = 0;
  // `waits` promises that wait follows at once: nobody else needs to be woken to move this transfer.
  virtual std::shared_ptr<Work> isend(const Message&, bool waits) = 0;
  virtual std::shared_ptr<Work> irecv(const Message&, bool waits) = 0;
  // Poisons the group: every rank raises peer_failed with this text, now or at its next call.
  virtual void abort(const std::string& reason) = 0;
  virtual void close() = 0;
  virtual std::vector<std::string> last_ops() = 0;
};

// Called by waits of the caller's thread at each slice; may throw to interrupt the wait. Set once by the bindings.
using InterruptHook = void (*)();
inline InterruptHook interrupt_hook = nullptr;

}  // namespace tpmp
