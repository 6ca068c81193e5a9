"""The base of a transport whose calls are compared out of band: numbers them, tells the board, words the errors."""

import os
import time
from abc import abstractmethod
from collections import Counter, deque
from collections.abc import Callable

import torch
import torch.distributed as dist

from tpmp_kernels import errors
from tpmp_kernels.comm.arguments import Collective
from tpmp_kernels.comm.communicator import Communicator
from tpmp_kernels.comm.meeting import meeting_place
from tpmp_kernels.comm.out_of_band.board import Board
from tpmp_kernels.comm.out_of_band.bulletin import second_client
from tpmp_kernels.comm.out_of_band.reports import COLLECTIVES, Call, Verdict
from tpmp_kernels.errors import TransportError

NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


class Interrupted(Exception):
    """The group has failed (Board.failure says how) while this rank waited."""


class LibraryError(Exception):
    """The library below refused or broke off a call; `peer` is the group rank whose connection it was, else -1."""

    def __init__(self, reason: str, peer: int = -1):
        super().__init__(reason)
        self.peer = peer


def open_board(group: dist.ProcessGroup, interrupt: Callable[[], None]) -> tuple[Board, dist.Store, str]:
    """This rank's board, a part of the Store that is this communicator's own, and a seed that all ranks share."""
    # The seed is the first rank's to come, on all; nobody has to wait for anybody.
    seed = meeting_place(group).compare_set("seed", "", os.urandom(8).hex()).decode()
    store = dist.PrefixStore(f"tpmp/{seed}", second_client(dist.distributed_c10d._get_default_store()))
    board = Board(store, dist.get_rank(group), dist.get_world_size(group), interrupt, serves=dist.get_rank() == 0)
    return board, store, seed


class ComparedCommunicator(Communicator):
    """Collectives are one lane of numbered calls, messages of each ordered pair of ranks another (reports.py)."""

    _remedy: str  # what to do after an error

    def __init__(self, board: Board, leave, rank: int, size: int, *, name: str, timeout: float):
        """`leave`: the finalizer of this communicator, alive until it is closed."""
        super().__init__(rank, size, name=name, timeout=timeout)
        self._board, self._leave = board, leave
        self._numbers: Counter[str] = Counter()
        self._ops: deque[Call] = deque(maxlen=32)

    def abort(self, reason: str) -> None:
        if self._leave.alive:
            self._board.fail(lambda _: Verdict("PeerFailed", self.rank, f"rank {self.rank} failed: {reason}"))

    def last_ops(self) -> list[str]:
        return [call.numbered() for call in self._ops]

    def _record(self, call: Collective) -> Call:
        tensor = call.tensor
        count = "split" if call.input_splits else call.numel
        dtype, shape = ("", ()) if tensor is None else (NAMES[tensor.dtype], tensor.shape)
        return self._admit(COLLECTIVES, call.kind, dtype, count, call.op, call.root, call.tag, shape,
                           call.input_splits, call.output_splits)  # fmt: skip

    def _record_message(self, kind: str, tensor: torch.Tensor, peer: int, tag: str) -> Call:
        lane = f"{self.rank}>{peer}" if kind == "send" else f"{peer}>{self.rank}"
        return self._admit(lane, kind, NAMES[tensor.dtype], tensor.numel(), None, -1, tag, tensor.shape)

    def _admit(self, lane: str, *what) -> Call:
        """Number the call, and tell the board of it."""
        record = Call(lane, self._numbers[lane], *what)
        self._check(record)
        self._numbers[lane] += 1
        self._ops.append(record)
        self._board.record(record)
        return record

    def _check(self, record: Call) -> None:
        if self._board.forked():
            raise TransportError(f"communicator {self.name!r}: this process was forked from rank {self.rank}; make a "
                                 "communicator in the process that uses it")  # fmt: skip
        if not self._leave.alive:
            raise TransportError(f"communicator {self.name!r} is closed; make a new one")
        if self._board.failure is not None:
            raise self._error(self._board.failure, f"rank {self.rank} refused {record.words()}")

    def _await(self, record: Call, step: Callable, timeout: float) -> None:
        """`_attempt` in which the caller waits for its peers."""
        self._board.waits = record
        try:
            self._attempt(record, step, timeout)
        finally:
            self._board.waits = None

    def _attempt(self, record: Call, step: Callable, timeout: float):
        """`step(deadline)` as part of the call `record`, with its failures those of the group."""
        begun = time.monotonic()
        try:
            return step(begun + timeout)
        except Interrupted:
            verdict = self._board.failure
        except LibraryError as error:
            verdict = self._judge(record, error, time.monotonic() - begun)
        waited = f"waited {time.monotonic() - begun:.2f} s of {timeout:g} s"
        raise self._error(verdict, f"rank {self.rank} in {record.numbered()} | {waited}")

    @abstractmethod
    def _judge(self, record: Call, error: LibraryError, waited: float) -> Verdict:
        """Make what the library said, after so many seconds in the call, the failure of the group; return that."""

    def _error(self, verdict: Verdict, where: str) -> TransportError:
        text = f"communicator {self.name!r}: {verdict.text} | {where} | do: {self._remedy}"
        return getattr(errors, verdict.error)(text, verdict.culprit)
