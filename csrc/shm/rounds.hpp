// One collective call under way, as a sequence of rounds; see rounds.cpp.
#pragma once

#include <functional>
#include <string>

#include "shm/transport.hpp"

namespace tpmp::shm {

class Rounds {
 public:
  // k counts the rounds of this run, `round` those of the communicator's whole life.
  using Step = std::function<void(uint64_t k, uint64_t round)>;

  Rounds(ShmTransport& transport, const Collective& call, const Call& said, uint64_t seq, double timeout,
         bool on_keeper);

  // `count` rounds (at least one), equal on all ranks; `ahead`: publish one round before the last one is read.
  void run(uint64_t count, bool ahead, const Step& publish, const Step& read);
  void finish();  // returns once nobody reads what this rank lent

  // In publish. A slot is lent or holds copies.
  void copy(uint64_t round, const char* data, size_t bytes, size_t at);
  bool lends(const char* data, size_t bytes) const;  // whether it lies in this rank's heap
  void lend(uint64_t round, const char* data);
  void lend_or_copy(uint64_t round, const char* data, size_t bytes);
  // In read: the data of a rank, in its slot or in its heap.
  const char* source(int of, uint64_t round) const;
  bool lent(int of, uint64_t round) const;
  [[noreturn]] void fail(int culprit, const std::string& text);  // a mismatch that only pairs of ranks can see

  const Collective& call;
  const int rank, size;
  const size_t element, capacity;  // bytes of an element, of a slot's payload
  SlotHeader& slot(int of, uint64_t round) const { return t_.segment_->collective_slot(of, round); }

 private:
  void seal(uint64_t round);
  void await(uint64_t round);
  void check(uint64_t round);

  ShmTransport& t_;
  const Call said_;
  const uint64_t print_, id_;
  const bool on_keeper_;
  CallerWatch watch_;
  bool lent_ = false, under_way_ = false;
};

void carry_out(Rounds& rounds);  // collectives.cpp

}  // namespace tpmp::shm
