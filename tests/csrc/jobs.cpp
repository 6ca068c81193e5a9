// Whole jobs killed at random times, from before their ranks have met until they are in the middle of calls: what is
// left of a thousand of them.
#include "modes.hpp"

#include <dirent.h>
#include <sys/prctl.h>
#include <time.h>

#include <cerrno>
#include <csignal>
#include <fstream>
#include <random>
#include <string>

#include "shm/handoff.hpp"
#include "world.hpp"

namespace tpmp::test {

namespace {

constexpr int64_t kLongestNs = 40'000'000;  // of a job

std::shared_ptr<shm::Segment> meet(int rank, int world, Page& page) {
  if (rank > 0) {
    for (; page.gate.load(std::memory_order_acquire) == 0;) sched_yield();
    const auto segment = shm::fetch_segment(page.address, page.nonce, world, rank);
    page.count.fetch_add(1);
    return segment;
  }
  shm::SegmentServer server(world);
  std::strncpy(page.address, server.address().c_str(), sizeof page.address - 1);
  std::strncpy(page.nonce, server.nonce().c_str(), sizeof page.nonce - 1);
  page.gate.store(1, std::memory_order_release);
  for (; page.count.load() < world - 1;) server.serve(1.0);
  return server.segment();
}

// Never ends by itself. outcomes[rank].told counts its turns.
void work(int rank, int world, Page& page) {
  const auto transport = std::make_shared<shm::ShmTransport>(meet(rank, world, page), rank);
  const int next = (rank + 1) % world, before = (rank + world - 1) % world;
  for (;;) {
    const auto block = transport->allocate(400'000);
    float* data = reinterpret_cast<float*>(block->data);
    const auto send = transport->isend({data, 100'000, DType::f32, next, ""}, false);
    const auto other = transport->allocate(400'000);
    transport->irecv({other->data, 100'000, DType::f32, before, ""}, true)->wait(kPatience);
    send->wait(kPatience);
    transport->run({Kind::all_reduce, DType::f32, ReduceOp::sum, -1, 100'000, data, data, "", {}, {}}, kPatience);
    page.outcomes[rank].told.fetch_add(1);
  }
}

[[noreturn]] void launch(int world, Page& page) {
  setpgid(0, 0);
  for (int rank = 0; rank < world; ++rank) fork_rank([&, rank] { work(rank, world, page); });
  for (;;) pause();
}

int entries(const char* folder) {
  int count = 0;
  DIR* const open = opendir(folder);
  if (open == nullptr) return 0;
  while (readdir(open) != nullptr) ++count;
  closedir(open);
  return count;
}

double shmem_mib() {
  std::ifstream file("/proc/meminfo");
  for (std::string word; file >> word;)
    if (word == "Shmem:") return file >> word, std::stod(word) / 1024;
  return 0;
}

bool has_socket(const std::string& address) {
  std::ifstream file("/proc/net/unix");
  for (std::string line; std::getline(file, line);)
    if (!address.empty() && line.find(address) != std::string::npos) return true;
  return false;
}

struct Left {
  int processes = 0, sockets = 0, met = 0, working = 0;
};

void play(int world, int64_t ns, Page& page, Left& left) {
  const pid_t job = fork();
  if (job == 0) launch(world, page);
  setpgid(job, job);  // by whoever comes first
  const timespec time{0, ns};
  nanosleep(&time, nullptr);
  killpg(job, SIGKILL);
  while (waitpid(-1, nullptr, 0) > 0) continue;  // this process is the reaper of the job's ranks too
  left.processes += killpg(job, 0) == 0 || errno != ESRCH;
  left.sockets += has_socket(page.address);
  left.met += page.count.load() == world - 1;
  left.working += page.outcomes[0].told.load() > 0;
}

}  // namespace

int jobs(uint64_t seed, int count) {
  prctl(PR_SET_CHILD_SUBREAPER, 1);
  std::mt19937_64 random(seed);
  const int files = entries("/dev/shm"), descriptors = entries("/proc/self/fd");
  const double shmem = shmem_mib();
  const auto one = new_segment(2)->header().heap_offset >> 20;  // what a job reserves, without its heaps
  Left left;
  for (int i = 0; i < count; ++i) {
    Page& page = shared_page();
    play(2 + i % 2, int64_t(random() % uint64_t(kLongestNs)), page, left);
    drop(page);
  }
  Line("jobs")("runs", count)("met", left.met)("working", left.working)("processes", left.processes)(
      "sockets", left.sockets)("files", entries("/dev/shm") - files)(
      "descriptors", entries("/proc/self/fd") - descriptors)("shmem_mib", shmem_mib() - shmem)(
      "reserved_mib", double(one) * count);
  return 0;
}

}  // namespace tpmp::test
