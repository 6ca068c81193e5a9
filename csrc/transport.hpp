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

enum class Kind : uint8_t { all_reduce = 1, barrier, send, recv };
// The last three are for transfers only.
enum class DType : uint8_t { f64 = 1, f32, bf16, f16, i64, i32, u8, i16, i8, boolean };
enum class ReduceOp : uint8_t { none, sum, avg, max, min, prod };

inline size_t element_bytes(DType dtype) {
  switch (dtype) {
    case DType::f64: case DType::i64: return 8;
    case DType::f32: case DType::i32: return 4;
    case DType::bf16: case DType::f16: case DType::i16: return 2;
    case DType::u8: case DType::i8: case DType::boolean: return 1;
  }
  return 0;
}

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

// A posted transfer; its buffer belongs to the transport until wait returned, done is true or the transport is closed.
class Work {
 public:
  virtual ~Work() = default;
  virtual void wait(double timeout) = 0;
  virtual bool done() = 0;
};

class Transport {
 public:
  virtual ~Transport() = default;
  virtual void all_reduce(void* data, uint64_t numel, DType, ReduceOp, const std::string& tag, double timeout) = 0;
  virtual void barrier(const std::string& tag, double timeout) = 0;
  // `waits` promises that wait follows at once: nobody else needs to be woken to move this transfer.
  virtual std::shared_ptr<Work> isend(const void* data, uint64_t numel, DType, int dst, const std::string& tag,
                                      bool waits) = 0;
  virtual std::shared_ptr<Work> irecv(void* data, uint64_t numel, DType, int src, const std::string& tag,
                                      bool waits) = 0;
  // Poisons the group: every rank raises peer_failed with this text, now or at its next call.
  virtual void abort(const std::string& reason) = 0;
  virtual void close() = 0;
  virtual std::vector<std::string> last_ops() = 0;
};

// Called by waits of the caller's thread at each slice; may throw to interrupt the wait. Set once by the bindings.
using InterruptHook = void (*)();
inline InterruptHook interrupt_hook = nullptr;

}  // namespace tpmp
