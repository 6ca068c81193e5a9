"""Collectives of CPU tensors made of point-to-point messages of gloo, each under a seal.

gloo ends the process where a rank receives more bytes than it expects, and mixes what does not belong together where
the bytes happen to fit: of nine ways to call different things none is named. Messages are matched by an integer tag as
well; ours, the seal, is a checksum of all that must agree about the call. So calls that differ never meet, and stay
unserved until the ranks have compared notes (board.py): nothing is overwritten, nobody is killed.

Reductions are computed in one fixed binary tree over ranks, 16-bit floats in fp32 with one rounding: all ranks hold the
same bits, those of the shm transport. Every rank talks to every other at once: in one round of messages where each gets
the whole, in two where each reduces a part and the parts are then gathered.
"""

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise

import torch
import torch.distributed as dist

from tpmp_kernels.comm.arguments import Collective
from tpmp_kernels.comm.out_of_band.board import Board
from tpmp_kernels.comm.out_of_band.communicator import Interrupted, LibraryError
from tpmp_kernels.comm.out_of_band.reports import Call

_SMALL = 1 << 14  # bytes up to which every rank reduces the whole, beyond two ranks
_PIECE = 1 << 22  # bytes of each rank that are reduced at a time: bounds the memory for what arrives

REFUSALS = (RuntimeError, ValueError)  # what torch.distributed raises, the second for a group that was destroyed

_COMBINE = {"sum": torch.add, "avg": torch.add, "max": torch.maximum, "min": torch.minimum, "prod": torch.mul}

Transfer = tuple[int, torch.Tensor]  # a peer, and what goes to or comes from it


@dataclass
class Pending:
    """A message under way; the tensor lives as long as gloo may touch it."""

    peer: int
    work: dist.Work
    tensor: torch.Tensor


class Messages:
    """Sends, receives and collectives of one communicator; `seed` tells its messages from others' on the same group."""

    def __init__(self, group: dist.ProcessGroup, seed: str, board: Board):
        self._group, self._seed, self._board = group, seed, board
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)

    def seal(self, call: Call, count: int = 0) -> int:
        text = f"{self._seed}|{call.lane}|{call.number}|{count}|{call.print()}"
        return zlib.crc32(text.encode()) >> 1  # gloo's tags have 31 bits

    def start(self, peer: int, tensor: torch.Tensor, seal: int, *, sends: bool) -> Pending:
        if self._board.failure is not None:
            raise Interrupted
        try:
            if sends:
                work = dist.isend(tensor, group=self._group, group_dst=peer, tag=seal)
            else:
                work = dist.irecv(tensor, group=self._group, group_src=peer, tag=seal)
        except REFUSALS as error:
            raise LibraryError(first_line(error), peer) from error
        return Pending(peer, work, tensor)

    def finish(self, pending: Sequence[Pending], deadline: float) -> None:
        """Wait for all of them. The group's failure breaks the wait off, through the board's interrupt."""
        blocked = self._board.blocked
        token = object()
        blocked.add(token)  # before the look at the failure: whoever fails looks at `blocked` afterwards
        try:
            for each in pending:
                if self._board.failure is not None:
                    raise Interrupted
                each.work.wait(timedelta(seconds=max(deadline - time.monotonic(), 0.001)))
        except REFUSALS as error:
            raise LibraryError(first_line(error), each.peer) from error
        finally:
            blocked.discard(token)

    def carry(self, call: Collective, record: Call, deadline: float) -> None:
        """Carry out the collective `call`, which the group knows as `record`."""
        getattr(self, f"_{call.kind}")(call, _Exchange(self, record, deadline))

    # ---- one function for each kind; `exchange` is a round of messages

    def _barrier(self, call: Collective, exchange: "_Exchange") -> None:
        token = torch.zeros(1, dtype=torch.uint8)
        exchange(self._to_others(lambda _: token), self._to_others(lambda _: torch.empty_like(token)))

    def _all_gather(self, call: Collective, exchange: "_Exchange") -> None:
        source, parts = as_bytes(call.input), as_bytes(call.output).chunk(self._size) if call.output.numel() else ()
        if len(parts):
            parts[self._rank].copy_(source)
            exchange(self._to_others(lambda _: source), self._to_others(parts.__getitem__))

    def _gather(self, call: Collective, exchange: "_Exchange") -> None:
        source = as_bytes(call.input)
        if self._rank != call.root:
            exchange([(call.root, source)], [])
        elif call.numel:
            parts = as_bytes(call.output).chunk(self._size)
            parts[self._rank].copy_(source)
            exchange([], self._to_others(parts.__getitem__))

    def _scatter(self, call: Collective, exchange: "_Exchange") -> None:
        target = as_bytes(call.output)
        if self._rank != call.root:
            exchange([], [(call.root, target)])
        elif call.numel:
            parts = as_bytes(call.input).chunk(self._size)
            target.copy_(parts[self._rank])
            exchange(self._to_others(parts.__getitem__), [])

    def _broadcast(self, call: Collective, exchange: "_Exchange") -> None:
        """A binomial tree: in each round whoever has the tensor passes it on, so that the root does not send R - 1."""
        whole = as_bytes(call.tensor)
        place = (self._rank - call.root) % self._size
        reach = 1
        while reach < self._size:
            if place < reach and place + reach < self._size:
                exchange([((self._rank + reach) % self._size, whole)], [])
            elif reach <= place < 2 * reach:
                exchange([], [((self._rank - reach) % self._size, whole)])
            reach *= 2

    def _all_to_all(self, call: Collective, exchange: "_Exchange") -> None:
        item = call.input.element_size()
        sizes = [[n * item for n in splits] or [call.numel * item] * self._size
                 for splits in (call.input_splits, call.output_splits)]  # fmt: skip
        sent, received = as_bytes(call.input).split(sizes[0]), as_bytes(call.output).split(sizes[1])
        received[self._rank].copy_(sent[self._rank])
        exchange(self._to_others(sent.__getitem__), self._to_others(received.__getitem__))

    def _reduce(self, call: Collective, exchange: "_Exchange") -> None:
        for piece in _pieces(call.input.view(-1)):
            if self._rank != call.root:
                exchange([(call.root, piece)], [])
            else:
                arrived = [piece if rank == self._rank else torch.empty_like(piece) for rank in range(self._size)]
                exchange([], self._to_others(arrived.__getitem__))
                reduce_into(piece, arrived, call.op)  # the root's output is its input

    def _reduce_scatter(self, call: Collective, exchange: "_Exchange") -> None:
        parts = call.input.view(-1).chunk(self._size) if call.numel else ()
        self._reduce_parts(parts, call.output.view(-1), call.op, exchange)

    def _all_reduce(self, call: Collective, exchange: "_Exchange") -> None:
        whole = call.output.view(-1)
        if self._size > 2 and whole.nbytes > _SMALL:
            bounds = [len(whole) * rank // self._size for rank in range(self._size + 1)]
            parts = [whole[low:high] for low, high in pairwise(bounds)]
            self._reduce_parts(parts, parts[self._rank], call.op, exchange)
            exchange(self._to_others(lambda _: parts[self._rank]), self._to_others(parts.__getitem__))
            return
        for piece in _pieces(whole):
            arrived = [piece if rank == self._rank else torch.empty_like(piece) for rank in range(self._size)]
            exchange(self._to_others(lambda _, piece=piece: piece), self._to_others(arrived.__getitem__))
            reduce_into(piece, arrived, call.op)

    def _reduce_parts(self, parts: Sequence[torch.Tensor], target: torch.Tensor, op: str, exchange) -> None:
        """Reduce part r of every rank on rank r; `target` may be the own part."""
        cut = [list(_pieces(part)) for part in parts]
        for i in range(max(map(len, cut), default=0)):
            mine = cut[self._rank][i] if i < len(cut[self._rank]) else target[:0]
            arrived = [mine if rank == self._rank else torch.empty_like(mine) for rank in range(self._size)]
            outgoing = [(rank, cut[rank][i]) for rank in self._others() if i < len(cut[rank])]
            exchange(outgoing, self._to_others(arrived.__getitem__))
            start = i * _elements(target)
            reduce_into(target[start : start + len(mine)], arrived, op)

    def _others(self) -> list[int]:
        """The peers, each rank beginning with its right neighbour, so that not all of them fall upon rank 0 first."""
        return [(self._rank + step) % self._size for step in range(1, self._size)]

    def _to_others(self, part: Callable[[int], torch.Tensor]) -> list[Transfer]:
        return [(rank, part(rank)) for rank in self._others()]


class _Exchange:
    """A round of messages of one collective: start all, wait for all. Empty ones are not sent: both ends know."""

    def __init__(self, messages: Messages, record: Call, deadline: float):
        self._messages, self._record, self._deadline = messages, record, deadline
        self._seal = messages.seal(record) if record.count != "split" else None

    def __call__(self, outgoing: Sequence[Transfer], incoming: Sequence[Transfer]) -> None:
        start, pending = self._messages.start, []
        for transfers, sends in ((incoming, False), (outgoing, True)):
            pending += [start(peer, t, self._of(t), sends=sends) for peer, t in transfers if t.numel()]
        self._messages.finish(pending, self._deadline)

    def _of(self, tensor: torch.Tensor) -> int:
        # The splits of an all_to_all are a matter of each pair, so that the count of the part belongs to the seal.
        return self._messages.seal(self._record, tensor.numel()) if self._seal is None else self._seal


def reduce_into(target: torch.Tensor, parts: Sequence[torch.Tensor], op: str) -> None:
    """Combine `parts` in the tree that joins neighbours, then neighbours of neighbours; `target` may be one of them."""
    combine = _COMBINE[op]
    wide = torch.float32 if target.dtype in (torch.float16, torch.bfloat16) else target.dtype
    level = [part.to(wide) for part in parts]
    while len(level) > 2:
        pairs = [level[i : i + 2] for i in range(0, len(level), 2)]
        level = [combine(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
    result = combine(*level, out=target) if wide == target.dtype else combine(*level)
    if op == "avg":
        result.div_(len(parts))
    if result is not target:
        target.copy_(result)


def _elements(tensor: torch.Tensor) -> int:
    return max(1, _PIECE // tensor.element_size())


def _pieces(flat: torch.Tensor) -> Sequence[torch.Tensor]:
    return flat.split(_elements(flat)) if flat.numel() else ()


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
