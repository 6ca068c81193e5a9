// The handshake: caller sends {magic, ABI, nonce, world, rank}; both check the other's user id (SO_PEERCRED); the
// server answers one byte, with the descriptor (SCM_RIGHTS) where everything fits.
#include "shm/handoff.hpp"

#include <poll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstring>

namespace tpmp::shm {

namespace {

constexpr int kAnswerSeconds = 5;  // a caller that says nothing is dropped after this

struct Hello {
  uint64_t magic;
  char abi[32];
  char nonce[32];
  uint32_t world, rank;
};

struct Fd {
  explicit Fd(int fd) : value(fd) {}
  ~Fd() { if (value >= 0) ::close(value); }
  Fd(const Fd&) = delete;
  const int value;
};

std::string random_hex() {
  uint8_t bytes[16];
  if (getrandom(bytes, sizeof bytes, 0) != ssize_t(sizeof bytes)) throw_errno("getrandom");
  std::string text;
  for (uint8_t byte : bytes) {
    text += "0123456789abcdef"[byte >> 4];
    text += "0123456789abcdef"[byte & 15];
  }
  return text;
}

void nonce_bytes(const std::string& hex, uint8_t out[16]) {
  if (hex.size() != 32) throw transport_error(ErrorCode::system, -1, "the nonce is not 32 hex digits");
  for (int i = 0; i < 16; ++i) out[i] = uint8_t(std::stoi(hex.substr(2 * i, 2), nullptr, 16));
}

socklen_t abstract_address(const std::string& name, sockaddr_un& address) {
  std::memset(&address, 0, sizeof address);
  address.sun_family = AF_UNIX;  // sun_path[0] stays 0: an abstract name, gone with the socket
  const std::string full = "tpmp-" + name;
  if (full.size() + 1 > sizeof address.sun_path)
    throw transport_error(ErrorCode::system, -1, "the address is too long");
  std::memcpy(address.sun_path + 1, full.data(), full.size());
  return socklen_t(offsetof(sockaddr_un, sun_path) + 1 + full.size());
}

bool same_user(int fd) {
  ucred peer{};
  socklen_t bytes = sizeof peer;
  return getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &bytes) == 0 && peer.uid == geteuid();
}

void limit_waits(int fd) {
  const timeval limit{kAnswerSeconds, 0};
  setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
}

Hello hello_of(const std::string& nonce, int world, int rank) {
  Hello hello{};
  hello.magic = kMagic;
  std::strncpy(hello.abi, TPMP_ABI, sizeof hello.abi - 1);
  std::memcpy(hello.nonce, nonce.data(), std::min(nonce.size(), sizeof hello.nonce));
  hello.world = uint32_t(world);
  hello.rank = uint32_t(rank);
  return hello;
}

void send_answer(int socket, char answer, int fd) {
  iovec part{&answer, 1};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof fd)] = {};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  if (fd >= 0) {
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    cmsghdr* rights = CMSG_FIRSTHDR(&message);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(sizeof fd);
    std::memcpy(CMSG_DATA(rights), &fd, sizeof fd);
  }
  sendmsg(socket, &message, MSG_NOSIGNAL);  // a caller that is gone by now is its own affair
}

int receive_fd(int socket) {
  char answer = 0;
  iovec part{&answer, 1};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  if (TEMP_FAILURE_RETRY(recvmsg(socket, &message, MSG_CMSG_CLOEXEC)) != 1) throw_errno("waiting for rank 0's answer");
  const cmsghdr* rights = CMSG_FIRSTHDR(&message);
  if (answer != 'y' || rights == nullptr || rights->cmsg_type != SCM_RIGHTS)
    throw transport_error(ErrorCode::system, -1, "rank 0 refused this rank: another job, build, world size or rank");
  int fd = -1;
  std::memcpy(&fd, CMSG_DATA(rights), sizeof fd);
  return fd;
}

}  // namespace

SegmentServer::SegmentServer(int world) : address_(random_hex()), nonce_(random_hex()) {
  uint8_t nonce[16];
  nonce_bytes(nonce_, nonce);
  segment_ = Segment::create(world, nonce);
  listener_ = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
  if (listener_ < 0) throw_errno("socket");
  sockaddr_un address;
  const socklen_t bytes = abstract_address(address_, address);
  if (bind(listener_, reinterpret_cast<sockaddr*>(&address), bytes) < 0 || listen(listener_, kMaxWorld) < 0) {
    const Fd closing(listener_);
    throw_errno("listening on an abstract socket");
  }
}

SegmentServer::~SegmentServer() {
  if (listener_ >= 0) ::close(listener_);
}

void SegmentServer::serve(double seconds) {
  pollfd ready{listener_, POLLIN, 0};
  if (poll(&ready, 1, int(seconds * 1e3)) <= 0) return;
  const Fd caller(accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC));
  if (caller.value < 0) return;
  limit_waits(caller.value);
  Hello hello{};
  const ssize_t got = TEMP_FAILURE_RETRY(recv(caller.value, &hello, sizeof hello, 0));
  const Hello wanted = hello_of(nonce_, segment_->world(), int(hello.rank));
  const bool fits = got == ssize_t(sizeof hello) && same_user(caller.value) && hello.rank >= 1 &&
                    hello.rank < uint32_t(segment_->world()) && std::memcmp(&hello, &wanted, sizeof hello) == 0;
  send_answer(caller.value, fits ? 'y' : 'n', fits ? segment_->fd() : -1);
}

std::shared_ptr<Segment> fetch_segment(const std::string& address, const std::string& nonce, int world, int rank) {
  uint8_t job[16];
  nonce_bytes(nonce, job);
  const Fd server(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  if (server.value < 0) throw_errno("socket");
  limit_waits(server.value);
  sockaddr_un name;
  const socklen_t bytes = abstract_address(address, name);
  if (connect(server.value, reinterpret_cast<sockaddr*>(&name), bytes) < 0)
    throw_errno("connecting to rank 0 (another host or network namespace?)");
  if (!same_user(server.value)) throw transport_error(ErrorCode::system, -1, "rank 0 runs as another user");
  const Hello hello = hello_of(nonce, world, rank);
  if (send(server.value, &hello, sizeof hello, MSG_NOSIGNAL) != ssize_t(sizeof hello)) throw_errno("greeting rank 0");
  return Segment::map(receive_fd(server.value), world, job);
}

}  // namespace tpmp::shm
