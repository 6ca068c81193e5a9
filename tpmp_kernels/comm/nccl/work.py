"""Calls under way: what a caller waits for, and what the board's thread asks of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tpmp_kernels.comm.communicator import Work
from tpmp_kernels.comm.out_of_band import agreement
from tpmp_kernels.comm.out_of_band.reports import Call, Verdict

if TYPE_CHECKING:
    from tpmp_kernels.comm.nccl.communicator import NcclCommunicator


@dataclass(frozen=True, eq=False)
class Kept:
    """The tensors of a call under way: the device still reads or writes them."""

    record: Call
    core: object
    tensors: tuple


class NcclWork(Work):
    def __init__(self, comm: "NcclCommunicator", kept: Kept, landed: Callable[[], None] | None):
        self._comm, self._kept, self._landed = comm, kept, landed

    def wait(self, timeout: float | None = None) -> None:
        """Make the current stream wait for the call; a barrier blocks the host, at most `timeout` seconds."""
        if self._kept is None:
            return
        comm, record, core = self._comm, self._kept.record, self._kept.core
        comm._check(record)
        seconds = comm.timeout if timeout is None else timeout
        if record.kind == "barrier":
            comm._await(record, lambda _: core.wait(seconds), seconds)
        else:
            comm._attempt(record, lambda _: core.order(comm._device.stream()), seconds)
        # What the stream does from here on comes after the call: the tensors may go.
        if self._kept in comm._kept:
            comm._kept.remove(self._kept)
        self._kept = None
        landed, self._landed = self._landed, None
        if landed is not None:
            landed()

    def done(self) -> bool:
        return self._kept is None or self._comm._board.failure is not None or self._kept.core.done()


class Probe:
    """Asked by the board's thread: what the transport's own watch has found, as a judge of the reports."""

    def __init__(self, core, kept: list[Kept], rank: int, timeout: float):
        self._core, self._kept, self._rank, self._timeout = core, kept, rank, timeout

    def __call__(self) -> tuple[Callable, bool] | None:
        """The judge, and whether it should wait for a word of somebody who knows more."""
        found = self._core.failure()
        if found is None:
            return None
        kind, culprit, text = found
        stuck = next((kept.record for kept in list(self._kept) if not kept.core.over()), None)
        if kind == "TransportTimeout" and stuck is not None:
            return lambda reports: agreement.timeout(reports, self._rank, self._timeout, stuck), False
        return lambda _: Verdict(kind, culprit, text), kind == "PeerDied"
