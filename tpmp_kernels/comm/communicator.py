"""The communicator: all_reduce, send, recv and barrier between the ranks of one group, whatever carries the bytes.

    comm = communicator(mesh["tp"].get_group())     # collective over the group; picks shm or process_group
    comm.all_reduce(x, tag="layer7.mlp")            # in place, blocking
    work = comm.irecv(y, src=0, tag="F3")           # posted: makes progress while the caller computes
    work.wait()

Peers are group ranks. A tag travels with each call: shm refuses a call whose partner passed another tag, so that two
swapped calls of equal shape are told apart.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from tpmp_kernels.errors import TransportError

OPS = ("sum", "avg", "max", "min", "prod")


class Work(ABC):
    """A posted transfer. Its tensor must not be touched (recv) or changed (send) before `wait` returned."""

    @abstractmethod
    def wait(self) -> None:
        """Block until the transfer is complete; raises what the blocking call would have raised."""

    @abstractmethod
    def done(self) -> bool:
        """True where `wait` would not block, be it for success or for an error."""


class Communicator(ABC):
    """Blocking and posted operations between the ranks of one group. Not to be shared by threads that race for order.

    Tensors are read and written without regard to autograd. A non-contiguous tensor is carried through a dense copy;
    one whose elements overlap in memory is refused where it would be written. After a TransportError every call
    raises that error again: close the communicator and make a new one.
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

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum", *, tag: str = "") -> torch.Tensor:
        """Combine `tensor` over the ranks in place and return it. `avg` needs a floating dtype."""
        if op not in OPS:
            raise ValueError(f"all_reduce: op is {op!r}; pass one of {', '.join(OPS)}")
        if op == "avg" and not tensor.dtype.is_floating_point:
            raise TypeError(f"all_reduce: avg of {tensor.dtype} would not be exact; use sum and divide as you need")
        dense = self._dense("all_reduce", tensor, written=True)
        with self._timed():
            self._all_reduce(dense, op, tag)
        _write_back(tensor, dense)
        return tensor

    def send(self, tensor: torch.Tensor, dst: int, *, tag: str = "") -> None:
        """Return once `tensor` may be changed, which can be before rank `dst` has received it."""
        self._check_peer("send", "dst", dst)
        self._isend(self._dense("send", tensor, written=False), dst, tag, waits=True).wait()

    def recv(self, tensor: torch.Tensor, src: int, *, tag: str = "") -> torch.Tensor:
        """Fill `tensor` with the next message of rank `src`, which must match in dtype and count; return it."""
        self._check_peer("recv", "src", src)
        dense = self._dense("recv", tensor, written=True)
        self._irecv(dense, src, tag, lambda: _write_back(tensor, dense), waits=True).wait()
        return tensor

    def isend(self, tensor: torch.Tensor, dst: int, *, tag: str = "") -> Work:
        """Post a send. Messages of one pair of ranks arrive in the order in which they were posted."""
        self._check_peer("send", "dst", dst)
        return self._isend(self._dense("send", tensor, written=False), dst, tag, waits=False)

    def irecv(self, tensor: torch.Tensor, src: int, *, tag: str = "") -> Work:
        """Post a receive; see isend for the order."""
        self._check_peer("recv", "src", src)
        dense = self._dense("recv", tensor, written=True)
        return self._irecv(dense, src, tag, lambda: _write_back(tensor, dense), waits=False)

    def barrier(self, *, tag: str = "") -> None:
        """Return once every rank of the group has called it."""
        with self._timed():
            self._barrier(tag)

    @abstractmethod
    def abort(self, reason: str) -> None:
        """Make every rank of the group raise PeerFailed with `reason`, now and in later calls, where it can be told."""

    @abstractmethod
    def last_ops(self) -> list[str]:
        """The last operations, one line of text each: of every rank on shm, of this rank elsewhere."""

    @abstractmethod
    def close(self) -> None:
        """Leave the group; a second call does nothing. Peers that wait for this rank raise PeerDied."""

    @abstractmethod
    def _check_tensor(self, call: str, tensor: torch.Tensor) -> None: ...

    @abstractmethod
    def _all_reduce(self, tensor: torch.Tensor, op: str, tag: str) -> None: ...

    @abstractmethod
    def _isend(self, tensor: torch.Tensor, dst: int, tag: str, *, waits: bool) -> Work:
        """Post the send; `waits` where the caller waits at once."""

    @abstractmethod
    def _irecv(self, tensor: torch.Tensor, src: int, tag: str, landed: Callable[[], None], *, waits: bool) -> Work:
        """Post the receive; its Work calls `landed()` once, when the bytes are in `tensor`, on the waiting thread."""

    @abstractmethod
    def _barrier(self, tag: str) -> None: ...

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is not None and not isinstance(error, TransportError):
            self.abort(f"{type(error).__name__}: {error}")
        self.close()

    def __repr__(self) -> str:
        return f"<{self.transport} communicator {self.name!r}: rank {self.rank} of {self.size}>"

    def _dense(self, call: str, tensor: torch.Tensor, *, written: bool) -> torch.Tensor:
        self._check_tensor(call, tensor)
        tensor = tensor.detach()
        if tensor.is_contiguous():
            return tensor
        overlapping = any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
        if written and overlapping:
            raise ValueError(
                f"{call}: tensor of strides {tensor.stride()} is expanded, several elements share one place in "
                "memory; pass tensor.contiguous()"
            )
        return tensor.contiguous()

    def _check_peer(self, call: str, name: str, peer: int) -> None:
        if not 0 <= peer < self.size or peer == self.rank:
            others = [r for r in range(self.size) if r != self.rank]
            raise ValueError(f"{call}: {name} is {peer} on rank {self.rank}; pass another group rank, one of {others}")

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


class SelfCommunicator(Communicator):
    """A group of one rank: collectives do nothing, and there is no peer to send to."""

    transport = "self"

    def __init__(self, *, name: str = "self", timeout: float = 60.0):
        super().__init__(0, 1, name=name, timeout=timeout)

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum", *, tag: str = "") -> torch.Tensor:
        if op not in OPS:
            raise ValueError(f"all_reduce: op is {op!r}; pass one of {', '.join(OPS)}")
        return tensor

    def barrier(self, *, tag: str = "") -> None:
        return None

    def _check_peer(self, call: str, name: str, peer: int) -> None:
        raise ValueError(f"{call}: {name} is {peer}, but this group has one rank and nobody to talk to")

    def abort(self, reason: str) -> None:
        return None

    def last_ops(self) -> list[str]:
        return []

    def close(self) -> None:
        return None

    # Never reached: the public methods above answer first.
    _check_tensor = _all_reduce = _isend = _irecv = _barrier = None
