"""The shm transport: CPU ranks of one host over one sealed memory segment (csrc/shm). meeting.py makes it."""

import math
import time
import weakref
from collections.abc import Callable

import torch

from tpmp_kernels.comm.arguments import Collective
from tpmp_kernels.comm.communicator import Communicator, Work
from tpmp_kernels.comm.core_calls import DTYPES, collective, message, with_shape
from tpmp_kernels.errors import TransportError

_REDUCIBLE = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
)  # fmt: skip
_REDUCING = ("all_reduce", "reduce", "reduce_scatter")


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
        self._posted: list[tuple] = []  # (core work, tensors): buffers live until done, waited for or not

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A tensor in this rank's part of the shared segment. Calls lend it to the peers instead of copying it in.

        Not collective: each rank allocates as it likes, and pages are reserved now, so that a lack of memory is a
        TransportError here. The memory is used again once the tensor and its views are gone, and returned when the
        last of them and the communicator are. A send of such a tensor completes only when it was received.
        """
        shape = torch.Size(*shape) if shape and not isinstance(shape[0], int) else torch.Size(shape)
        numel = math.prod(shape)
        if numel == 0:
            return torch.empty(shape, dtype=dtype)
        block = self._core.allocate(numel * dtype.itemsize)
        return torch.frombuffer(block, dtype=dtype, count=numel).view(shape)  # keeps the block alive

    def abort(self, reason: str) -> None:
        self._core.abort(reason)

    def last_ops(self) -> list[str]:
        return self._core.last_ops()

    def close(self) -> None:
        """Leave the group. What this rank has sent stays readable for its peers; its posted calls end here."""
        self._leave()
        self._posted.clear()

    def _check_tensor(self, call: str, tensor: torch.Tensor) -> None:
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise TypeError(
                f"{call}: expected a plain torch.Tensor, got {type(tensor).__name__}; pass its local tensor"
            )
        if not tensor.is_cpu or tensor.layout != torch.strided or tensor.is_neg() or tensor.is_conj():
            raise ValueError(
                f"{call}: shm carries dense CPU tensors, got {tensor.layout} on {tensor.device}; "
                "move it, or make the communicator with transport='process_group'"
            )
        known = _REDUCIBLE if call in _REDUCING else DTYPES
        if tensor.dtype not in known:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in known)
            raise TypeError(f"{call}: shm cannot carry {tensor.dtype}; convert to one of {names}")

    def _run(self, call: Collective) -> None:
        try:
            self._core.run(collective(call), self.timeout)
        except TransportError as error:
            raise with_shape(error, call.tensor) from None

    def _post(self, call: Collective, landed: Callable[[], None] | None) -> Work:
        try:
            core = self._core.post(collective(call), self.timeout)
        except TransportError as error:
            raise with_shape(error, call.tensor) from None
        return self._keep(core, (call.input, call.output), call.tensor, landed)

    def _isend(self, tensor: torch.Tensor, dst: int, tag: str) -> Work:
        return self._transfer(self._core.isend, tensor, dst, tag, None)

    def _irecv(self, tensor: torch.Tensor, src: int, tag: str, landed: Callable[[], None] | None) -> Work:
        return self._transfer(self._core.irecv, tensor, src, tag, landed)

    def _send(self, tensor: torch.Tensor, dst: int, tag: str) -> None:
        self._at_once(self._core.send, tensor, dst, tag)

    def _recv(self, tensor: torch.Tensor, src: int, tag: str) -> None:
        self._at_once(self._core.recv, tensor, src, tag)

    def _transfer(self, call: Callable, tensor: torch.Tensor, peer: int, tag: str, landed) -> "_ShmWork":
        try:
            core = call(message(tensor, peer, tag))
        except TransportError as error:
            raise with_shape(error, tensor) from None
        return self._keep(core, (tensor,), tensor, landed)

    def _at_once(self, call: Callable, tensor: torch.Tensor, peer: int, tag: str) -> None:
        start = time.perf_counter()
        try:
            call(message(tensor, peer, tag), self.timeout)
        except TransportError as error:
            raise with_shape(error, tensor) from None
        finally:
            self.seconds += time.perf_counter() - start

    def _keep(self, core, tensors: tuple, tensor: torch.Tensor | None, landed) -> "_ShmWork":
        self._posted = [(other, buffers) for other, buffers in self._posted if not other.done()]
        if not core.done():
            self._posted.append((core, tensors))
        return _ShmWork(self, core, tensor, landed)


class _ShmWork(Work):
    def __init__(self, comm: ShmCommunicator, core, tensor: torch.Tensor | None, landed: Callable[[], None] | None):
        self._comm, self._core, self._tensor, self._landed = comm, core, tensor, landed

    def wait(self, timeout: float | None = None) -> None:
        try:
            with self._comm._timed():
                self._core.wait(self._comm.timeout if timeout is None else timeout)
        except TransportError as error:
            raise with_shape(error, self._tensor) from None
        landed, self._landed = self._landed, None
        if landed is not None:
            landed()

    def done(self) -> bool:
        return self._core.done()
