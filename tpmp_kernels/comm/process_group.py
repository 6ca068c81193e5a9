"""The process_group transport: a communicator over any torch.distributed backend (gloo between hosts, for one).

Reductions run in the backend's order, and tags are not compared: two swapped calls of equal shape go unnoticed here.
"""

import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from tpmp_kernels.comm.communicator import Communicator, Work
from tpmp_kernels.errors import PeerDied, TransportError, TransportTimeout

_REDUCE_OPS = {
    "sum": dist.ReduceOp.SUM,
    "avg": dist.ReduceOp.SUM,  # gloo has no AVG: divided afterwards, on every backend alike
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
    "prod": dist.ReduceOp.PRODUCT,
}
_REMEDY = "close this communicator and the process group on every rank and make both anew"


class ProcessGroupCommunicator(Communicator):
    """The communicator's calls on `group`. Devices and dtypes are the backend's; errors name what it tells.

    With CUDA tensors a blocking call orders the current stream and does not block the host, so that `seconds` counts
    the enqueueing alone.
    """

    transport = "process_group"

    def __init__(self, group: dist.ProcessGroup, *, name: str = "", timeout: float = 60.0):
        super().__init__(dist.get_rank(group), dist.get_world_size(group), name=name, timeout=timeout)
        self._group = group
        self._failure: TransportError | None = None
        self._ops: deque[str] = deque(maxlen=32)
        self._count = 0

    def abort(self, reason: str) -> None:
        """Refuse further work here. torch.distributed has no way to tell the peers: they run into their timeout."""
        self._failure = self._failure or TransportError(f"rank {self.rank} aborted: {reason}", self.rank)

    def last_ops(self) -> list[str]:
        return list(self._ops)

    def close(self) -> None:
        """Refuse further work. The process group itself belongs to the caller and stays."""
        self._failure = self._failure or TransportError(f"communicator {self.name!r} is closed")

    def _check_tensor(self, call: str, tensor: torch.Tensor) -> None:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{call}: expected a torch.Tensor, got {type(tensor).__name__}")

    def _all_reduce(self, tensor: torch.Tensor, op: str, tag: str) -> None:
        self._finish(
            self._start(dist.all_reduce, f"all_reduce {op}", tensor, tag, tensor, op=_REDUCE_OPS[op], async_op=True)
        )
        if op == "avg":
            tensor.div_(self.size)

    def _isend(self, tensor: torch.Tensor, dst: int, tag: str, *, waits: bool) -> Work:
        return _ProcessGroupWork(
            self, self._start(dist.isend, f"send to rank {dst}", tensor, tag, tensor, group_dst=dst, peer=dst)
        )

    def _irecv(self, tensor: torch.Tensor, src: int, tag: str, landed: Callable[[], None], *, waits: bool) -> Work:
        op = self._start(dist.irecv, f"recv from rank {src}", tensor, tag, tensor, group_src=src, peer=src)
        return _ProcessGroupWork(self, op, landed)

    def _barrier(self, tag: str) -> None:
        self._finish(self._start(dist.barrier, "barrier", None, tag, async_op=True))

    def _start(self, call: Callable, what: str, tensor, tag: str, *args, peer: int | None = None, **kwargs) -> "_Op":
        if self._failure is not None:
            raise type(self._failure)(str(self._failure), self._failure.culprit)
        self._count += 1
        shape = "" if tensor is None else f" {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
        text = f"{what} #{self._count}{f' {tag!r}' if tag else ''}{shape}"
        self._ops.append(text)
        op = _Op(text, peer, tensor)
        try:
            op.work = call(*args, group=self._group, **kwargs)
        except (RuntimeError, dist.DistError) as error:
            self._fail(op, error)
        return op

    def _finish(self, op: "_Op") -> None:
        try:
            op.work.wait(timedelta(seconds=self.timeout))
        except (RuntimeError, dist.DistError) as error:
            self._fail(op, error)

    def _fail(self, op: "_Op", error: Exception) -> None:
        reason = str(error).splitlines()[0]
        timed_out = "imed out" in reason or "imeout" in reason
        lost = "onnection" in reason or "closed by peer" in reason
        kind = TransportTimeout if timed_out else PeerDied if lost else TransportError
        waited = time.monotonic() - op.start
        self._failure = kind(
            f"communicator {self.name!r}: {self._group.name()} says: {reason} | rank {self.rank} in {op.text} | "
            f"waited {waited:.2f} s of {self.timeout:g} s | do: {_REMEDY}",
            None if timed_out else op.peer,
        )
        raise self._failure from error


class _Op:
    """One call under way: its text for errors, and its tensor, which lives as long as the backend may touch it."""

    def __init__(self, text: str, peer: int | None, tensor: torch.Tensor | None):
        self.text, self.peer, self.tensor = text, peer, tensor
        self.start = time.monotonic()
        self.work = None


class _ProcessGroupWork(Work):
    def __init__(self, comm: ProcessGroupCommunicator, op: _Op, landed: Callable[[], None] | None = None):
        self._comm, self._op, self._landed = comm, op, landed

    def wait(self) -> None:
        if self._op is None:
            return
        with self._comm._timed():
            self._comm._finish(self._op)
        self._op = None
        if self._landed is not None:
            self._landed()

    def done(self) -> bool:
        """gloo reports a finished transfer only in `wait`: False here does not mean that it is still under way."""
        return self._op is None or self._op.work.is_completed()
