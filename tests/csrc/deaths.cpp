// Ranks as processes that die, stop or throw at every failpoint: what each survivor raises, and how long after.
#ifdef TPMP_FAILPOINTS
#include "modes.hpp"

#include <algorithm>
#include <csignal>
#include <random>
#include <string>

#include "failpoint.hpp"
#include "world.hpp"

namespace tpmp::test {

namespace {

constexpr int kTurns = 1'000;  // of the program, within which whatever is to happen has happened
constexpr int kAsked = 4;      // turns, after which a victim of `close.before` closes and one of `poison.before` aborts

// Passes every failpoint but those of close and abort: memory, a posted collective, a small and a large one, and a
// message of several pieces to the next rank.
class Program {
 public:
  Program(std::shared_ptr<shm::ShmTransport> transport, int rank, int world, double timeout)
      : transport_(std::move(transport)), rank_(rank), world_(world), timeout_(timeout), posted_(16), small_(8),
        large_(100'000), sent_(100'000), taken_(100'000) {}

  void turn() {
    const auto lent = transport_->allocate(64);
    fill(posted_), fill(small_), fill(large_), fill(sent_);
    const auto work = transport_->post(sum(posted_, "posted"), timeout_);
    transport_->run(sum(small_, "small"), timeout_);
    const int next = (rank_ + 1) % world_, before = (rank_ + world_ - 1) % world_;
    const auto send = transport_->isend(sent_.data(), sent_.size(), DType::f32, next, "message", false);
    transport_->irecv(taken_.data(), taken_.size(), DType::f32, before, "message", true)->wait(timeout_);
    send->wait(timeout_);
    transport_->run(sum(large_, "large"), timeout_);
    work->wait(timeout_);
    const float all = float(world_ * (world_ + 1) / 2);
    right_ = right_ && posted_.back() == all && small_.back() == all && large_.back() == all &&
             taken_.back() == float(before + 1);
  }
  bool right() const { return right_; }

 private:
  void fill(std::vector<float>& data) { std::fill(data.begin(), data.end(), float(rank_ + 1)); }
  Collective sum(std::vector<float>& data, const char* tag) {
    return {Kind::all_reduce, DType::f32, ReduceOp::sum, -1, data.size(), data.data(), data.data(), tag, {}, {}};
  }

  const std::shared_ptr<shm::ShmTransport> transport_;
  const int rank_, world_;
  const double timeout_;
  std::vector<float> posted_, small_, large_, sent_, taken_;
  bool right_ = true;
};

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

// One rank, as a program of a user: an exception of its own is told to the group, as communicator.py does.
void run_rank(const Scenario& s, const std::shared_ptr<shm::Segment>& segment, int rank, Page& page) {
  failpoint::rank = rank;
  const auto transport = std::make_shared<shm::ShmTransport>(segment, rank);
  Program program(transport, rank, s.world, s.timeout);
  Outcome& outcome = page.outcomes[rank];
  try {
    for (int turn = 0; turn < s.turns; ++turn) {
      if (rank == s.victim && turn == kAsked && s.point == "close.before") return transport->close();
      if (rank == s.victim && turn == kAsked && s.point == "poison.before") return transport->abort("asked to");
      program.turn();
    }
    tell(outcome, 0, -1, program.right() ? "right" : "wrong");
  } catch (const transport_error& error) {
    tell(outcome, int(error.code), error.culprit, error.what());
    if (error.code == ErrorCode::system) transport->abort(error.what());
  } catch (const std::exception& error) {
    tell(outcome, 0, -1, error.what());
    transport->abort(error.what());
  }
  transport->close();
}

struct Ended {
  std::vector<int> status;  // of waitpid, by rank
  Page* page;
  const Outcome& of(int rank) const { return page->outcomes[rank]; }
};

// `meanwhile` runs once a rank has stopped, or else once all are started, with their pids.
Ended play(const Scenario& s, Page& page, const std::function<void(const std::vector<pid_t>&, shm::Segment&)>& meanwhile) {
  std::memset(static_cast<void*>(&page), 0, sizeof page);
  failpoint::plans.clear();
  failpoint::arm(s.plan());
  for (const std::string& plan : s.also) failpoint::arm(plan);
  failpoint::when_ns = &page.when_ns;
  failpoint::gate = &page.gate;
  const auto segment = new_segment(s.world);
  std::vector<pid_t> pids;
  for (int rank = 0; rank < s.world; ++rank) pids.push_back(fork_rank([&, rank] { run_rank(s, segment, rank, page); }));
  if (s.action != "stop") meanwhile(pids, *segment);
  Ended ended{std::vector<int>(size_t(s.world)), &page};
  for (int left = s.world; left > 0;) {
    int status = 0;
    const pid_t pid = waitpid(-1, &status, WUNTRACED);
    if (WIFSTOPPED(status)) {
      meanwhile(pids, *segment);
      continue;
    }
    --left;
    ended.status[size_t(std::find(pids.begin(), pids.end(), pid) - pids.begin())] = status;
  }
  return ended;
}

void nothing(const std::vector<pid_t>&, shm::Segment&) {}

// What is counted over the scenarios of a group.
struct Tally {
  int runs = 0, struck = 0, hung = 0, told = 0, same = 0, right = 0, said = 0;
  std::vector<double> latency_ms;

  // `code` and `culprit` (-1: any) that every rank but the victim should report, and what its text should hold.
  void add(const Scenario& s, const Ended& ended, bool struck_as_planned, ErrorCode code, int culprit,
           const std::string& text) {
    ++runs;
    struck += struck_as_planned;
    bool all_told = true, all_same = true, all_right = true, all_said = true, any_hung = false;
    int first = -1;
    for (int rank = 0; rank < s.world; ++rank) {
      if (WIFSIGNALED(ended.status[rank]) && WTERMSIG(ended.status[rank]) == SIGALRM) any_hung = true;
      if (rank == s.victim) continue;
      const Outcome& outcome = ended.of(rank);
      if (first < 0) first = rank;
      all_told = all_told && outcome.told != 0;
      all_same = all_same && outcome.code == ended.of(first).code && outcome.culprit == ended.of(first).culprit;
      all_right = all_right && outcome.code == int(code) && outcome.culprit == culprit;
      all_said = all_said && std::strstr(outcome.text, text.c_str()) != nullptr;
      latency_ms.push_back(double(outcome.error_ns - ended.page->when_ns) * 1e-6);
    }
    told += all_told, same += all_same, right += all_right, said += all_said, hung += any_hung;
    if (!all_told || !all_right || !all_said)
      std::fprintf(stderr, "world %d, %s: rank %d says %d, culprit %d: %s\n", s.world, s.plan().c_str(), first,
                   ended.of(first).code, ended.of(first).culprit, ended.of(first).text);
  }
  void print(const char* group) {
    Line line(group);
    line("runs", runs)("struck", struck)("hung", hung)("told", told)("same", same)("right", right)("said", said);
    std::sort(latency_ms.begin(), latency_ms.end());
    const auto at = [&](double share) { return latency_ms[size_t(share * double(latency_ms.size() - 1))]; };
    if (!latency_ms.empty())
      line("seen", double(latency_ms.size()))("p50_ms", at(0.5))("p99_ms", at(0.99))("max_ms", at(1.0));
  }
};

bool killed_by(int status, int signal) { return WIFSIGNALED(status) && WTERMSIG(status) == signal; }

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
    const Ended ended = play(s, page, nothing);
    tally.add(s, ended, killed_by(ended.status[s.victim], SIGKILL), ErrorCode::peer_died, s.victim, " died");
  }
  tally.print("kill");
  return 0;
}

namespace {

void exits(Page& page) {
  Tally tally;
  for (const char* point : {"collective.after_publish", "collective.after_wait", "transfer.before_credit", "close.before"})
    for (int world = 2; world <= kMost; ++world) {
      const Scenario s{world, world - 1, 1, point, "exit"};
      const Ended ended = play(s, page, nothing);
      const int status = ended.status[s.victim];
      tally.add(s, ended, WIFEXITED(status) && ended.of(s.victim).told == 0, ErrorCode::peer_died, s.victim, " died");
    }
  tally.print("exit");
}

// Stopped until all others have given up; and stopped, but woken long before.
void stops(Page& page) {
  Tally tally;
  for (const char* point : {"collective.before_publish", "collective.after_read", "transfer.before_publish"})
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

void exceptions(Page& page) {
  for (const char* action : {"throw", "bad_alloc", "errno=12"}) {
    Tally tally;
    for (const char* point : {"collective.before_publish", "collective.after_wait", "transfer.before_publish",
                              "transfer.before_credit", "work.posted", "heap.reserve"})
      for (int world = 2; world <= kMost; ++world) {
        const Scenario s{world, 0, 1, point, action};
        const Ended ended = play(s, page, nothing);
        const std::string said = action == std::string("throw") ? "failpoint " + s.point
                                 : action == std::string("bad_alloc") ? "std::bad_alloc" : "Cannot allocate memory";
        tally.add(s, ended, ended.of(0).told != 0, ErrorCode::peer_failed, 0, said);
      }
    tally.print(action == std::string("errno=12") ? "errno" : action);
  }
}

// Rank 0 dies, and all others but the last one die in the act of reporting a death: whoever lives agrees on one of them.
void cascades(Page& page) {
  int runs = 0, struck = 0, same = 0, right = 0, second = 0;
  for (const char* point : {"collective.after_publish", "collective.after_wait", "transfer.after_publish"})
    for (int hit = 1; hit <= 3; ++hit)
      for (int world = 3; world <= kMost; ++world) {
        Scenario s{world, 0, hit, point, "kill"};
        for (int rank = 1; rank < world - 1; ++rank) s.also.push_back(std::to_string(rank) + ":poison.before:1:kill");
        const Ended ended = play(s, page, nothing);
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

}  // namespace tpmp::test
#endif
