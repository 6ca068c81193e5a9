"""The shm transport: CPU ranks of one host over one sealed memory segment (csrc/shm), and how they come together.

Every rank of the group runs `connect`. Through the torch Store the ranks agree on a transport, rank 0 hands the
segment's file descriptor to each of the others, and only if all of them hold it is shm used: the descriptor is the
proof that they share memory. Everything exchanged is plain text.
"""

import time
import weakref
from collections.abc import Callable

import torch
import torch.distributed as dist

from tpmp_kernels.comm._ext import C
from tpmp_kernels.comm.communicator import Communicator, Work
from tpmp_kernels.errors import TransportError, TransportTimeout, UsageError

_DTYPES = {} if C is None else {getattr(torch, name): code for name, code in C.DTYPES.items()}
_REDUCIBLE = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8,
)  # fmt: skip
_MAX_RANKS = 64


class CannotShare(Exception):
    """The ranks of a group do not share memory, or not through shm; raised alike on every rank."""


class ShmCommunicator(Communicator):
    """The communicator's calls for CPU tensors. Reductions run in one fixed tree over ranks: all hold the same bits.

    Errors carry the culprit, the call with its number, tag and shape, and the time waited of the timeout.
    """

    transport = "shm"

    def __init__(self, core, rank: int, size: int, *, name: str = "", timeout: float = 60.0):
        super().__init__(rank, size, name=name, timeout=timeout)
        self._core = core
        # Also at interpreter exit: an orderly exit without close() is then seen as leaving, not as dying.
        self._leave = weakref.finalize(self, core.close)
        self._posted: list[tuple] = []  # (core work, tensor): buffers live until done, waited for or not

    def abort(self, reason: str) -> None:
        self._core.abort(reason)

    def last_ops(self) -> list[str]:
        return self._core.last_ops()

    def close(self) -> None:
        """Leave the group. What this rank has sent stays readable for its peers; its posted transfers end here."""
        self._leave()
        self._posted.clear()

    def _check_tensor(self, call: str, tensor: torch.Tensor) -> None:
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise TypeError(
                f"{call}: expected a plain torch.Tensor, got {type(tensor).__name__}; pass its local tensor"
            )
        if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.is_neg():
            raise ValueError(
                f"{call}: shm carries dense CPU tensors, got {tensor.layout} on {tensor.device}; "
                "move it, or make the communicator with transport='process_group'"
            )
        known = _REDUCIBLE if call == "all_reduce" else _DTYPES
        if tensor.dtype not in known:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in known)
            raise TypeError(f"{call}: shm cannot carry {tensor.dtype}; convert to one of {names}")

    def _all_reduce(self, tensor: torch.Tensor, op: str, tag: str) -> None:
        try:
            self._core.all_reduce(
                tensor.data_ptr(), tensor.numel(), _DTYPES[tensor.dtype], C.REDUCE_OPS[op], tag, self.timeout
            )
        except TransportError as error:
            raise _with_shape(error, tensor) from None

    def _barrier(self, tag: str) -> None:
        self._core.barrier(tag, self.timeout)

    def _isend(self, tensor: torch.Tensor, dst: int, tag: str, *, waits: bool) -> Work:
        return self._post(self._core.isend, tensor, dst, tag, None, waits)

    def _irecv(self, tensor: torch.Tensor, src: int, tag: str, landed: Callable[[], None], *, waits: bool) -> Work:
        return self._post(self._core.irecv, tensor, src, tag, landed, waits)

    def _post(self, call: Callable, tensor: torch.Tensor, peer: int, tag: str, landed, waits: bool) -> "_ShmWork":
        try:
            core = call(tensor.data_ptr(), tensor.numel(), _DTYPES[tensor.dtype], peer, tag, waits)
        except TransportError as error:
            raise _with_shape(error, tensor) from None
        self._posted = [(other, buffer) for other, buffer in self._posted if not other.done()]
        if not core.done():
            self._posted.append((core, tensor))
        return _ShmWork(self, core, tensor, landed)


class _ShmWork(Work):
    def __init__(self, comm: ShmCommunicator, core, tensor: torch.Tensor, landed: Callable[[], None] | None):
        self._comm, self._core, self._tensor, self._landed = comm, core, tensor, landed

    def wait(self) -> None:
        try:
            with self._comm._timed():
                self._core.wait(self._comm.timeout)
        except TransportError as error:
            raise _with_shape(error, self._tensor) from None
        landed, self._landed = self._landed, None
        if landed is not None:
            landed()

    def done(self) -> bool:
        return self._core.done()


def _with_shape(error: TransportError, tensor: torch.Tensor) -> TransportError:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return type(error)(f"{error} | tensor {dtype}{list(tensor.shape)}", error.culprit)


def connect(group: dist.ProcessGroup, *, wish: str | None, name: str, timeout: float) -> ShmCommunicator:
    """Make the shm communicator of `group`, or raise CannotShare with the same reason on every rank."""
    meeting = _Meeting(group, name, timeout)
    rank, size = meeting.rank, meeting.size
    wishes, obstacles = zip(*[text.split("|", 1) for text in meeting.exchange("wish", _wish(wish, size))], strict=True)
    if len(set(wishes)) > 1:
        told = ", ".join(f"rank {r} {w}" for r, w in enumerate(wishes))
        raise UsageError(f"communicator {name!r}: ranks ask for different transports ({told}); ask for the same")
    if wish == "process_group":
        raise CannotShare("process_group was asked for")
    _refuse_any(obstacles)
    if rank == 0:
        core, outcomes = _share(meeting)
    else:
        core, obstacle = _attach(meeting.get("segment"), size, rank)
        outcomes = meeting.exchange("attached", obstacle)
    try:
        _refuse_any(outcomes)
    except CannotShare:
        if core is not None:
            core.close()
        raise
    return ShmCommunicator(core, rank, size, name=name, timeout=timeout)


def _wish(wish: str | None, size: int) -> str:
    obstacle = ""
    if C is None:
        obstacle = "the compiled extension tpmp_kernels._C is missing or stale"
    elif size > _MAX_RANKS:
        obstacle = f"the group has {size} ranks, shm carries {_MAX_RANKS}"
    return f"{wish or 'any'}|{obstacle}"


def _refuse_any(obstacles) -> None:
    for rank, obstacle in enumerate(obstacles):
        if obstacle:
            raise CannotShare(f"rank {rank}: {obstacle}")


def _share(meeting: "_Meeting"):
    """Rank 0: make the segment and hand it to whoever calls, until every rank has said how it went."""
    try:
        server = C.SegmentServer(meeting.size)
        core = server.transport()
    except TransportError as error:
        meeting.set("segment", f"!{error}")
        return None, meeting.exchange("attached", str(error))
    meeting.set("segment", f"{server.address} {server.nonce}")
    try:
        return core, meeting.exchange("attached", "", meanwhile=lambda: server.serve(0.02))
    except TransportError:
        core.close()
        raise


def _attach(segment: str, size: int, rank: int):
    """Another rank: the transport and "", or None and the reason why this rank cannot have it."""
    if segment.startswith("!"):
        return None, ""  # rank 0 reports its own obstacle
    address, nonce = segment.split()
    try:
        return C.attach(address, nonce, size, rank), ""
    except TransportError as error:
        return None, str(error)


class _Meeting:
    """One creation of a communicator: a board of short texts in the torch Store, under a key of its own."""

    def __init__(self, group: dist.ProcessGroup, name: str, timeout: float):
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._name, self._timeout = name, timeout
        self._deadline = time.monotonic() + timeout
        store = dist.distributed_c10d._get_default_store()
        # Disjoint groups may bear one name, and a group may meet many times: each rank counts its own arrivals.
        members = ",".join(map(str, dist.get_process_group_ranks(group)))
        base = f"tpmp/{group.group_name}/{members}"
        number = store.add(f"{base}/arrivals/{self.rank}", 1)
        self._store = dist.PrefixStore(f"{base}/{number}", store)

    def set(self, key: str, text: str) -> None:
        self._store.set(key, text)

    def get(self, key: str) -> str:
        self._await([key], [0], None)
        return self._store.get(key).decode()

    def exchange(self, stage: str, text: str, meanwhile: Callable[[], None] | None = None) -> list[str]:
        """Show `text` to all ranks and return the texts of all, by rank; run `meanwhile` until they are there."""
        keys = [f"{stage}/{rank}" for rank in range(self.size)]
        # A Store value may not be empty on every backend: each text goes with a leading mark.
        self._store.set(keys[self.rank], f"={text}")
        self._await(keys, range(self.size), meanwhile)
        return [self._store.get(key).decode()[1:] for key in keys]

    def _await(self, keys: list[str], ranks, meanwhile: Callable[[], None] | None) -> None:
        while not self._store.check(keys):
            if time.monotonic() > self._deadline:
                missing = [rank for rank, key in zip(ranks, keys, strict=True) if not self._store.check([key])]
                whom = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
                raise TransportTimeout(
                    f"communicator {self._name!r}: {whom} did not come within {self._timeout:g} s | rank {self.rank} "
                    "| do: call communicator(group) on every rank of the group, in the same order on each",
                    missing[0] if len(missing) == 1 else None,
                )
            if meanwhile is None:
                time.sleep(0.001)
            else:
                meanwhile()
