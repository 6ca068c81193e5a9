"""The communicator: every collective and point-to-point call between the ranks of a group, whatever carries the bytes.

    comm = communicator(mesh["tp"].get_group())     # collective over the group; picks shm or process_group
    comm.all_reduce(x, tag="layer7.mlp")            # in place, blocking
    comm.all_gather(whole, shard)                   # outputs first, as in torch.distributed
    work = comm.all_reduce(g, async_op=True)        # posted: makes progress while the caller computes
    work.wait()

Peers and roots are group ranks. A tag travels with each call: a call whose partner passed another tag is an error, so
that two swapped calls of equal shape are told apart.

| call | input | output |
| --- | --- | --- |
| all_reduce | [n] | the same tensor: the reduction of all |
| reduce | [n] | the same tensor on `root`: the reduction of all |
| reduce_scatter | [R n] | [n]: part `rank` of the reduction |
| all_gather | [n] | [R n]: the inputs in order of rank |
| broadcast | [n] on `root` | the same tensor |
| all_to_all | [R n] | [R n]: part `rank` of every input, in order of rank; uneven parts by splits |
| scatter | [R n] on `root` | [n]: part `rank` |
| gather | [n] | [R n] on `root` |

R is the number of ranks, n any number of elements; only counts matter, not shapes.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence

import torch

from tpmp_kernels.comm import arguments
from tpmp_kernels.comm.arguments import Collective
from tpmp_kernels.errors import TransportError


class Work(ABC):
    """A posted call. Its tensors must not be touched (written) or changed (read) before `wait` returned."""

    @abstractmethod
    def wait(self, timeout: float | None = None) -> None:
        """Block until it is complete, at most `timeout` seconds (by default the communicator's); raises what the
        blocking call would have raised."""

    @abstractmethod
    def done(self) -> bool:
        """True where `wait` would not block, be it for success or for an error."""


class Communicator(ABC):
    """Blocking and posted operations between the ranks of one group. Not to be shared by threads that race for order.

    Collectives take place in the order in which each rank calls them, posted ones among them; messages of an ordered
    pair of ranks likewise. Tensors are read and written without regard to autograd. A non-contiguous tensor is carried
    through a dense copy; one whose elements overlap in memory is refused where it would be written. After a
    TransportError every call raises that error again: close the communicator and make a new one.
    """

    transport: str

    def __init__(self, rank: int, size: int, *, name: str, timeout: float):
        if not 0 < timeout < 1e9:  # also False for nan
            raise ValueError(f"communicator: timeout is {timeout!r} s; pass a positive number of seconds below 1e9")
        self.rank = rank
        self.size = size
        self.name = name
        self.timeout = timeout
        self.seconds = 0.0  # wall time spent inside blocking calls, cumulative

    @property
    def overlaps(self) -> bool:
        """True where a posted call moves its bytes while the caller computes, so that posting early hides it."""
        return False

    @property
    def gates(self) -> str:
        """The type of device on which a posted call can wait for a counter (NcclCommunicator.behind), or ""."""
        return ""

    # ---- collectives

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum", *, tag: str = "", async_op: bool = False):
        """Combine `tensor` over the ranks in place and return it (a Work where `async_op`). `avg` needs a floating
        dtype."""
        dense = self._dense("all_reduce", tensor, written=True)
        arguments.check_op("all_reduce", dense.dtype, op)
        return self._collect(Collective("all_reduce", dense.numel(), dense, dense, op, -1, tag), tensor, async_op)

    def reduce(self, tensor: torch.Tensor, root: int, op: str = "sum", *, tag: str = "", async_op: bool = False):
        """Combine `tensor` over the ranks into that of `root`; the others keep theirs. Returns it (or a Work)."""
        arguments.check_root("reduce", self.size, root)
        dense = self._dense("reduce", tensor, written=self.rank == root)
        arguments.check_op("reduce", dense.dtype, op)
        output = dense if self.rank == root else None
        return self._collect(Collective("reduce", dense.numel(), dense, output, op, root, tag), tensor, async_op)

    def reduce_scatter(
        self, output: torch.Tensor, input: torch.Tensor, op: str = "sum", *, tag: str = "", async_op: bool = False
    ):
        """Fill `output` [n] with this rank's part of the reduction of `input` [R n]; returns it (or a Work)."""
        target = self._dense("reduce_scatter", output, written=True)
        source = self._dense("reduce_scatter", input, written=False)
        arguments.check_op("reduce_scatter", source.dtype, op)
        arguments.check_parts("reduce_scatter", self.size, source, target, ("input", "output"))
        return self._collect(
            Collective("reduce_scatter", target.numel(), source, target, op, -1, tag), output, async_op
        )

    def all_gather(self, output: torch.Tensor, input: torch.Tensor, *, tag: str = "", async_op: bool = False):
        """Fill `output` [R n] with the `input` [n] of every rank, in order; returns it (or a Work)."""
        target = self._dense("all_gather", output, written=True)
        source = self._dense("all_gather", input, written=False)
        arguments.check_parts("all_gather", self.size, target, source, ("output", "input"))
        return self._collect(Collective("all_gather", source.numel(), source, target, tag=tag), output, async_op)

    def broadcast(self, tensor: torch.Tensor, root: int, *, tag: str = "", async_op: bool = False):
        """Fill `tensor` with that of `root`; returns it (or a Work)."""
        arguments.check_root("broadcast", self.size, root)
        sends = self.rank == root
        dense = self._dense("broadcast", tensor, written=not sends)
        ends = (dense, None) if sends else (None, dense)
        return self._collect(Collective("broadcast", dense.numel(), *ends, root=root, tag=tag), tensor, async_op)

    def all_to_all(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_splits: Sequence[int] = (),
        input_splits: Sequence[int] = (),
        *,
        tag: str = "",
        async_op: bool = False,
    ):
        """Send part r of `input` to rank r and fill part r of `output` from rank r; returns `output` (or a Work).

        Parts are equal by default; `output_splits` and `input_splits` give the rows (dimension 0) of each, and must be
        passed on every rank or on none.
        """
        target = self._dense("all_to_all", output, written=True)
        source = self._dense("all_to_all", input, written=False)
        call = Collective("all_to_all", 0, source, target, tag=tag)
        if len(output_splits) or len(input_splits):
            call.input_splits = arguments.elements("input", self.size, source, input_splits)
            call.output_splits = arguments.elements("output", self.size, target, output_splits)
        else:
            arguments.check_alike("all_to_all", self.size, target, source)
            call.numel = source.numel() // self.size
        return self._collect(call, output, async_op)

    def scatter(
        self, output: torch.Tensor, input: torch.Tensor | None, root: int, *, tag: str = "", async_op: bool = False
    ):
        """Fill `output` [n] with this rank's part of `root`'s `input` [R n]; elsewhere `input` is ignored. Returns
        `output` (or a Work)."""
        arguments.check_root("scatter", self.size, root)
        target, source = self._dense("scatter", output, written=True), None
        if self.rank == root:
            source = self._dense("scatter", input, written=False)
            arguments.check_parts("scatter", self.size, source, target, ("input", "output"))
        return self._collect(Collective("scatter", target.numel(), source, target, None, root, tag), output, async_op)

    def gather(
        self, output: torch.Tensor | None, input: torch.Tensor, root: int, *, tag: str = "", async_op: bool = False
    ):
        """Fill `root`'s `output` [R n] with the `input` [n] of every rank; elsewhere `output` is ignored. Returns
        `output` (or a Work)."""
        arguments.check_root("gather", self.size, root)
        source, target = self._dense("gather", input, written=False), None
        if self.rank == root:
            target = self._dense("gather", output, written=True)
            arguments.check_parts("gather", self.size, target, source, ("output", "input"))
        return self._collect(Collective("gather", source.numel(), source, target, None, root, tag), output, async_op)

    def barrier(self, *, tag: str = "", async_op: bool = False):
        """Return once every rank of the group has called it (or a Work)."""
        return self._collect(Collective("barrier", tag=tag), None, async_op)

    # ---- point to point

    def send(self, tensor: torch.Tensor, dst: int, *, tag: str = "") -> None:
        """Return once `tensor` may be changed, which can be before rank `dst` has received it."""
        arguments.check_peer("send", "dst", self.rank, self.size, dst)
        self._send(self._dense("send", tensor, written=False), dst, tag)

    def recv(self, tensor: torch.Tensor, src: int, *, tag: str = "") -> torch.Tensor:
        """Fill `tensor` with the next message of rank `src`, which must match in dtype and count; return it."""
        arguments.check_peer("recv", "src", self.rank, self.size, src)
        dense = self._dense("recv", tensor, written=True)
        self._recv(dense, src, tag)
        _write_back(tensor, dense)
        return tensor

    def isend(self, tensor: torch.Tensor, dst: int, *, tag: str = "") -> Work:
        """Post a send. Messages of one pair of ranks arrive in the order in which they were posted."""
        arguments.check_peer("send", "dst", self.rank, self.size, dst)
        return self._isend(self._dense("send", tensor, written=False), dst, tag)

    def irecv(self, tensor: torch.Tensor, src: int, *, tag: str = "") -> Work:
        """Post a receive; see isend for the order."""
        arguments.check_peer("recv", "src", self.rank, self.size, src)
        dense = self._dense("recv", tensor, written=True)
        return self._irecv(dense, src, tag, lambda: _write_back(tensor, dense))

    def warm_up(self, pairs: Iterable[tuple[int, int]] | None = None) -> None:
        """Collective: connect in advance for messages of each (sender, receiver), by default of all, where a transport
        would do so at the first message."""
        return

    # ---- memory, faults, life

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A tensor in memory that this transport carries without copying it in first, where it has such memory."""
        return torch.empty(*shape, dtype=dtype)

    @abstractmethod
    def abort(self, reason: str) -> None:
        """Make every rank of the group raise PeerFailed with `reason`, now and in later calls, where it can be told."""

    @abstractmethod
    def last_ops(self) -> list[str]:
        """The last operations, one line of text each: of every rank on shm, of this rank elsewhere."""

    @abstractmethod
    def close(self) -> None:
        """Leave the group; a second call does nothing. Peers that wait for this rank raise PeerDied."""

    # ---- what a transport implements

    @abstractmethod
    def _check_tensor(self, call: str, tensor: torch.Tensor) -> None:
        """Raise TypeError or ValueError where the transport cannot carry it."""

    @abstractmethod
    def _run(self, call: Collective) -> None:
        """Carry the call out, blocking."""

    @abstractmethod
    def _post(self, call: Collective, landed: Callable[[], None] | None) -> Work:
        """Post the call; its Work calls `landed()` once, when the bytes are in place, on the waiting thread."""

    @abstractmethod
    def _isend(self, tensor: torch.Tensor, dst: int, tag: str) -> Work:
        """Post the send."""

    @abstractmethod
    def _irecv(self, tensor: torch.Tensor, src: int, tag: str, landed: Callable[[], None] | None) -> Work:
        """Post the receive; `landed` as in _post."""

    def _send(self, tensor: torch.Tensor, dst: int, tag: str) -> None:
        """Send, blocking; a transport may have a shorter way than to post and wait."""
        self._isend(tensor, dst, tag).wait()

    def _recv(self, tensor: torch.Tensor, src: int, tag: str) -> None:
        """Receive, blocking."""
        self._irecv(tensor, src, tag, None).wait()

    def __enter__(self) -> "Communicator":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is not None and not isinstance(error, TransportError):
            self.abort(f"{type(error).__name__}: {error}")
        self.close()

    def __deepcopy__(self, memo: dict) -> "Communicator":
        """Itself: a copy of what calls it stands among the same ranks."""
        return self

    def __repr__(self) -> str:
        return f"<{self.transport} communicator {self.name!r}: rank {self.rank} of {self.size}>"

    def _collect(self, call: Collective, result: torch.Tensor | None, async_op: bool):
        """Run or post the call. `result` is the caller's tensor: to be returned, and to hold what the dense output
        holds where this rank has one."""
        written = call.output is not None
        if async_op:
            return self._post(call, (lambda: _write_back(result, call.output)) if written else None)
        with self._timed():
            self._run(call)
        if written:
            _write_back(result, call.output)
        return result

    def _dense(self, call: str, tensor: torch.Tensor, *, written: bool) -> torch.Tensor:
        self._check_tensor(call, tensor)
        return arguments.dense(call, tensor, written=written)

    def _timed(self) -> "_Timed":
        return _Timed(self)


class _Timed:
    """Adds the time of a `with` block to `comm.seconds`; cheaper than contextlib's generator."""

    __slots__ = ("comm", "start")

    def __init__(self, comm: Communicator):
        self.comm = comm

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_) -> None:
        self.comm.seconds += time.perf_counter() - self.start


def _write_back(tensor: torch.Tensor, dense: torch.Tensor) -> None:
    if dense.data_ptr() != tensor.data_ptr():
        tensor.detach().copy_(dense)
    elif not tensor.is_inference():
        # The bytes changed behind autograd's back: a tensor saved for backward must be noticed as stale.
        torch.autograd.graph.increment_version(tensor)


class Done(Work):
    """The Work of a call that is complete when it returns."""

    def wait(self, timeout: float | None = None) -> None:
        return None

    def done(self) -> bool:
        return True
