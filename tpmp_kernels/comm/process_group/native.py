"""Collectives by a backend's own functions (NCCL's, for one), and the waits for them.

Movement goes as bytes, so that any dtype can be carried. A call on a device of its own (not gloo's) is ordered by the
current stream: waiting for it does not block the host.
"""

import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from tpmp_kernels.comm.arguments import Collective
from tpmp_kernels.comm.out_of_band.board import Board
from tpmp_kernels.comm.out_of_band.communicator import Interrupted, LibraryError
from tpmp_kernels.comm.process_group.messages import REFUSALS, as_bytes, first_line

_OPS = {
    "sum": dist.ReduceOp.SUM,
    "avg": dist.ReduceOp.SUM,  # divided afterwards, on every backend alike
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
    "prod": dist.ReduceOp.PRODUCT,
}
# The names of torch 2.13; those of 2.11 warn there that they are old.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Native:
    def __init__(self, group: dist.ProcessGroup, board: Board):
        self._group, self._board = group, board
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)

    def start(self, call: Collective, *, streams: bool) -> "Started":
        """Start the collective; `streams` where the device orders it."""
        if call.numel == 0 and not call.input_splits and call.kind != "barrier":
            return Started(self._board, None, streams)
        return self._guarded(lambda: getattr(self, f"_{call.kind}")(call), streams, self._averaged(call))

    def transfer(self, tensor: torch.Tensor, peer: int, *, sends: bool, streams: bool) -> "Started":
        if sends:
            return self._guarded(
                lambda: dist.isend(as_bytes(tensor), group=self._group, group_dst=peer), streams, peer=peer
            )
        return self._guarded(
            lambda: dist.irecv(as_bytes(tensor), group=self._group, group_src=peer), streams, peer=peer
        )

    def _guarded(self, start: Callable, streams: bool, then: Callable | None = None, peer: int = -1) -> "Started":
        if self._board.failure is not None:
            raise Interrupted
        if streams:
            self._board.blocked.add(Native)  # a device may hang in it for as long as the communicator lives
        try:
            return Started(self._board, start(), streams, then, peer)
        except REFUSALS as error:
            raise LibraryError(first_line(error), peer) from error

    def _averaged(self, call: Collective) -> Callable[[], None] | None:
        if call.op == "avg" and call.output is not None:
            return lambda: call.output.div_(self._size)
        return None

    def _barrier(self, call: Collective):
        return dist.barrier(group=self._group, async_op=True)

    def _all_reduce(self, call: Collective):
        return dist.all_reduce(call.output, _OPS[call.op], group=self._group, async_op=True)

    def _reduce(self, call: Collective):
        # Some backends reduce through the tensors of all ranks.
        tensor = call.input if self._rank == call.root else call.input.clone()
        return dist.reduce(tensor, op=_OPS[call.op], group=self._group, async_op=True, group_dst=call.root)

    def _reduce_scatter(self, call: Collective):
        output, input = call.output.view(-1), call.input.view(-1)
        return _reduce_scatter(output, input, op=_OPS[call.op], group=self._group, async_op=True)

    def _all_gather(self, call: Collective):
        return _all_gather(as_bytes(call.output), as_bytes(call.input), group=self._group, async_op=True)

    def _broadcast(self, call: Collective):
        return dist.broadcast(as_bytes(call.tensor), group=self._group, async_op=True, group_src=call.root)

    def _all_to_all(self, call: Collective):
        item = call.input.element_size()
        splits = [[n * item for n in splits] or None for splits in (call.output_splits, call.input_splits)]
        output, input = as_bytes(call.output), as_bytes(call.input)
        return dist.all_to_all_single(output, input, *splits, group=self._group, async_op=True)

    def _scatter(self, call: Collective):
        parts = list(as_bytes(call.input).chunk(self._size)) if self._rank == call.root else None
        return dist.scatter(as_bytes(call.output), parts, group=self._group, async_op=True, group_src=call.root)

    def _gather(self, call: Collective):
        parts = list(as_bytes(call.output).chunk(self._size)) if self._rank == call.root else None
        return dist.gather(as_bytes(call.input), parts, group=self._group, async_op=True, group_dst=call.root)


class Started:
    """A call that the backend carries out; `then` completes it where the backend has done its part."""

    def __init__(self, board: Board, work: dist.Work | None, streams: bool, then=None, peer: int = -1):
        self._board, self._work, self._streams, self._then, self._peer = board, work, streams, then, peer

    def finish(self, deadline: float) -> None:
        if self._work is not None:
            self._wait(deadline)
        if self._then is not None:
            self._then()

    def ready(self) -> bool:
        return self._work is None or self._work.is_completed()

    def _wait(self, deadline: float) -> None:
        blocked, token = self._board.blocked, object()
        blocked.add(token)
        try:
            if self._board.failure is not None:
                raise Interrupted
            if self._streams:
                self._work.wait()  # with a timeout it would block the host
            else:
                self._work.wait(timedelta(seconds=max(deadline - time.monotonic(), 0.001)))
        except REFUSALS as error:
            raise LibraryError(first_line(error), self._peer) from error
        finally:
            blocked.discard(token)
