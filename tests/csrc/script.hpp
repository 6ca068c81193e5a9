// A program for ranks: batches of calls, drawn from a seed that all ranks share, with results known beforehand. What a
// rank may decide alone (async or not, lent or copied, the order of waits) comes from a seed of its own.
#pragma once

#include <memory>
#include <random>
#include <stdexcept>
#include <string>

#include "shm/transport.hpp"

namespace tpmp::test {

struct wrong_result : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Script {
 public:
  Script(std::shared_ptr<shm::ShmTransport> transport, int rank, int world, uint64_t seed, double timeout);
  void batch();  // throws wrong_result, or what the transport throws
  int calls() const { return calls_; }
  int transfers() const { return transfers_; }

 private:
  struct Buffer;
  struct Call;
  std::unique_ptr<Call> draw();
  std::unique_ptr<Call> draw_transfer(bool sends, int shift, uint64_t numel, DType dtype);
  void make_buffers(Call& call);
  void check(const Call& call) const;
  Buffer buffer(uint64_t numel, DType dtype);
  double expected(const Call& call, uint64_t at) const;
  int choose(int below) { return int(shared_() % uint64_t(below)); }
  int choose_alone(int below) { return int(own_() % uint64_t(below)); }

  const std::shared_ptr<shm::ShmTransport> transport_;
  const int rank_, world_;
  const double timeout_;
  std::mt19937_64 shared_, own_;
  int calls_ = 0, transfers_ = 0;
};

}  // namespace tpmp::test
