"""Collectives as data: what each rank passes, and what each must hold afterwards, computed on one rank alone.

case = Case("reduce_scatter", n=97, dtype=torch.bfloat16, op="sum")
mine = case.run(comm, memory=comm.empty)     # the output on this rank, and whether what must not change has not
want = case.expected(comm.rank, comm.size)
"""

import itertools
from dataclasses import dataclass

import torch

KINDS = ("all_reduce", "reduce", "reduce_scatter", "all_gather", "broadcast", "all_to_all", "scatter", "gather")
REDUCING = ("all_reduce", "reduce", "reduce_scatter")
OPS = {"sum": torch.add, "avg": torch.add, "max": torch.maximum, "min": torch.minimum, "prod": torch.mul}


@dataclass(frozen=True)
class Case:
    """`n` as in communicator.py's table; `root` is taken modulo the number of ranks."""

    kind: str
    n: int
    dtype: torch.dtype = torch.float32
    op: str = "sum"
    root: int = 1
    uneven: bool = False  # all_to_all: rank r sends (r + d) % 3 * n elements to rank d

    def splits(self, rank: int, size: int) -> list[int]:
        return [(rank + d) % 3 * self.n for d in range(size)]

    def input(self, rank: int, size: int) -> torch.Tensor:
        count = self.n * size if self.kind in ("reduce_scatter", "scatter", "all_to_all") else self.n
        if self.uneven:
            count = sum(self.splits(rank, size))
        generator = torch.Generator().manual_seed(1000 * self.n + 7 * rank + KINDS.index(self.kind))
        if self.dtype.is_floating_point or self.dtype.is_complex:
            return torch.randn(count, generator=generator).to(self.dtype)
        return torch.randint(0, 100, (count,), generator=generator).to(self.dtype)

    def expected(self, rank: int, size: int) -> torch.Tensor | None:
        """The output on `rank`; None where it gets nothing."""
        inputs, root, n = [self.input(r, size) for r in range(size)], self.root % size, self.n
        if self.kind in ("reduce", "gather") and rank != root:
            return None
        if self.kind in ("all_reduce", "reduce"):
            return tree(inputs, self.op)
        if self.kind == "reduce_scatter":
            return tree(inputs, self.op)[rank * n : (rank + 1) * n]
        if self.kind in ("all_gather", "gather"):
            return torch.cat(inputs)
        if self.kind == "broadcast":
            return inputs[root]
        if self.kind == "scatter":
            return inputs[root][rank * n : (rank + 1) * n]
        return torch.cat([self._part(inputs[r], r, rank, size) for r in range(size)])

    def _part(self, whole: torch.Tensor, sender: int, receiver: int, size: int) -> torch.Tensor:
        splits = self.splits(sender, size) if self.uneven else [self.n] * size
        return whole.split(splits)[receiver]

    def post(self, comm, *, memory=torch.empty, tag: str = ""):
        """Post it on this rank; a function that waits, and returns the output and the tensors that it may not have
        changed with what they held."""
        rank, size, root = comm.rank, comm.size, self.root % comm.size
        source, want = self.input(rank, size), self.expected(rank, size)
        held = memory(source.shape, dtype=self.dtype)
        held.copy_(source)
        output = None if want is None else memory(want.shape, dtype=self.dtype).fill_(99)
        named = {"tag": tag, "async_op": True}
        if self.kind == "all_reduce":
            output, work = held, comm.all_reduce(held, self.op, **named)
        elif self.kind == "reduce":
            output, work = (held if rank == root else None), comm.reduce(held, root, self.op, **named)
        elif self.kind == "reduce_scatter":
            work = comm.reduce_scatter(output, held, self.op, **named)
        elif self.kind == "all_gather":
            work = comm.all_gather(output, held, **named)
        elif self.kind == "broadcast":
            output = held if rank == root else output
            work = comm.broadcast(output, root, **named)
        elif self.kind == "all_to_all":
            theirs = [self.splits(r, size)[rank] for r in range(size)]
            splits = (theirs, self.splits(rank, size)) if self.uneven else ()
            work = comm.all_to_all(output, held, *splits, **named)
        elif self.kind == "scatter":
            work = comm.scatter(output, held if rank == root else None, root, **named)
        else:
            work = comm.gather(output, held, root, **named)

        def finish():
            work.wait()
            untouched = output is held or same_bits(held, source)
            return output, untouched

        return finish

    def wrong(self, comm, output: torch.Tensor | None, untouched: bool) -> str:
        """What is wrong with the outcome on this rank, or an empty text."""
        want = self.expected(comm.rank, comm.size)
        if not untouched:
            return f"{self}: the input changed"
        if (output is None) != (want is None) or (want is not None and not same_bits(output, want)):
            return f"{self}: the output is not what it must be"
        return ""


def grid(sizes, dtypes, moved=()) -> list[Case]:
    """Every kind, size, dtype and reduce op; dtypes of `moved` where nothing is reduced."""
    cases = []
    for kind, n in itertools.product(KINDS, sizes):
        for dtype, op in itertools.product(dtypes, OPS if kind in REDUCING else [""]):
            if op != "avg" or dtype.is_floating_point:
                cases.append(Case(kind, n, dtype, op or "sum"))
        if kind not in REDUCING:
            cases += [Case(kind, n, dtype) for dtype in moved]
    return [*cases, *(Case("all_to_all", n, torch.float32, uneven=True) for n in sizes)]


def tree(parts: list[torch.Tensor], op: str) -> torch.Tensor:
    """((0+1)+(2+3))+..., an odd one out moves up; halves accumulate in fp32 and round once."""
    dtype, size = parts[0].dtype, len(parts)
    if dtype in (torch.bfloat16, torch.float16):
        parts = [part.float() for part in parts]
    while len(parts) > 1:
        pairs = [OPS[op](a, b) for a, b in zip(parts[::2], parts[1::2], strict=False)]
        parts = pairs + parts[len(pairs) * 2 :]
    return (parts[0] / size if op == "avg" else parts[0]).to(dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    raw = [t.flatten().view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)
