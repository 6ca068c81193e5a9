// How the ranks of a group come to share one segment: group rank 0 makes it and hands the file descriptor over an
// abstract Unix socket. Whoever receives the descriptor has proved that it shares memory with rank 0.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "shm/segment.hpp"

namespace tpmp::shm {

// Held by rank 0 while the others attach. Address and nonce are hex text, to travel through a torch Store.
class SegmentServer {
 public:
  explicit SegmentServer(int world);
  ~SegmentServer();
  SegmentServer(const SegmentServer&) = delete;
  SegmentServer& operator=(const SegmentServer&) = delete;

  // Answers at most one caller, waiting at most `seconds` for it; a stranger is refused and changes nothing.
  void serve(double seconds);
  const std::string& address() const { return address_; }
  const std::string& nonce() const { return nonce_; }
  std::shared_ptr<Segment> segment() const { return segment_; }

 private:
  std::string address_, nonce_;
  std::shared_ptr<Segment> segment_;
  int listener_ = -1;
};

// Fetches the segment from the server; transport_error{system} says why this rank cannot share memory with rank 0.
std::shared_ptr<Segment> fetch_segment(const std::string& address, const std::string& nonce, int world, int rank);

}  // namespace tpmp::shm
