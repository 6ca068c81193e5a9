// A free list over one rank's part of the segment. Freed memory is used again by this rank, and goes back to the kernel
// with the segment.
#include "shm/heap.hpp"

#include <iterator>

namespace tpmp::shm {

char* Heap::allocate(size_t bytes) {
  const uint64_t wanted = (std::max<uint64_t>(bytes, 1) + kPage - 1) / kPage * kPage;
  const std::lock_guard<std::mutex> lock(mutex_);
  char* const first = segment_->heap(rank_);
  for (auto [offset, length] : free_) {
    if (length < wanted) continue;
    free_.erase(offset);
    if (length > wanted) free_[offset + wanted] = length - wanted;
    taken_[offset] = wanted;
    return first + offset;
  }
  const uint64_t offset = top_;
  if (wanted > segment_->header().heap_bytes - top_)
    throw transport_error(ErrorCode::system, -1, "comm.empty of " + std::to_string(bytes >> 20) + " MiB: " +
                          std::to_string(top_ >> 20) + " MiB are taken and this host has " +
                          std::to_string(segment_->header().heap_bytes >> 20) + " MiB; free tensors first");
  segment_->reserve(rank_, offset, wanted);
  top_ += wanted;
  taken_[offset] = wanted;
  return first + offset;
}

void Heap::release(char* data) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto block = taken_.find(uint64_t(data - segment_->heap(rank_)));
  auto [offset, length] = *block;
  taken_.erase(block);
  const auto after = free_.find(offset + length);
  if (after != free_.end()) {
    length += after->second;
    free_.erase(after);
  }
  const auto next = free_.lower_bound(offset);
  if (next != free_.begin()) {
    const auto before = std::prev(next);
    if (before->first + before->second == offset) {
      before->second += length;
      return;
    }
  }
  free_[offset] = length;
}

}  // namespace tpmp::shm
