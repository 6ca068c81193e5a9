// Memory inside the segment for one rank's tensors: what lies here is lent to peers where it stands, not copied in.
// Allocation is a matter of this rank alone; peers map the heap when they first meet a reference into it.
#pragma once

#include <map>
#include <memory>
#include <mutex>

#include "shm/segment.hpp"

namespace tpmp::shm {

class Heap {
 public:
  Heap(std::shared_ptr<Segment> segment, int rank) : segment_(std::move(segment)), rank_(rank) {}

  // First fit, aligned to a page; transport_error{system} where memory is short. The content is arbitrary.
  char* allocate(size_t bytes);
  void release(char* data);

 private:
  const std::shared_ptr<Segment> segment_;
  const int rank_;
  std::mutex mutex_;
  uint64_t top_ = 0;                     // of what was ever allocated, and so reserved
  std::map<uint64_t, uint64_t> free_;    // offset -> bytes, neighbours merged
  std::map<uint64_t, uint64_t> taken_;
};

// One allocation, released with its last owner; it keeps the segment mapped for as long.
struct Block {
  Block(std::shared_ptr<Heap> heap, size_t bytes) : heap(std::move(heap)), bytes(bytes), data(this->heap->allocate(bytes)) {}
  ~Block() { heap->release(data); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  const std::shared_ptr<Heap> heap;
  const size_t bytes;
  char* const data;
};

}  // namespace tpmp::shm
