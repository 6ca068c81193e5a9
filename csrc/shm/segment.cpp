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

constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

struct Sizes {
  uint64_t collective_bytes, p2p_bytes, p2p_slots;
};

// Generous for few ranks; a pair of ranks has its own ring, so that 64 ranks (4,096 pairs) stay below 700 MiB.
Sizes sizes_for(int world) {
  if (world <= 4) return {512 << 10, 128 << 10, 4};
  if (world <= 8) return {512 << 10, 64 << 10, 4};
  if (world <= 16) return {256 << 10, 64 << 10, 4};
  return {256 << 10, 32 << 10, 4};
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
  h.bytes = h.pair_offset + uint64_t(world) * world * h.pair_stride;
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

char* map_shared(int fd, uint64_t bytes) {
  void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (base == MAP_FAILED) throw_errno("mmap of " + std::to_string(bytes >> 20) + " MiB of shared memory");
  return static_cast<char*>(base);
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
  std::shared_ptr<Segment> segment(new Segment(fd, nullptr, 0));
  // Reserves every page now: a later lack of memory would be a SIGBUS in the middle of a collective.
  errno = EINTR;
  for (int tries = 0; tries < 100 && errno == EINTR; ++tries) errno = posix_fallocate(fd, 0, off_t(wanted.bytes));
  if (errno != 0) throw_errno("reserving " + std::to_string(wanted.bytes >> 20) + " MiB of shared memory");
  if (fcntl(fd, F_ADD_SEALS, kSeals) < 0) throw_errno("sealing the shared memory");
  segment->base_ = map_shared(fd, wanted.bytes);
  segment->bytes_ = wanted.bytes;
  static_cast<Layout&>(segment->header()) = wanted;  // fresh memory is zero: all atomics start at 0
  for (int rank = 0; rank < world; ++rank) init_lease(segment->control(rank).lease);
  return segment;
}

std::shared_ptr<Segment> Segment::map(int fd, int world, const uint8_t nonce[16]) {
  std::shared_ptr<Segment> segment(new Segment(fd, nullptr, 0));
  struct stat status {};
  if (fstat(fd, &status) < 0) throw_errno("fstat of the shared memory");
  if (fcntl(fd, F_GET_SEALS) != kSeals || status.st_size < off_t(sizeof(SegmentHeader)))
    throw transport_error(ErrorCode::system, -1, "the received file descriptor is not a sealed segment");
  segment->base_ = map_shared(fd, uint64_t(status.st_size));
  segment->bytes_ = size_t(status.st_size);
  const SegmentHeader& h = segment->header();
  const Layout wanted = plan(world, nonce);
  if (h.magic != kMagic || std::strncmp(h.abi, TPMP_ABI, sizeof h.abi) != 0 || h.world != uint32_t(world) ||
      std::memcmp(h.nonce, nonce, sizeof h.nonce) != 0 || h.bytes != wanted.bytes || h.bytes != segment->bytes_)
    throw transport_error(ErrorCode::system, -1, "the received segment belongs to another job or build");
  segment->close_fd();
  return segment;
}

void Segment::close_fd() {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
}

Segment::~Segment() {
  close_fd();
  if (base_ != nullptr) munmap(base_, bytes_);
}

}  // namespace tpmp::shm
