// A program of a few ranks in which one of them meets a fault at a failpoint; how it is played, and what is counted.
#pragma once

#ifdef TPMP_FAILPOINTS

#include <string>

#include "failpoint.hpp"
#include "world.hpp"

namespace tpmp::test {

constexpr int kTurns = 1'000;  // of the program, within which whatever is to happen has happened
constexpr int kAsked = 4;      // turns, after which a victim of `close.before` closes and one of `poison.before` aborts

struct Scenario {
  int world, victim, hit;
  std::string point, action;
  double timeout = kPatience;
  int turns = kTurns;
  std::vector<std::string> also = {};  // more plans
  std::string plan() const {
    return std::to_string(victim) + ":" + point + ":" + std::to_string(hit) + ":" + action;
  }
};

struct Ended {
  std::vector<int> status;  // of waitpid, by rank
  Page* page;
  const Outcome& of(int rank) const { return page->outcomes[rank]; }
};

using Meanwhile = std::function<void(const std::vector<pid_t>&, shm::Segment&)>;

// `meanwhile` runs once a rank has stopped, or else once all are started, with their pids.
Ended play(const Scenario& s, Page& page, const Meanwhile& meanwhile = {});

bool killed_by(int status, int signal);

// What is counted over the scenarios of a group.
struct Tally {
  int runs = 0, struck = 0, hung = 0, told = 0, same = 0, right = 0, said = 0;
  std::vector<double> latency_ms;

  // What every rank but the victim should report, and what its text should hold.
  void add(const Scenario& s, const Ended& ended, bool struck_as_planned, ErrorCode code, int culprit,
           const std::string& text);
  void print(const char* group);
};

}  // namespace tpmp::test

#endif
