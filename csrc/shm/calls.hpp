// One call of one rank: its descriptor, the fingerprint that travels in each slot, and the words for it in messages.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "shm/segment.hpp"

namespace tpmp::shm {

struct Call {
  Kind kind;
  DType dtype = DType::u8;
  ReduceOp op = ReduceOp::none;
  int peer = -1;  // of send and recv; the root of a collective that has one
  uint64_t numel = 0;
  std::string_view tag;
};

uint64_t fingerprint(const Call& call);
// A send and the recv that takes it: the fingerprint of what goes over the wire from src to dst.
uint64_t transfer_fingerprint(const Call& call, int dst);

std::string words(const Call& call);                          // all_reduce sum fp32[32] 'a'; recv fp32[8] from rank 0
std::string differing(const Call& a, const Call& b);          // "count, tag"
void describe(SlotHeader& slot, const Call& call, uint64_t print);
Call call_in(const SlotHeader& slot);                         // the tag is its stored beginning

// The ring of last operations in a rank's control block; written by that rank, read by anyone.
uint64_t record_start(RankControl& control, const Call& call);   // returns the call's number
void record_done(RankControl& control, uint64_t seq);
std::string record_words(const RankControl& control, int rank);  // one line: what the rank does and did last
std::string call_words(const RankControl& control, uint64_t seq);  // of one call, where its record still stands

}  // namespace tpmp::shm
