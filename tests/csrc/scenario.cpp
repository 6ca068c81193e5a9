// How a scenario is played by forked ranks, and counted.
#ifdef TPMP_FAILPOINTS
#include "scenario.hpp"

#include <algorithm>
#include <csignal>

namespace tpmp::test {

namespace {

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
    const auto send = transport_->isend({sent_.data(), sent_.size(), DType::f32, next, "message"}, false);
    transport_->irecv({taken_.data(), taken_.size(), DType::f32, before, "message"}, true)->wait(timeout_);
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

}  // namespace

Ended play(const Scenario& s, Page& page, const Meanwhile& meanwhile) {
  std::memset(static_cast<void*>(&page), 0, sizeof page);
  failpoint::plans.clear();
  failpoint::arm(s.plan());
  for (const std::string& plan : s.also) failpoint::arm(plan);
  failpoint::when_ns = &page.when_ns;
  failpoint::gate = &page.gate;
  const auto segment = new_segment(s.world);
  std::vector<pid_t> pids;
  for (int rank = 0; rank < s.world; ++rank) pids.push_back(fork_rank([&, rank] { run_rank(s, segment, rank, page); }));
  if (meanwhile && s.action != "stop") meanwhile(pids, *segment);
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

bool killed_by(int status, int signal) { return WIFSIGNALED(status) && WTERMSIG(status) == signal; }

void Tally::add(const Scenario& s, const Ended& ended, bool struck_as_planned, ErrorCode code, int culprit,
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

void Tally::print(const char* group) {
  Line line(group);
  line("runs", runs)("struck", struck)("hung", hung)("told", told)("same", same)("right", right)("said", said);
  std::sort(latency_ms.begin(), latency_ms.end());
  const auto at = [&](double share) { return latency_ms[size_t(share * double(latency_ms.size() - 1))]; };
  if (!latency_ms.empty())
    line("seen", double(latency_ms.size()))("p50_ms", at(0.5))("p99_ms", at(0.99))("max_ms", at(1.0));
}

}  // namespace tpmp::test
#endif
