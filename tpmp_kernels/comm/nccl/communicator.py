"""The nccl communicator: enqueues on streams of its own, and compares calls beside the data."""

import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist

from tpmp_kernels.comm import core_calls
from tpmp_kernels.comm._ext import C
from tpmp_kernels.comm.arguments import Collective
from tpmp_kernels.comm.communicator import Communicator, Work
from tpmp_kernels.comm.core_calls import DTYPES
from tpmp_kernels.comm.nccl.device import Device
from tpmp_kernels.comm.nccl.work import Kept, NcclWork, Probe
from tpmp_kernels.comm.out_of_band import agreement
from tpmp_kernels.comm.out_of_band.communicator import ComparedCommunicator, Interrupted, LibraryError, open_board
from tpmp_kernels.comm.out_of_band.reports import Call, Verdict
from tpmp_kernels.errors import PeerDied, TransportError, TransportTimeout

_REDUCED = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int8, torch.uint8,
)  # fmt: skip


class Gate(NamedTuple):
    """What `behind` waits for."""

    mark: object
    counters: torch.Tensor
    index: int
    count: int


class NcclCommunicator(ComparedCommunicator):
    """The communicator's calls for tensors on a GPU; those for CPU tensors, and barriers, go to `host`.

    A call enqueues on a stream of the transport's own, behind what the caller's current stream holds; a blocking call,
    or `wait()` of a posted one, makes the current stream wait for it. Neither blocks the host: only `barrier` does. So
    `seconds` counts the enqueueing, and an error may come with a later call. Collectives take place in the order of the
    calls, messages of an ordered pair of ranks likewise, each beside the others; the collectives of `host` are an order
    of their own. The first message with a peer connects the two, and waits on the host until the peer does so, too:
    `warm_up` does it in advance, and must where ranks begin by messages in a circle. Reductions run in NCCL's own order
    and rounding.

    Every operation has a deadline, `timeout` seconds from when the device comes to it. What is promised of mismatches,
    dead peers and abort() is what the process_group transport promises; once the group has failed, NCCL is aborted, so
    that no kernel spins on, and what the streams hold then is garbage: every later call says so. The process group
    itself stays whole: a new communicator can be made on it.

    Calls can be captured into a CUDA graph (all ranks alike, each posted call waited for inside; messages only after
    `warm_up`); a graph's launches have no deadline.
    """

    transport = "nccl"
    _remedy = "close this communicator on every rank and make a new one (communicator(group) again)"

    def __init__(
        self,
        group: dist.ProcessGroup,
        core,
        device: Device,
        host: Communicator | None,
        *,
        name: str = "",
        timeout: float = 60.0,
    ):
        """`host`: over the same ranks, this communicator's to close; None where the device's tensors are the host's."""
        board, self._store, _ = open_board(group, lambda: core.abort("the group has failed"))
        leave = weakref.finalize(self, _leave, board, core, host)
        super().__init__(board, leave, dist.get_rank(group), dist.get_world_size(group), name=name, timeout=timeout)
        self._core, self._device, self._host = core, device, host
        self._kept: list[Kept] = []
        self._gate: Gate | None = None  # of the calls that are posted now
        self._connected: set[int] = set()  # with these peers
        # A kernel of NCCL may spin for as long as the communicator lives.
        board.blocked.add(core)
        board.probe = Probe(core, self._kept, self.rank, timeout)

    @property
    def overlaps(self) -> bool:
        return True

    @property
    def gates(self) -> str:
        return self._device.type if self._core.gates() else ""

    def mark(self):
        """This place in the current stream, for `behind`."""
        return self._core.mark(self._device.stream())

    @contextmanager
    def behind(self, mark, counters: torch.Tensor, index: int, count: int) -> Iterator[None]:
        """A collective posted within waits for `mark` and until counters[index] (int32, contiguous) is at least
        `count`, instead of for all that the current stream holds: for a kernel that counts what it has stored."""
        self._gate = Gate(mark, counters, index, count)
        try:
            yield
        finally:
            self._gate = None

    def warm_up(self, pairs: Iterable[tuple[int, int]] | None = None) -> None:
        """Connect each (sender, receiver) of `pairs`, by default all, and send a byte; every rank passes the same.

        Connecting takes long, and cannot be captured into a graph.
        """
        everybody = range(self.size)
        pairs = [(a, b) for a in everybody for b in everybody] if pairs is None else pairs
        # In one order on all ranks: whom a rank waits for waits for nobody else.
        for low, high in sorted({(min(pair), max(pair)) for pair in pairs}):
            if low != high and self.rank in (low, high):
                peer, spare = low + high - self.rank, torch.zeros(2, dtype=torch.uint8, device=self._device.type)
                works = [self.isend(spare[:1], peer, tag="warm up"), self.irecv(spare[1:], peer, tag="warm up")]
                for work in works:
                    work.wait()

    def abort(self, reason: str) -> None:
        super().abort(reason)
        if self._host is not None:
            self._host.abort(reason)

    def close(self) -> None:
        """Leave the group. The process group belongs to the caller and stays."""
        self._leave()
        self._kept.clear()

    # ---- calls

    def _check_tensor(self, call: str, tensor: torch.Tensor) -> None:
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise TypeError(
                f"{call}: expected a plain torch.Tensor, got {type(tensor).__name__}; pass its local tensor"
            )
        if self._host is not None and tensor.is_cpu:
            self._host._check_tensor(call, tensor)
            return
        if tensor.device.type != self._device.type or tensor.layout != torch.strided:
            raise ValueError(
                f"{call}: nccl carries dense {self._device.type} tensors, got {tensor.layout} on {tensor.device}; move "
                "it, or make the communicator with transport='process_group'"
            )
        if tensor.is_conj() or tensor.is_neg():
            raise ValueError(
                f"{call}: tensor is a lazy conjugate or negative; pass tensor.resolve_conj().resolve_neg()"
            )
        reduces = call in ("all_reduce", "reduce", "reduce_scatter")
        if tensor.dtype not in (_REDUCED if reduces else DTYPES):
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in (_REDUCED if reduces else DTYPES))
            raise TypeError(f"{call}: nccl cannot {'reduce' if reduces else 'carry'} {tensor.dtype}; convert to one of "
                            f"{names}")  # fmt: skip

    def _run(self, call: Collective) -> None:
        if self._of_host(call.input, call.output):
            self._host._run(call)
        else:
            self._post(call, None).wait()

    def _post(self, call: Collective, landed: Callable[[], None] | None) -> Work:
        if self._of_host(call.input, call.output):
            if self._gate is not None:
                raise ValueError(f"{call.kind}: a call behind a counter needs {self._device.type} tensors; move them")
            return self._host._post(call, landed)
        record = self._record(call)
        posted = core_calls.collective(call, self._device.stream())
        if (gate := self._gate) is None:
            core = self._attempt(record, lambda _: self._core.post(posted, self.timeout), self.timeout)
            return self._keep(record, core, (call.input, call.output), landed)
        address = gate.counters.data_ptr() + gate.index * gate.counters.element_size()
        core = self._attempt(
            record, lambda _: self._core.post_gated(posted, self.timeout, gate.mark, address, gate.count), self.timeout
        )
        return self._keep(record, core, (call.input, call.output, gate.counters), landed)

    def _of_host(self, *tensors: torch.Tensor | None) -> bool:
        devices = {tensor.device for tensor in tensors if tensor is not None}
        if len(devices) > 1:
            raise ValueError(f"got tensors on {' and '.join(sorted(map(str, devices)))} in one call; move them to one")
        return self._host is not None and all(device.type == "cpu" for device in devices)

    def _isend(self, tensor: torch.Tensor, dst: int, tag: str) -> Work:
        if self._of_host(tensor):
            return self._host._isend(tensor, dst, tag)
        return self._transfer("send", self._core.isend, tensor, dst, tag, None)

    def _irecv(self, tensor: torch.Tensor, src: int, tag: str, landed: Callable[[], None] | None) -> Work:
        if self._of_host(tensor):
            return self._host._irecv(tensor, src, tag, landed)
        return self._transfer("recv", self._core.irecv, tensor, src, tag, landed)

    def _transfer(self, kind: str, call: Callable, tensor: torch.Tensor, peer: int, tag: str, landed) -> Work:
        record = self._record_message(kind, tensor, peer, tag)
        self._connect(record, peer)
        message = core_calls.message(tensor, peer, tag, self._device.stream())
        return self._keep(record, self._attempt(record, lambda _: call(message), self.timeout), (tensor,), landed)

    def _connect(self, record: Call, peer: int) -> None:
        """Connect with `peer` in both directions, unless that was done."""
        if peer in self._connected:
            return

        def connect(deadline: float) -> None:
            low, high = sorted((self.rank, peer))
            for sender, receiver in ((low, high), (high, low)):
                sends = sender == self.rank
                self._core.connect(peer, sends, self._pair_id(sender, receiver, sends, deadline), self.timeout)

        # Not as a wait of this rank's: to connect takes longer than ranks may wait in a circle.
        self._attempt(record, connect, self.timeout)
        self._connected.add(peer)

    def _pair_id(self, sender: int, receiver: int, sends: bool, deadline: float) -> bytes:
        """The unique id of a pair's communicator, which the sender makes."""
        key = f"pair/{sender}>{receiver}"
        if sends:
            self._store.set(key, C.nccl_unique_id().hex())
        while not self._store.check([key]):
            if self._board.failure is not None:
                raise Interrupted
            if time.monotonic() > deadline:
                raise TransportTimeout(
                    f"rank {sender} did not connect for messages with rank {receiver}; where ranks begin by messages "
                    "in a circle, call warm_up() first"
                )
            time.sleep(0.001)
        return bytes.fromhex(self._store.get(key).decode())

    def _keep(self, record: Call, core, tensors: tuple, landed) -> NcclWork:
        self._kept[:] = [kept for kept in self._kept if not kept.core.over()]
        self._kept.append(Kept(record, core, tensors))
        return NcclWork(self, self._kept[-1], landed)

    # ---- waits and errors

    def _attempt(self, record: Call, step: Callable, timeout: float):
        def guarded(deadline: float):
            if self._board.failure is not None:
                raise Interrupted
            try:
                return step(deadline)
            except TransportError as error:
                raise _CoreError(error) from None

        return super()._attempt(record, guarded, timeout)

    def _judge(self, record: Call, error: "_CoreError", waited: float) -> Verdict:
        if isinstance(error.error, TransportTimeout):
            return self._board.fail(lambda reports: agreement.timeout(reports, self.rank, waited, record))
        return self._board.fail(lambda _: verdict_of(error.error), grace=True)


class _CoreError(LibraryError):
    def __init__(self, error: TransportError):
        super().__init__(str(error))
        self.error = error


def verdict_of(error: TransportError) -> Verdict:
    if isinstance(error, PeerDied):
        return Verdict("PeerDied", error.culprit, f"a rank is lost: {error}")
    return Verdict(type(error).__name__, error.culprit, str(error))


def _leave(board, core, host: Communicator | None) -> None:
    """Not a method: it must run where the communicator has been collected, and at interpreter exit."""
    board.leave()
    board.failure = board.failure or Verdict("TransportError", None, "the communicator is closed")
    core.close()
    if host is not None:
        host.close()
