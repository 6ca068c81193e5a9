// A kill at every failpoint: what each survivor raises, and how long after.
#ifdef TPMP_FAILPOINTS
#include <algorithm>
#include <csignal>
#include <random>

#include "modes.hpp"
#include "scenario.hpp"

namespace tpmp::test {

namespace {

std::vector<Scenario> all_kills() {
  const char* points[] = {"collective.before_publish", "collective.after_publish", "collective.after_wait",
                          "collective.after_read",     "transfer.before_publish",  "transfer.after_publish",
                          "transfer.before_credit",    "transfer.after_credit",    "work.posted",
                          "heap.reserve"};
  std::vector<Scenario> kills;
  for (int world = 2; world <= kMost; ++world)
    for (int victim = 0; victim < world; ++victim) {
      for (const char* point : points)
        for (int hit = 1; hit <= 3; ++hit) kills.push_back({world, victim, hit, point, "kill"});
      for (const char* point : {"close.before", "poison.before"}) kills.push_back({world, victim, 1, point, "kill"});
    }
  return kills;
}

}  // namespace

int deaths(uint64_t seed, int kills) {
  std::vector<Scenario> scenarios = all_kills();
  std::mt19937_64 random(seed);
  std::shuffle(scenarios.begin(), scenarios.end(), random);
  scenarios.resize(std::min(scenarios.size(), size_t(kills)));
  Page& page = shared_page();
  Tally tally;
  for (const Scenario& s : scenarios) {
    const Ended ended = play(s, page);
    tally.add(s, ended, killed_by(ended.status[s.victim], SIGKILL), ErrorCode::peer_died, s.victim, " died");
  }
  tally.print("kill");
  return 0;
}

}  // namespace tpmp::test
#endif
