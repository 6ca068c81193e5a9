"""Products in chunks of rows, each with its collective posted in front of it or behind it. No autograd; matrices only.

reduced      [M, N] = sum over ranks of sum of terms          product, then all-reduce in place
scattered    [M/R, N], this rank's rows of that               product, then reduce-scatter
gathered     [M/R, K] of every rank                           all-gather, for the caller to multiply

A term (a [M, K], b [K, N]) is a @ b. Where rows are cut over the ranks a chunk holds the same rows of every rank's
shard, so that it is the others' chunk too.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tpmp_kernels.comm.communicator import Communicator, Work
from tpmp_kernels.comm.overlap.plan import Plan, bounds
from tpmp_kernels.ops.plain import widens

Term = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Pass:
    """The collectives of one pass: posted where it is chunked, else carried out at once."""

    comm: Communicator
    plan: Plan
    tag: str

    def start(self, call: Callable, *tensors: Tensor, part: str = "") -> Work | None:
        posted = self.plan.mode != "none"
        work = call(*tensors, tag=f"{self.tag}{part}", async_op=posted)
        return work if posted else None

    def chunks(self, rows: int) -> list[tuple[str, slice]]:
        """The name of each chunk, which tells it from those of a peer that cuts otherwise, and its rows."""
        cut = bounds(rows, self.plan.chunks)
        posted = self.plan.mode != "none"
        return [(f"[{i}/{len(cut)}]" if posted else "", each) for i, each in enumerate(cut)]


@dataclass(frozen=True)
class Pending:
    """A tensor that is on its way in pieces, or there."""

    tensor: Tensor
    works: Sequence[Work | None]

    def result(self) -> Tensor:
        for work in self.works:
            if work is not None:
                work.wait()
        return self.tensor


def reduced(terms: Sequence[Term], out: Tensor, to: Pass) -> Pending:
    """Fills out [M, N]."""
    terms, works = _widened(terms), []
    if to.plan.mode == "signal":
        from tpmp_kernels.comm.overlap.signal import signalled  # needs Triton

        ((a, b),) = terms
        return Pending(out, signalled(a, b.t(), out, to.comm, to.plan, to.tag))
    for part, rows in to.chunks(len(out)):
        sum_of_products([(a[rows], b) for a, b in terms], out[rows])
        works.append(to.start(to.comm.all_reduce, out[rows], part=part))
    return Pending(out, works)


def scattered(terms: Sequence[Term], out: Tensor, to: Pass) -> Pending:
    """Fills out [M/R, N]."""
    (m, n), ranks = out.shape, to.comm.size
    terms, works = [(a.unflatten(0, (ranks, m)), b) for a, b in _widened(terms)], []
    for part, rows in to.chunks(m):
        partial = out.new_empty(ranks, rows.stop - rows.start, n)
        sum_of_products([(a[:, rows], b) for a, b in terms], partial)
        works.append(to.start(to.comm.reduce_scatter, out[rows], partial, part=part))
    return Pending(out, works)


def gathered(shard_m: Tensor, to: Pass) -> Iterator[tuple[slice, Tensor]]:
    """For each chunk its rows and all ranks' [R, rows, K], once they are there. All are posted before the first is
    waited for: the link has no pause between them, and they are the whole that is wanted in any case."""
    pieces = []
    for part, rows in to.chunks(len(shard_m)):
        piece = shard_m.new_empty(to.comm.size, rows.stop - rows.start, shard_m.shape[1])
        pieces.append((rows, Pending(piece, [to.start(to.comm.all_gather, piece, shard_m[rows], part=part)])))
    for rows, piece in pieces:
        yield rows, piece.result()


def sum_of_products(terms: Sequence[Term], out: Tensor) -> None:
    """out [.., N] = sum of a [.., K] @ b [K, N]; b may be wider than a and out, and the sum is rounded once then."""
    (a, b), *others = [(a.flatten(0, -2), b) for a, b in terms]
    direct = out.is_contiguous() and out.dtype == b.dtype
    total = out.view(-1, b.shape[1]) if direct and b.shape[1] else b.new_empty(len(a), b.shape[1])
    torch.mm(a.to(b.dtype), b, out=total)
    for a, b in others:
        total.addmm_(a.to(b.dtype), b)
    if not direct:
        out.copy_(total.view(out.shape))


def widened(b: Tensor, a: Tensor) -> Tensor:
    """b, in fp32 where the ops would multiply a by it in fp32: once for all chunks."""
    return b.float() if widens(a, b) else b


def _widened(terms: Sequence[Term]) -> list[Term]:
    wide = any(widens(a, b) for a, b in terms)
    return [(a, b.float() if wide else b) for a, b in terms]
