"""The process_group transport: a communicator over any torch.distributed backend (gloo between hosts, for one)."""

import weakref
from collections.abc import Callable

import torch
import torch.distributed as dist

from tpmp_kernels.comm.arguments import Collective
from tpmp_kernels.comm.communicator import Work
from tpmp_kernels.comm.out_of_band import agreement
from tpmp_kernels.comm.out_of_band.board import Board
from tpmp_kernels.comm.out_of_band.communicator import NAMES, ComparedCommunicator, LibraryError, open_board
from tpmp_kernels.comm.out_of_band.reports import Call, Verdict
from tpmp_kernels.comm.process_group.helpers import FOREVER, Helpers, Interrupt, Message
from tpmp_kernels.comm.process_group.messages import Messages, as_bytes
from tpmp_kernels.comm.process_group.native import Native

_REDUCED = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8,
)  # fmt: skip
_NOT_REDUCED_BY = {"nccl": (torch.int16,)}


class ProcessGroupCommunicator(ComparedCommunicator):
    """The communicator's calls on `group`, with the backend that the group has for the device of each tensor.

    CPU tensors on gloo go as sealed messages (messages.py): what does not match is never delivered, all ranks hold the
    same bits, and sums of 16-bit floats are rounded once. Other backends carry out collectives by their own functions,
    in their own order: data may be garbage before a mismatch is found. On those that order calls by streams (NCCL) a
    blocking call does not block the host, so that `seconds` counts the enqueueing, `timeout` does not apply, and errors
    come with a later call.

    Promised, through the torch Store and a small thread (board.py), on every rank with one class and culprit:
    - CollectiveMismatch within about 1 s of the calls that differ in kind, dtype, count, reduce op, root, tag, order,
      peer or splits, or wait for each other in a circle; in the current wait or the next call.
    - PeerFailed with the text of abort(), or of an exception inside `with`.
    - PeerDied where a process has died: within about 1 s for ranks of one host, 11 s for those of another unless the
      backend tells earlier; and where a rank left the group that another one waits for.
    - TransportTimeout with what each rank was doing.

    Not promised: a comparison of calls made less than about 0.2 s before close(); any of it once the process that
    serves the Store is gone, where each rank reports what it sees itself; culprits where two things go wrong at once.
    A wait that is broken off breaks the backend's connections: the process group is then of no more use either, nor
    are other communicators on it. This also happens in close() with posted calls under way.
    """

    transport = "process_group"
    _remedy = "close this communicator and the process group on every rank and make both anew"

    def __init__(self, group: dist.ProcessGroup, *, name: str = "", timeout: float = 60.0):
        self._backends: dict[str, str] = dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))
        self._group = group
        interrupt = Interrupt(group, self._backends)
        board, _, seed = open_board(group, interrupt)
        self._messages, self._native = Messages(group, seed, board), Native(group, board)
        self._helpers = Helpers(board)
        leave = weakref.finalize(self, _leave, board, self._helpers, interrupt)
        super().__init__(board, leave, dist.get_rank(group), dist.get_world_size(group), name=name, timeout=timeout)
        self._unwaited: set[Message] = set()  # gloo gives up a message, and its peer waits, once nobody holds its Work

    @property
    def overlaps(self) -> bool:
        """NCCL computes on the GPU's own streams; gloo's messages take the host's cores."""
        return "nccl" in self._backends.values()

    def close(self) -> None:
        """Leave the group. The process group itself belongs to the caller and stays."""
        self._leave()
        self._unwaited.clear()

    # ---- calls

    def _check_tensor(self, call: str, tensor: torch.Tensor) -> None:
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise TypeError(
                f"{call}: expected a plain torch.Tensor, got {type(tensor).__name__}; pass its local tensor"
            )
        backend = self._backends.get(tensor.device.type)
        if backend is None or tensor.layout != torch.strided:
            known = ", ".join(self._backends)
            raise ValueError(f"{call}: got a {tensor.layout} tensor on {tensor.device}; pass a dense one on {known}")
        if tensor.is_conj() or tensor.is_neg():
            raise ValueError(
                f"{call}: tensor is a lazy conjugate or negative; pass tensor.resolve_conj().resolve_neg()"
            )
        if call in ("send", "recv") and backend == "gloo" and tensor.device.type != "cpu":
            raise ValueError(f"{call}: gloo sends CPU tensors only, got one on {tensor.device}; pass tensor.cpu()")
        if call in ("all_reduce", "reduce", "reduce_scatter"):
            reduced = [dtype for dtype in _REDUCED if dtype not in _NOT_REDUCED_BY.get(backend, ())]
            if tensor.dtype not in reduced:
                names = ", ".join(map(NAMES.__getitem__, reduced))
                raise TypeError(f"{call}: {backend} cannot reduce {tensor.dtype}; convert to one of {names}")

    def _run(self, call: Collective) -> None:
        record = self._record(call)
        if self._sealed(call.tensor):
            self._await(record, lambda deadline: self._messages.carry(call, record, deadline), self.timeout)
        else:
            self._await(record, lambda deadline: self._start(call).finish(deadline), self.timeout)

    def _post(self, call: Collective, landed: Callable[[], None] | None) -> Work:
        record = self._record(call)
        if self._sealed(call.tensor):
            messages = self._messages
            return _PostedWork(self, record, self._helpers.post(lambda: messages.carry(call, record, FOREVER)), landed)
        return _PostedWork(self, record, self._attempt(record, lambda _: self._start(call), self.timeout), landed)

    def _isend(self, tensor: torch.Tensor, dst: int, tag: str) -> Work:
        return self._transfer("send", tensor, dst, tag, None)

    def _irecv(self, tensor: torch.Tensor, src: int, tag: str, landed: Callable[[], None] | None) -> Work:
        return self._transfer("recv", tensor, src, tag, landed)

    def _transfer(self, kind: str, tensor: torch.Tensor, peer: int, tag: str, landed) -> Work:
        record = self._record_message(kind, tensor, peer, tag)

        def start(_) -> object:
            if not self._sealed(tensor):
                return self._native.transfer(tensor, peer, sends=kind == "send", streams=self._streams(tensor))
            messages = self._messages
            pending = messages.start(peer, as_bytes(tensor), messages.seal(record), sends=kind == "send")
            message = Message(messages, self._helpers, pending)
            self._unwaited.add(message)
            return message

        return _PostedWork(self, record, self._attempt(record, start, self.timeout), landed)

    def _start(self, call: Collective):
        return self._native.start(call, streams=self._streams(call.tensor))

    def _sealed(self, tensor: torch.Tensor | None) -> bool:
        return (tensor is None or tensor.device.type == "cpu") and self._backends.get("cpu") == "gloo"

    def _streams(self, tensor: torch.Tensor | None) -> bool:
        """Whether the device orders the call. A barrier is for the host."""
        return tensor is not None and tensor.device.type != "cpu" and self._backends[tensor.device.type] != "gloo"

    def _judge(self, record: Call, error: LibraryError, waited: float) -> Verdict:
        reason, peer = str(error), error.peer
        if "imed out" in reason or ("imeout" in reason and "pair closure" not in reason):
            return self._board.fail(lambda reports: agreement.timeout(reports, self.rank, waited, record))
        said = f"{self._group.name()} says: {reason}"
        if peer >= 0 or "onnection" in reason or "closed by peer" in reason:
            whom = f"rank {peer}" if peer >= 0 else "a rank"
            verdict = Verdict("PeerDied", peer if peer >= 0 else None, f"{whom} is lost: {said}")
        else:
            verdict = Verdict("TransportError", None, said)
        return self._board.fail(lambda _: verdict, grace=True)


class _PostedWork(Work):
    def __init__(self, comm: ProcessGroupCommunicator, record: Call, operation, landed: Callable[[], None] | None):
        self._comm, self._record, self._operation, self._landed = comm, record, operation, landed

    def wait(self, timeout: float | None = None) -> None:
        if self._operation is None:
            return
        comm = self._comm
        with comm._timed():
            comm._check(self._record)
            comm._await(self._record, self._operation.finish, comm.timeout if timeout is None else timeout)
        comm._unwaited.discard(self._operation)
        self._operation = None
        landed, self._landed = self._landed, None
        if landed is not None:
            landed()

    def done(self) -> bool:
        return self._operation is None or self._comm._board.failure is not None or self._operation.ready()


def _leave(board: Board, helpers: Helpers, interrupt: Callable[[], None]) -> None:
    """Not a method: it must run where the communicator has been collected, and at interpreter exit."""
    board.leave()
    board.failure = board.failure or Verdict("TransportError", None, "the communicator is closed")
    helpers.close(interrupt)
