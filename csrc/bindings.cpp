// The Python module tpmp_kernels._C: argument conversion, docstrings, GIL release and exception translation.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "nccl/transport.hpp"
#include "shm/handoff.hpp"
#include "shm/transport.hpp"
#include "transport.hpp"

namespace py = pybind11;
using namespace tpmp;
using namespace pybind11::literals;

namespace {

void check_signals() {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

const char* error_class(ErrorCode code) {
  switch (code) {
    case ErrorCode::peer_died: return "PeerDied";
    case ErrorCode::peer_failed: return "PeerFailed";
    case ErrorCode::mismatch: return "CollectiveMismatch";
    case ErrorCode::timeout: return "TransportTimeout";
    default: return "TransportError";
  }
}

void translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const transport_error& error) {
    const py::object cls = py::module_::import("tpmp_kernels.errors").attr(error_class(error.code));
    const py::object culprit = error.culprit < 0 ? py::object(py::none()) : py::object(py::int_(error.culprit));
    PyErr_SetObject(cls.ptr(), cls(error.what(), culprit).ptr());
  }
}

template <class T>
T* pointer(uintptr_t address) { return reinterpret_cast<T*>(address); }

py::dict dtypes() {
  py::dict codes;
  const std::pair<const char*, DType> names[] = {
      {"float64", DType::f64}, {"float32", DType::f32}, {"bfloat16", DType::bf16}, {"float16", DType::f16},
      {"int64", DType::i64},   {"int32", DType::i32},   {"int16", DType::i16},     {"int8", DType::i8},
      {"uint8", DType::u8},    {"bool", DType::boolean}, {"uint16", DType::u16},   {"uint32", DType::u32},
      {"uint64", DType::u64},  {"complex64", DType::c64}, {"complex128", DType::c128},
      {"float8_e4m3fn", DType::f8_e4m3}, {"float8_e5m2", DType::f8_e5m2}};
  for (const auto& [name, code] : names) codes[name] = int(code);
  return codes;
}

py::dict reduce_ops() {
  py::dict codes;
  const std::pair<const char*, ReduceOp> names[] = {{"sum", ReduceOp::sum}, {"avg", ReduceOp::avg},
                                                    {"max", ReduceOp::max}, {"min", ReduceOp::min},
                                                    {"prod", ReduceOp::prod}};
  for (const auto& [name, code] : names) codes[name] = int(code);
  return codes;
}

py::dict kinds() {
  py::dict codes;
  const std::pair<const char*, Kind> names[] = {
      {"barrier", Kind::barrier},       {"all_reduce", Kind::all_reduce}, {"reduce", Kind::reduce},
      {"reduce_scatter", Kind::reduce_scatter}, {"all_gather", Kind::all_gather}, {"broadcast", Kind::broadcast},
      {"all_to_all", Kind::all_to_all}, {"scatter", Kind::scatter},       {"gather", Kind::gather}};
  for (const auto& [name, code] : names) codes[name] = int(code);
  return codes;
}

Collective collective(int kind, uintptr_t input, uintptr_t output, uint64_t numel, int dtype, int op, int root,
                      std::string tag, std::vector<uint64_t> input_splits, std::vector<uint64_t> output_splits,
                      uintptr_t stream) {
  return {Kind(kind), DType(dtype), ReduceOp(op), root, numel, pointer<const void>(input), pointer<void>(output),
          std::move(tag), std::move(input_splits), std::move(output_splits), stream};
}

Message message(uintptr_t data, uint64_t numel, int dtype, int peer, std::string tag, uintptr_t stream) {
  return {pointer<void>(data), numel, DType(dtype), peer, std::move(tag), stream};
}

void bind_work(py::module_& m) {
  py::class_<Work, std::shared_ptr<Work>>(m, "Work", "A posted call; the caller keeps its buffers alive.")
      .def("wait", &Work::wait, "timeout"_a, py::call_guard<py::gil_scoped_release>(),
           "Blocks until it is done, at most `timeout` seconds; raises tpmp_kernels.errors.TransportError.")
      .def("done", &Work::done, "True where wait would not block.");
}

void bind_transport(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  py::class_<Collective>(m, "Collective", "One collective call; what each rank passes is in csrc/transport.hpp.")
      .def(py::init(&collective), "kind"_a, "input"_a, "output"_a, "numel"_a, "dtype"_a, "op"_a, "root"_a, "tag"_a,
           "input_splits"_a, "output_splits"_a, "stream"_a = 0);
  py::class_<Message>(m, "Message", "One message to or from a peer.")
      .def(py::init(&message), "data"_a, "numel"_a, "dtype"_a, "peer"_a, "tag"_a, "stream"_a = 0);
  py::class_<Transport, std::shared_ptr<Transport>>(m, "Transport", "Addresses are ints, dtypes and ops their codes.")
      .def("run", &Transport::run, "call"_a, "timeout"_a, release(), "Carries out a collective.")
      .def("post", &Transport::post, "call"_a, "timeout"_a, release(), "Posts a collective.")
      .def("isend", [](Transport& t, const Message& message) { return t.isend(message, false); }, "message"_a,
           release(), "Posts a send.")
      .def("irecv", [](Transport& t, const Message& message) { return t.irecv(message, false); }, "message"_a,
           release(), "Posts a receive.")
      .def("send", [](Transport& t, const Message& message, double timeout) { t.isend(message, true)->wait(timeout); },
           "message"_a, "timeout"_a, release(), "Sends.")
      .def("recv", [](Transport& t, const Message& message, double timeout) { t.irecv(message, true)->wait(timeout); },
           "message"_a, "timeout"_a, release(), "Receives.")
      .def("abort", &Transport::abort, "reason"_a, release(), "Every rank raises PeerFailed with this reason.")
      .def("close", &Transport::close, release(), "Leaves the group; a second call does nothing.")
      .def("last_ops", &Transport::last_ops, release(), "One line a rank: what it is in, and what it did last.");
}

void bind_shm(py::module_& m) {
  py::class_<shm::Block, std::shared_ptr<shm::Block>>(m, "Block", py::buffer_protocol(), "Memory in the segment.")
      .def_buffer([](shm::Block& b) { return py::buffer_info(reinterpret_cast<uint8_t*>(b.data), py::ssize_t(b.bytes)); });
  py::class_<shm::ShmTransport, Transport, std::shared_ptr<shm::ShmTransport>>(m, "ShmTransport")
      .def("allocate", &shm::ShmTransport::allocate, "bytes"_a, py::call_guard<py::gil_scoped_release>(),
           "Memory that calls lend to the peers instead of copying it in.");
  py::class_<shm::SegmentServer>(m, "SegmentServer", "Group rank 0's side of sharing one sealed memory segment.")
      .def(py::init<int>(), "world"_a)
      .def_property_readonly("address", &shm::SegmentServer::address)
      .def_property_readonly("nonce", &shm::SegmentServer::nonce)
      .def("serve", &shm::SegmentServer::serve, "seconds"_a, py::call_guard<py::gil_scoped_release>(),
           "Answers at most one caller, waiting at most `seconds` for it.")
      .def("transport",
           [](shm::SegmentServer& s) {
             return std::make_shared<shm::ShmTransport>(s.segment(), 0);
           },
           "The transport of rank 0.");
  m.def("attach",
        [](const std::string& address, const std::string& nonce, int world, int rank) {
          return std::make_shared<shm::ShmTransport>(shm::fetch_segment(address, nonce, world, rank), rank);
        },
        "address"_a, "nonce"_a, "world"_a, "rank"_a, py::call_guard<py::gil_scoped_release>(),
        "The transport of another rank; TransportError where it cannot share memory with rank 0.");
}

py::object failure_of(nccl::NcclTransport& transport) {
  const std::optional<nccl::Failure> found = transport.failure();
  if (!found) return py::none();
  const py::object culprit = found->culprit < 0 ? py::object(py::none()) : py::object(py::int_(found->culprit));
  return py::make_tuple(error_class(found->code), culprit, found->text);
}

py::bytes unique_id() {
  nccl::UniqueId id{};
  const nccl::Result result = nccl::api().get_unique_id(&id);
  if (result != nccl::kSuccess)
    throw transport_error(nccl::error_code(result), -1, "ncclGetUniqueId says: " + nccl::words(result));
  return py::bytes(id.bytes, sizeof id.bytes);
}

void bind_nccl(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  using nccl::NcclTransport;
  m.def("load_cuda", [](const std::string& override) { return cuda::api(override).path; }, "override"_a,
        "Finds the CUDA driver (the first call decides) and returns its path; TransportError where there is none.");
  m.def("load_nccl",
        [](const std::string& override, const std::vector<std::string>& files) {
          const nccl::Api& api = nccl::api(override, files);
          return py::make_tuple(api.path, api.version, api.absent);
        },
        "override"_a, "files"_a, "Finds NCCL (the first call decides): its path, version and what it lacks.");
  m.def("nccl_unique_id", &unique_id, "What the ranks of one communicator share: bytes made by one of them.");
  py::class_<nccl::Mark, std::shared_ptr<nccl::Mark>>(m, "Mark", "A place in a stream.");
  py::class_<nccl::NcclWork, Work, std::shared_ptr<nccl::NcclWork>>(m, "NcclWork")
      .def("over", &nccl::NcclWork::over, "Whether the device is through with its buffers.")
      .def("order", &nccl::NcclWork::order, "stream"_a, release(), "What `stream` gets from now on comes after it.");
  py::class_<NcclTransport, Transport, std::shared_ptr<NcclTransport>>(m, "NcclTransport")
      .def(py::init<const std::string&, int, int, double, int>(), "id"_a, "rank"_a, "size"_a, "timeout"_a, "max_ctas"_a,
           release(), "Collective over the ranks; the current CUDA context is the rank's.")
      .def("connect", &NcclTransport::connect, "peer"_a, "sends"_a, "id"_a, "timeout"_a, release(),
           "Connects with a peer for messages in one direction.")
      .def("mark", &NcclTransport::mark, "stream"_a, release(), "This place in the stream.")
      .def("post_gated", &NcclTransport::post_gated, "call"_a, "timeout"_a, "after"_a, "address"_a, "value"_a,
           release(), "Posts a collective behind a mark and a counter.")
      .def("failure", &failure_of, "(error class, culprit, text) once the group has failed, else None.")
      .def("gates", &NcclTransport::gates, "Whether the driver can let a stream wait for a counter.")
      .def("streams", &NcclTransport::streams, "Of collectives, then of each pair in the order of connecting.");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled transports of tpmp_kernels; use tpmp_kernels.comm.";
  m.attr("ABI") = TPMP_ABI;
  m.attr("DTYPES") = dtypes();
  m.attr("KINDS") = kinds();
  m.attr("REDUCE_OPS") = reduce_ops();
  py::register_exception_translator(&translate);
  interrupt_hook = &check_signals;
  bind_work(m);
  bind_transport(m);
  bind_shm(m);
  bind_nccl(m);
}
