// Ranks as threads over one mapping, for the sanitizers: each runs the same random script, and results are checked.
#include "modes.hpp"

#include <thread>

#include "script.hpp"
#include "world.hpp"

namespace tpmp::test {

namespace {

struct Totals {
  std::atomic<int> calls{0}, transfers{0}, failures{0};
};

void run_rank(const std::shared_ptr<shm::Segment>& segment, int rank, uint64_t seed, int batches, Totals& totals) {
  const auto transport = std::make_shared<shm::ShmTransport>(segment, rank);
  Script script(transport, rank, segment->world(), seed, kPatience);
  try {
    for (int i = 0; i < batches; ++i) script.batch();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "seed %llu: %s\n", static_cast<unsigned long long>(seed), error.what());
    totals.failures.fetch_add(1);
    transport->abort(error.what());
  }
  totals.calls.fetch_add(script.calls());
  totals.transfers.fetch_add(script.transfers());
  transport->close();
}

}  // namespace

int threads(uint64_t seed, int batches) {
  for (int world = 2; world <= kMost; ++world) {
    Totals totals;
    {
      const auto segment = new_segment(world);
      std::vector<std::thread> ranks;
      for (int rank = 0; rank < world; ++rank)
        ranks.emplace_back([&, rank] { run_rank(segment, rank, seed + uint64_t(world), batches, totals); });
      for (std::thread& rank : ranks) rank.join();
    }
    Line("threads")("world", world)("calls", totals.calls)("transfers", totals.transfers)("failures", totals.failures);
  }
  return 0;
}

}  // namespace tpmp::test
