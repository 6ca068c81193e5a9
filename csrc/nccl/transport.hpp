// The transport between GPU ranks over NCCL: a communicator of its own for collectives, and one of two ranks for each
// ordered pair that exchanges messages, so that no message waits for one of another pair. Each has a high-priority
// stream of its own, joined to the caller's streams by events alone. A call only enqueues. One watch thread asks the
// communicators for errors, times what is under way, and aborts.
//
// Fingerprints are compared beside the data, by whoever made this transport (comm/nccl): data may be garbage before a
// mismatch is told.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "../transport.hpp"
#include "lane.hpp"

namespace tpmp::nccl {

// Events are made once and used again; making one costs more than recording it.
class Events {
 public:
  ~Events();
  cuda::Event take();
  void give(cuda::Event event);

 private:
  std::mutex mutex_;
  std::vector<cuda::Event> free_;
};

// What an operation waits for instead of the whole of the caller's stream: an event, then a counter in device memory.
struct Gate {
  cuda::Event after = nullptr;
  uint64_t address = 0;
  uint32_t value = 0;
};

// One operation on a lane's stream. `captured`: it is part of a graph, and takes place whenever that is launched.
struct Operation {
  std::string what;
  std::shared_ptr<Lane> lane;
  std::shared_ptr<Events> events;
  cuda::Event begun = nullptr, over = nullptr;
  double timeout = 0;
  Gate gate;
  bool captured = false;
  int64_t begun_ns = 0;              // when the watch saw that the device had come to it
  std::atomic<bool> done{false};
  ~Operation();
};

struct Failure {
  ErrorCode code;
  int culprit;
  std::string text;
};

// A place in a stream of the caller's, for calls that wait for it and for a counter instead of for the whole stream.
class Mark {
 public:
  Mark(std::shared_ptr<Events> events, cuda::Stream stream);
  ~Mark();
  cuda::Event event() const { return event_; }

 private:
  const std::shared_ptr<Events> events_;
  const cuda::Event event_;
};

class NcclWork;

class NcclTransport final : public Transport, public std::enable_shared_from_this<NcclTransport> {
 public:
  // Collective over the ranks, who share the unique id. The current CUDA context is the rank's. `timeout` bounds the
  // connecting, each message and each call into NCCL. `max_ctas`: multiprocessors that one collective may take, 0 for
  // NCCL's own choice.
  NcclTransport(const std::string& id, int rank, int size, double timeout, int max_ctas);
  ~NcclTransport() override;

  void run(const Collective&, double timeout) override;  // and waits on the host
  std::shared_ptr<Work> post(Collective, double timeout) override;
  std::shared_ptr<Work> isend(const Message&, bool waits) override;
  std::shared_ptr<Work> irecv(const Message&, bool waits) override;
  void abort(const std::string& reason) override;
  void close() override;
  std::vector<std::string> last_ops() override;

  // Connects this rank with `peer` for messages to it (`sends`) or from it; returns when the peer has done so, too. A
  // message of a pair that is not connected is an error.
  void connect(int peer, bool sends, const std::string& id, double timeout);
  std::shared_ptr<Mark> mark(uintptr_t stream);
  // As post, but takes place once `after` is reached and the counter at `address` is at least `value`, not once the
  // stream has come here: behind a kernel that raises the counter as it goes. Without `cuStreamWaitValue32` a
  // transport_error says so.
  std::shared_ptr<Work> post_gated(Collective, double timeout, const Mark& after, uint64_t address, uint32_t value);
  std::optional<Failure> failure();
  std::vector<uintptr_t> streams();  // of collectives, then of each pair in the order of connecting
  bool gates() const { return cuda::api().wait_value != nullptr; }

 private:
  friend class NcclWork;
  using Issue = std::function<Result(Comm, cuda::Stream)>;

  // transport.cpp: life
  std::shared_ptr<Lane> open(const std::string& name, int ranks, int rank, const std::string& id, double timeout);
  std::vector<std::shared_ptr<Lane>> lanes();
  std::shared_ptr<Lane> lane_of(int peer, bool sends);
  void let_go();  // of all that NCCL and CUDA hold for it
  std::string identity() const;

  // posting.cpp
  void check_usable(const std::string& what);
  [[noreturn]] void throw_failure(const std::string& what);
  std::shared_ptr<Work> posted(Collective, double timeout, const Gate* gate);
  std::shared_ptr<Work> posted(const Message&, bool sends);
  // On the lane's stream: after what `caller` holds, or after `gate`, what `issue` enqueues, and an event behind it.
  std::shared_ptr<Operation> enqueue(const std::shared_ptr<Lane>& lane, std::string what, double timeout,
                                     cuda::Stream caller, const Issue& issue, const Gate* gate);
  std::shared_ptr<Operation> prepare(const std::shared_ptr<Lane>& lane, std::string what, double timeout,
                                     cuda::Stream caller, const Gate* gate);
  void finish(const std::shared_ptr<Operation>& operation);
  // `issue` with the lane's communicator locked, and its answer once that is no longer "in progress".
  Result inside(Lane& lane, double timeout, const Issue& issue);
  void judge(Result result, Lane& lane, const std::string& what, double timeout);
  void wait_host(const Operation& operation, double timeout);
  void interruptible();  // lets a signal's exception through, with the group failed

  // watch.cpp
  void watch();
  void look_at_lanes();
  void look_at_operations();
  void look_at(Operation& operation);
  void fail(ErrorCode code, int culprit, const std::string& text);
  void add_to_failure(const std::string& text);
  std::string said(Result result, Lane& lane);
  double abort_seconds() const { return std::min(timeout_, 10.0); }  // that NCCL has to abort
  void open_gates();
  bool abort_lanes();  // whether NCCL has returned from all
  void finalize_lanes(int64_t deadline);

  const int rank_, size_, max_ctas_;
  const double timeout_;
  const cuda::Context context_;
  std::shared_ptr<Events> events_ = std::make_shared<Events>();
  std::shared_ptr<Lane> collectives_;
  cuda::DevicePtr barrier_word_ = 0;
  cuda::Stream rescue_ = nullptr;  // on which gates are opened when the group has failed
  std::atomic<bool> closed_{false};

  std::mutex order_;  // one order of launches for all lanes
  std::mutex state_;  // guards all below
  std::condition_variable wake_;
  std::vector<std::shared_ptr<Lane>> lanes_;
  std::map<std::pair<int, bool>, std::shared_ptr<Lane>> messages_;  // by peer and whether this rank sends
  std::deque<std::shared_ptr<Operation>> under_way_;
  std::deque<std::string> last_;
  std::optional<Failure> failure_;
  bool leaving_ = false;
  bool all_aborted_ = true;  // of the watch, and of close after it
  std::thread watch_;
};

// A posted call. Its buffers belong to the transport until the device is through with it.
class NcclWork final : public Work {
 public:
  NcclWork(std::shared_ptr<NcclTransport> transport, std::shared_ptr<Operation> operation)
      : transport_(std::move(transport)), operation_(std::move(operation)) {}
  void wait(double timeout) override { transport_->wait_host(*operation_, timeout); }
  // By the watch alone: where a stream is being captured, asking an event would break the capture off. False of a call
  // that is part of a graph.
  bool done() override { return operation_->done.load() || transport_->failure().has_value(); }
  bool over() const { return operation_->done.load(); }  // whether the device is through with it
  void order(uintptr_t stream);  // what is enqueued on `stream` from now on comes after it

 private:
  const std::shared_ptr<NcclTransport> transport_;
  const std::shared_ptr<Operation> operation_;
};

// calls.cpp: what of NCCL carries a collective out.
struct Wire {
  DataType dtype;
  size_t factor;  // elements of the wire for each of the call's
};
Wire wire(DType dtype, bool reduced);  // movement goes as bytes
Result worse(Result a, Result b);      // an error before "in progress" before success
ErrorCode error_code(Result result);
Result state_of(Comm comm);            // of its operations so far: success, "in progress", or what went wrong
Result issue(const Api& api, const Collective& call, int rank, int size, Comm comm, cuda::Stream stream);
bool empty(const Collective& call);    // whether nothing moves
std::string words(const Collective& call);

}  // namespace tpmp::nccl
