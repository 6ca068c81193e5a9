// The layout of the shared segment and its mapping. Sizes and offsets stand in the header, so that they may be tuned
// freely; a change of any struct below needs a new ABI string (tpmp_kernels/comm/_ext.py).
//
//   header | control block of each rank | collective slots of each rank | ring of p2p slots of each ordered pair
//          | heap of each rank
//
// The file has its full size from the start and is sealed against any change of it. All before the heaps is reserved
// at once; a heap is a hole that its rank fills as it allocates, so that segments grow although they are sealed.
#pragma once

#include <pthread.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include "../transport.hpp"

namespace tpmp::shm {

constexpr size_t kLine = 64;     // cache line
constexpr size_t kPage = 4096;
constexpr uint64_t kMagic = 0x746e656d67655354;
constexpr int kMaxWorld = 64;
constexpr int kOpRecords = 64;   // last operations kept of each rank
constexpr int kCollectiveSlots = 4;  // rounds.cpp says why
constexpr int kLandings = 8;         // posted receives of an ordered pair that the sender sees
constexpr size_t kTagBytes = 64;
constexpr size_t kTextBytes = 6144;

static_assert(std::atomic<uint64_t>::is_always_lock_free && std::atomic<uint32_t>::is_always_lock_free);

// Written once by the creator, before anyone else maps the segment.
struct Layout {
  uint64_t magic;
  uint64_t bytes;
  char abi[32];
  uint8_t nonce[16];
  uint32_t world;
  uint32_t op_records;
  uint64_t control_offset, control_stride;
  uint64_t collective_offset, collective_stride, collective_bytes;            // stride of a slot, payload of a slot
  uint64_t pair_offset, pair_stride, p2p_stride, p2p_bytes, p2p_slots;        // stride of a pair, of a slot, ...
  uint64_t heap_offset, heap_bytes;                                           // bytes of one rank's, mostly a hole
  uint64_t reserved[14];
};

struct alignas(kLine) SegmentHeader : Layout {
  alignas(kLine) std::atomic<uint64_t> poison;  // 0 = healthy, else a packed Poison; set once by compare-and-swap
};

// One call of one rank as its peers may read it at any time; fields are words so that a torn read is only stale.
struct alignas(kLine) OpRecord {
  std::atomic<uint64_t> seq;    // 1-based number of the call on its rank, 0 = empty
  std::atomic<uint64_t> what;   // kind, dtype, reduce op, done flag in bytes 0-3; peer in bytes 4-7
  std::atomic<uint64_t> numel;
  std::atomic<int64_t> start_ns, end_ns;  // CLOCK_MONOTONIC, the same in every process of a host
  std::atomic<uint64_t> tag[4];
  uint64_t reserved[4];
};

// What the caller's thread of a rank sleeps for, so that ranks which wait for each other are found (deadlock.cpp).
struct alignas(kLine) Waiting {
  std::atomic<uint64_t> version;   // odd while it waits
  std::atomic<int64_t> since_ns;   // kNever while it does not
  std::atomic<uint64_t> seq;       // of its call
  std::atomic<uint64_t> what;      // kind in byte 0; peer in bytes 4-7
  std::atomic<uint64_t> number;    // of the collective, or of the message in its ordered pair
};

struct alignas(kLine) RankControl {
  // Robust mutex held for life by the rank's keeper thread: the kernel marks its word when the owner dies, and peers
  // read that mark with a plain load.
  alignas(kLine) pthread_mutex_t lease;
  std::atomic<uint32_t> pid;
  std::atomic<uint32_t> closed;                    // set before the lease of a clean exit ends
  alignas(kLine) std::atomic<uint32_t> doorbell;   // the one futex word that this rank sleeps on
  alignas(kLine) std::atomic<uint32_t> sleepers;   // threads of this rank that sleep on it, or are about to
  alignas(kLine) std::atomic<uint64_t> op_count;
  std::atomic<uint64_t> collectives;               // called so far, posted ones among them
  uint64_t reserved[30];
  Waiting waiting;
  char poison_text[kTextBytes];                    // written before the poison word names this rank as reporter
  OpRecord ops[kOpRecords];
};

struct alignas(kLine) SlotHeader {
  std::atomic<uint64_t> seq;  // the flag: stored with release when everything below and the payload stand
  uint64_t op_id;             // number of the collective call, or of the message of this pair
  uint64_t fingerprint;       // of kind, dtype, reduce op, peer or root, numel and the whole tag
  uint64_t numel;
  uint64_t bytes;             // of payload in this slot
  uint64_t offset;            // of this payload in the message
  int32_t peer;
  uint8_t kind, dtype, redop, flags;
  uint32_t crc;               // for integrity checking
  uint32_t tag_bytes;
  char tag[kTagBytes];        // its beginning, for messages
  uint64_t lent;              // 0, or 1 + the offset in its rank's heap where the data lies instead of here, or kPut
  uint64_t rounds;            // that this rank needs, where only all together know how many there are
  uint64_t reserved[6];
  char* payload() { return reinterpret_cast<char*>(this + 1); }
};

constexpr uint64_t kPut = ~uint64_t{0};  // the data stands in the receiver's buffer already

// A posted receive whose buffer lies in the receiver's heap, where the sender may put the whole message.
struct Landing {
  std::atomic<uint64_t> message;  // its number in the pair: stored with release when the rest stands
  uint64_t place, bytes;          // offset in the heap
  uint64_t fingerprint;
};

struct alignas(kLine) PairControl {
  std::atomic<uint64_t> consumed;  // pieces that the receiver has taken: the sender's credit
  std::atomic<uint64_t> sends, recvs;  // posted so far, by the sender and by the receiver
  uint64_t reserved[5];
  Landing landings[kLandings];     // by message number
};

static_assert(sizeof(SlotHeader) == 192 && sizeof(OpRecord) == 128 && sizeof(PairControl) == 64 + 32 * kLandings);

struct Poison {
  ErrorCode code;
  int culprit;   // -1 = nobody can be named
  int reporter;
  uint64_t pack() const {
    return uint64_t(code) | uint64_t(uint16_t(culprit + 1)) << 16 | uint64_t(uint16_t(reporter)) << 32;
  }
  static Poison unpack(uint64_t word) {
    return {ErrorCode(word & 0xff), int(word >> 16 & 0xffff) - 1, int(word >> 32 & 0xffff)};
  }
};

// A sealed memfd mapped into this process; unmapped with the last owner. The kernel frees it with the last mapping.
// Heaps are mapped one by one, when they are first used.
class Segment {
 public:
  static std::shared_ptr<Segment> create(int world, const uint8_t nonce[16]);  // keeps the fd for the handoff
  static std::shared_ptr<Segment> map(int fd, int world, const uint8_t nonce[16]);  // takes the fd
  ~Segment();
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;

  int fd() const { return fd_; }
  int world() const { return int(header().world); }
  SegmentHeader& header() const { return *reinterpret_cast<SegmentHeader*>(base_); }
  RankControl& control(int rank) const {
    return *reinterpret_cast<RankControl*>(base_ + header().control_offset + rank * header().control_stride);
  }
  SlotHeader& collective_slot(int rank, uint64_t round) const {
    const uint64_t index = uint64_t(rank) * kCollectiveSlots + round % kCollectiveSlots;
    return *reinterpret_cast<SlotHeader*>(base_ + header().collective_offset + index * header().collective_stride);
  }
  PairControl& pair(int src, int dst) const {
    const uint64_t index = uint64_t(src) * header().world + dst;
    return *reinterpret_cast<PairControl*>(base_ + header().pair_offset + index * header().pair_stride);
  }
  SlotHeader& p2p_slot(int src, int dst, uint64_t piece) const {
    char* ring = reinterpret_cast<char*>(&pair(src, dst) + 1);
    return *reinterpret_cast<SlotHeader*>(ring + piece % header().p2p_slots * header().p2p_stride);
  }
  char* heap(int rank);  // its first byte
  bool in_heap(int rank, const void* data, size_t bytes) const;  // of a heap that this process has mapped
  void reserve(int rank, uint64_t offset, uint64_t bytes);       // memory for a part of a heap

 private:
  explicit Segment(int fd) : fd_(fd) {}
  const int fd_;
  char* base_ = nullptr;
  size_t bytes_ = 0;  // mapped at base_: all but the heaps
  std::array<std::atomic<char*>, kMaxWorld> heaps_{};
};

[[noreturn]] void throw_errno(const std::string& what);  // transport_error{system} with the text of errno

}  // namespace tpmp::shm
