// Faults other than one kill: exits, stops, pauses, exceptions, deaths of those who report a death.
#ifdef TPMP_FAILPOINTS
#include <csignal>

#include "modes.hpp"
#include "scenario.hpp"

namespace tpmp::test {

namespace {

void exits(Page& page) {
  Tally tally;
  for (const char* point :
       {"collective.after_publish", "collective.after_wait", "transfer.before_credit", "close.before"})
    for (int world = 2; world <= kMost; ++world) {
      const Scenario s{world, world - 1, 1, point, "exit"};
      const Ended ended = play(s, page);
      const int status = ended.status[s.victim];
      tally.add(s, ended, WIFEXITED(status) && ended.of(s.victim).told == 0, ErrorCode::peer_died, s.victim, " died");
    }
  tally.print("exit");
}

// Stopped until all others have given up.
void stops(Page& page) {
  Tally tally;
  for (const char* point : {"collective.before_publish", "transfer.before_publish"})
    for (int world = 2; world <= kMost; ++world) {
      const Scenario s{world, 0, 2, point, "stop", 0.3};
      bool stopped = false;
      const auto bury = [&](const std::vector<pid_t>& pids, shm::Segment&) {
        stopped = true;
        for (int rank = 1; rank < world; ++rank) waitid(P_PID, id_t(pids[size_t(rank)]), nullptr, WEXITED | WNOWAIT);
        kill(pids[0], SIGKILL);
      };
      const Ended ended = play(s, page, bury);
      tally.add(s, ended, stopped, ErrorCode::timeout, 0, "it is stopped (SIGSTOP");
    }
  tally.print("stop");
}

void wait_for_sleepers(const Scenario& s, shm::Segment& segment) {
  for (int rank = 0; rank < s.world; ++rank)
    while (rank != s.victim && segment.control(rank).sleepers.load() == 0) sched_yield();
}

// Stopped or paused, but woken once all others sleep: no error, and right results.
void late(Page& page) {
  Tally tally;
  for (const char* action : {"stop", "pause"})
    for (int world = 2; world <= kMost; ++world) {
      Scenario s{world, world - 1, 2, "collective.before_publish", action};
      s.turns = 6;
      bool late = false;
      const auto wake = [&](const std::vector<pid_t>& pids, shm::Segment& segment) {
        if (s.action == "pause")
          for (; page.gate.load() == 0;) sched_yield();
        wait_for_sleepers(s, segment);
        late = true;
        if (s.action == "stop") kill(pids[size_t(s.victim)], SIGCONT);
        page.gate.store(2);
        syscall(SYS_futex, &page.gate, FUTEX_WAKE, 64, nullptr, nullptr, 0);
      };
      const Ended ended = play(s, page, wake);
      tally.add(s, ended, late, ErrorCode(0), -1, "right");
    }
  tally.print("late");
}

// On whichever thread, the keeper's among them.
void exceptions(Page& page) {
  for (const char* action : {"throw", "bad_alloc", "errno=12"}) {
    Tally tally;
    for (const char* point : {"collective.before_publish", "collective.after_wait", "transfer.before_publish",
                              "transfer.before_credit", "work.posted", "heap.reserve"})
      for (int world = 2; world <= kMost; ++world) {
        const Scenario s{world, 0, 1, point, action};
        const Ended ended = play(s, page);
        const std::string said = action == std::string("throw") ? "failpoint " + s.point
                                 : action == std::string("bad_alloc") ? "std::bad_alloc" : "Cannot allocate memory";
        tally.add(s, ended, ended.of(0).told != 0, ErrorCode::peer_failed, 0, said);
      }
    tally.print(action == std::string("errno=12") ? "errno" : action);
  }
}

// Rank 0 dies, and all others but the last one die in the act of reporting a death: whoever lives agrees on one.
void cascades(Page& page) {
  int runs = 0, struck = 0, same = 0, right = 0, second = 0;
  for (const char* point : {"collective.after_publish", "collective.after_wait", "transfer.after_publish"})
    for (int hit = 1; hit <= 3; ++hit)
      for (int world = 3; world <= kMost; ++world) {
        Scenario s{world, 0, hit, point, "kill"};
        for (int rank = 1; rank < world - 1; ++rank) s.also.push_back(std::to_string(rank) + ":poison.before:1:kill");
        const Ended ended = play(s, page);
        const Outcome& last = ended.of(world - 1);
        bool agreed = last.told != 0;
        for (int rank = 0; rank < world; ++rank) {
          const Outcome& outcome = ended.of(rank);
          if (outcome.told != 0) agreed = agreed && outcome.culprit == last.culprit && outcome.code == last.code;
        }
        ++runs, same += agreed, struck += killed_by(ended.status[0], SIGKILL);
        right += last.code == int(ErrorCode::peer_died) && last.culprit >= 0 &&
                 killed_by(ended.status[size_t(last.culprit)], SIGKILL);
        second += killed_by(ended.status[1], SIGKILL);
      }
  Line("cascade")("runs", runs)("struck", struck)("second", second)("same", same)("right", right);
}

}  // namespace

int faults() {
  Page& page = shared_page();
  exits(page);
  stops(page);
  late(page);
  exceptions(page);
  cascades(page);
  drop(page);
  return 0;
}

// What the environment asks for, on the way past "here" three times.
int pass_by() {
  char data[2] = {0, 0};
  Line line("here");
  for (const char* name : {"first", "second", "third"}) {
    TPMP_FAILPOINT("here", data);
    line(name, data[0] + 256 * data[1]);
  }
  return 0;
}

}  // namespace tpmp::test
#endif
