// Creation and mapping of the segment: memfd, reserved in full, sealed, so that no reader can meet a missing page.
#include "shm/segment.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <new>

namespace tpmp::shm {

namespace {

constexpr uint64_t kHuge = 2 << 20;  // a huge page
constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

struct Sizes {
  uint64_t collective_bytes, p2p_bytes, p2p_slots;
};

// A collective's four slots stay in a core's cache (measured: 128 KiB beats 512 KiB by 1.5 at 16 MiB and two ranks). A
// pair of ranks has its own ring, so that 64 ranks (4,096 pairs) stay below 700 MiB.
Sizes sizes_for(int world) {
  constexpr uint64_t kCollectiveBytes = 128 << 10;
  if (world <= 4) return {kCollectiveBytes, 128 << 10, 4};
  if (world <= 16) return {kCollectiveBytes, 64 << 10, 4};
  return {kCollectiveBytes, 32 << 10, 4};
}

uint64_t round_up(uint64_t value, uint64_t to) { return (value + to - 1) / to * to; }

Layout plan(int world, const uint8_t nonce[16]) {
  const Sizes sizes = sizes_for(world);
  Layout h{};
  h.magic = kMagic;
  std::strncpy(h.abi, TPMP_ABI, sizeof h.abi - 1);
  std::memcpy(h.nonce, nonce, sizeof h.nonce);
  h.world = uint32_t(world);
  h.op_records = kOpRecords;
  h.control_offset = round_up(sizeof(SegmentHeader), kPage);
  h.control_stride = round_up(sizeof(RankControl), kPage);
  h.collective_offset = h.control_offset + world * h.control_stride;
  h.collective_bytes = sizes.collective_bytes;
  h.collective_stride = round_up(sizeof(SlotHeader) + sizes.collective_bytes, kPage);
  h.pair_offset = h.collective_offset + world * kCollectiveSlots * h.collective_stride;
  h.p2p_bytes = sizes.p2p_bytes;
  h.p2p_slots = sizes.p2p_slots;
  h.p2p_stride = sizeof(SlotHeader) + sizes.p2p_bytes;
  h.pair_stride = round_up(sizeof(PairControl) + h.p2p_slots * h.p2p_stride, kPage);
  h.heap_offset = round_up(h.pair_offset + uint64_t(world) * world * h.pair_stride, kHuge);
  h.heap_bytes = round_up(uint64_t(sysconf(_SC_PHYS_PAGES)) * uint64_t(sysconf(_SC_PAGESIZE)), kHuge);
  h.bytes = h.heap_offset + uint64_t(world) * h.heap_bytes;
  return h;
}

void init_lease(pthread_mutex_t& lease) {
  pthread_mutexattr_t attr;
  pthread_mutexattr_init(&attr);
  pthread_mutexattr_setpshared(&attr, PTHREAD_PROCESS_SHARED);
  pthread_mutexattr_setrobust(&attr, PTHREAD_MUTEX_ROBUST);
  pthread_mutex_init(&lease, &attr);
  pthread_mutexattr_destroy(&attr);
}

char* map_shared(int fd, uint64_t offset, uint64_t bytes) {
  void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, off_t(offset));
  if (base == MAP_FAILED) throw_errno("mmap of " + std::to_string(bytes >> 20) + " MiB of shared memory");
  return static_cast<char*>(base);
}

// Reserves every page now: a later lack of memory would be a SIGBUS in the middle of a collective.
void allocate(int fd, uint64_t offset, uint64_t bytes) {
  errno = EINTR;
  for (int tries = 0; tries < 100 && errno == EINTR; ++tries) errno = posix_fallocate(fd, off_t(offset), off_t(bytes));
  if (errno != 0) throw_errno("reserving " + std::to_string(bytes >> 20) + " MiB of shared memory");
}

}  // namespace

void throw_errno(const std::string& what) {
  const int code = errno;
  throw transport_error(ErrorCode::system, -1, what + " failed: " + std::strerror(code));
}

std::shared_ptr<Segment> Segment::create(int world, const uint8_t nonce[16]) {
  if (world < 2 || world > kMaxWorld)
    throw transport_error(ErrorCode::system, -1, "shm carries 2 to 64 ranks, the group has " + std::to_string(world));
  const Layout wanted = plan(world, nonce);
  const int fd = memfd_create("tpmp", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0) throw_errno("memfd_create");
  std::shared_ptr<Segment> segment(new Segment(fd));
  if (ftruncate(fd, off_t(wanted.bytes)) < 0) throw_errno("sizing the shared memory");
  allocate(fd, 0, wanted.heap_offset);
  if (fcntl(fd, F_ADD_SEALS, kSeals) < 0) throw_errno("sealing the shared memory");
  segment->base_ = map_shared(fd, 0, wanted.heap_offset);
  segment->bytes_ = wanted.heap_offset;
  static_cast<Layout&>(segment->header()) = wanted;  // fresh memory is zero: all atomics start at 0
  for (int rank = 0; rank < world; ++rank) init_lease(segment->control(rank).lease);
  return segment;
}

std::shared_ptr<Segment> Segment::map(int fd, int world, const uint8_t nonce[16]) {
  std::shared_ptr<Segment> segment(new Segment(fd));
  struct stat status {};
  if (fstat(fd, &status) < 0) throw_errno("fstat of the shared memory");
  const Layout wanted = plan(world, nonce);
  if (fcntl(fd, F_GET_SEALS) != kSeals || status.st_size < off_t(wanted.heap_offset))
    throw transport_error(ErrorCode::system, -1, "the received file descriptor is not a sealed segment");
  segment->base_ = map_shared(fd, 0, wanted.heap_offset);
  segment->bytes_ = wanted.heap_offset;
  const SegmentHeader& h = segment->header();
  if (h.magic != kMagic || std::strncmp(h.abi, TPMP_ABI, sizeof h.abi) != 0 || h.world != uint32_t(world) ||
      std::memcmp(h.nonce, nonce, sizeof h.nonce) != 0 || h.bytes != uint64_t(status.st_size) ||
      h.heap_offset != wanted.heap_offset)
    throw transport_error(ErrorCode::system, -1, "the received segment belongs to another job or build");
  return segment;
}

char* Segment::heap(int rank) {
  char* mapped = heaps_[rank].load(std::memory_order_acquire);
  if (mapped != nullptr) return mapped;
  const SegmentHeader& h = header();
  char* fresh = map_shared(fd_, h.heap_offset + uint64_t(rank) * h.heap_bytes, h.heap_bytes);
  madvise(fresh, h.heap_bytes, MADV_DONTDUMP);
  if (heaps_[rank].compare_exchange_strong(mapped, fresh)) return fresh;
  munmap(fresh, h.heap_bytes);  // another thread was faster
  return mapped;
}

bool Segment::in_heap(int rank, const void* data, size_t bytes) const {
  const char* first = heaps_[rank].load(std::memory_order_acquire);
  const char* at = static_cast<const char*>(data);
  return first != nullptr && at >= first && at + bytes <= first + header().heap_bytes;
}

void Segment::reserve(int rank, uint64_t offset, uint64_t bytes) {
  const SegmentHeader& h = header();
  allocate(fd_, h.heap_offset + uint64_t(rank) * h.heap_bytes + offset, bytes);
}

Segment::~Segment() {
  ::close(fd_);
  for (const std::atomic<char*>& heap : heaps_)
    if (char* mapped = heap.load()) munmap(mapped, header().heap_bytes);
  if (base_ != nullptr) munmap(base_, bytes_);
}

}  // namespace tpmp::shm
