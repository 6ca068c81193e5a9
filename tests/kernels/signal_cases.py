"""The GEMM that signals, in the interpreter: the plain kernel's bits, its counts, and never a count before its rows.

TRITON_INTERPRET=1 python signal_cases.py NAME...     prints {name: "ok" or what went wrong} as JSON
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import interpreter
import torch
from interpreter import DTYPES, SIZES, only_within, poisoned_output
from linear_cases import Draw, launch_within

from tpmp_kernels.kernels import tiles

SENTINEL = -77
CASES: dict[str, Callable[[], None]] = {}


class Problem(Draw):
    """A random problem: operands in surroundings of NaN, a shipped tile of any architecture, a number of chunks."""

    def __init__(self, seed: int, dtype: torch.dtype):
        super().__init__(seed, dtype)
        (self.m, self.n, k), small = self.sizes(), self.rng.random() < 0.75
        if small:  # many row blocks for few numbers
            self.m, self.n, k = max(self.m, self.rng.choice(SIZES)), min(self.n, 40), min(k, 40)
        out_dtype = self.rng.choice([dtype, torch.float32])
        self.x, self.weight = self.poisoned(self.tensor(self.m, k)), self.poisoned(self.tensor(self.n, k))
        tile = self.tile("linear", tiles.Epilogue(wide=out_dtype is not dtype), self.x, self.weight)
        blocks = {"block_m": 16, "block_n": 16, "group_m": 2} if small else {}
        self.tile = replace(tile, **blocks, persistent=True, flatten=False)
        self.chunks = self.rng.choice([1, 2, 3, 5, 8, 1000])
        self.out, self.surroundings = poisoned_output(self.m, self.n, out_dtype)
        from tpmp_kernels.kernels.signal_linear import chunk_rows, expected

        self.rows = chunk_rows(self.m, self.chunks, self.tile)
        self.counts = expected(self.m, self.n, self.chunks, self.tile)
        self.buffer = torch.full((len(self.rows) + 2,), SENTINEL, dtype=torch.int32)
        self.counters = self.buffer[1:-1].zero_()

    def plain(self) -> torch.Tensor:
        """The result of the kernel without signals on the same tile."""
        from tpmp_kernels.kernels import linear

        y = torch.empty_like(self.out)
        named = linear.arguments(self.x, self.weight, None, None, y, None, None, self.tile)
        launch_within(linear.linear_kernel, named, self.tile)
        return y

    def run(self, sms: int) -> None:
        from tpmp_kernels.kernels import gemm, signal_linear

        named = signal_linear.arguments(self.x, self.weight, self.out, self.counters, self.chunks, self.tile)
        with (
            only_within([self.x, self.weight, self.out]),
            mock.patch.object(gemm, "chip", lambda _: ("", sms + 7)),
        ):
            gemm.launch(signal_linear.signal_linear_kernel, named, self.tile, self.x.device, reserved_sms=7)

    def written(self) -> list[int]:
        """How many tiles of each chunk are stored; no tile may be stored in part."""
        stored = []
        for rows in self.rows:
            blocks = [
                block.isfinite() for band in self.out[rows].split(self.tile.block_m)
                for block in band.split(self.tile.block_n, dim=1)
            ]  # fmt: skip
            assert all(block.all() or not block.any() for block in blocks), "signalled with a tile stored in part"
            stored.append(sum(bool(block.all()) for block in blocks))
        return stored


@contextmanager
def watched(on_signal: Callable[[], None]) -> Iterator[list[str]]:
    """The stores, barriers and signals of kernels as they happen; `on_signal` runs after each signal."""
    from triton._C.libtriton import ir
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    events: list[str] = []
    store, barrier, atomic = Builder.create_masked_store, Builder.create_barrier, Builder.create_atomic_rmw

    def stored(self, *args):
        events.append("store")
        return store(self, *args)

    def met(self):
        events.append("barrier")
        return barrier(self)

    def signalled(self, operation, pointer, value, mask, sem, scope):
        assert (sem, scope) == (ir.MEM_SEMANTIC.RELEASE, ir.MEM_SYNC_SCOPE.SYSTEM), f"signal with {sem}, {scope}"
        events.append("signal")
        before = atomic(self, operation, pointer, value, mask, sem, scope)
        on_signal()
        return before

    with mock.patch.multiple(Builder, create_masked_store=stored, create_barrier=met, create_atomic_rmw=signalled):
        yield events


def check_results(seed: int, dtype: torch.dtype) -> None:
    """The bits of the plain kernel, every counter at its count, nothing written beside; two programs."""
    problem = Problem(seed, dtype)
    problem.run(sms=2)
    assert torch.equal(problem.out, problem.plain())
    assert int(problem.surroundings.isfinite().sum()) == problem.out.numel(), "written outside of the result"
    assert problem.counters.tolist() == problem.counts
    assert problem.buffer[[0, -1]].eq(SENTINEL).all(), "counted outside of the counters"


def check_order(seed: int, dtype: torch.dtype) -> None:
    """A consumer that looks after every signal finds as many tiles stored as are counted; chunks finish in turn."""
    problem = Problem(seed, dtype)
    seen = []

    def consume():
        counts = problem.counters.tolist()
        seen.append(counts)
        assert counts == problem.written(), f"counters {counts}, tiles stored {problem.written()}"
        done = [count == want for count, want in zip(counts, problem.counts, strict=True)]
        begun = [count > 0 for count in counts]
        assert all(d or not b for d, b in zip(done, begun[1:], strict=False)), f"a chunk begun too early: {counts}"

    with watched(consume) as events:
        problem.run(sms=1)
    assert len(seen) == sum(problem.counts)
    assert seen[-1] == problem.counts
    *tiles_, rest = " ".join(events).split("signal")
    assert not rest, f"{rest} after the last signal"
    assert all(each.split()[0] == "store" and each.split()[-2:] == ["store", "barrier"] for each in tiles_), events


def check_wait() -> None:
    """It polls until the counter is there, and ends at once where it is beyond, or aborted."""
    from triton._C.libtriton import ir
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    from tpmp_kernels.kernels.signal_linear import ABORT, wait

    counters, polls, atomic = torch.tensor([5, 0, 9], dtype=torch.int32), [], Builder.create_atomic_rmw

    def poll(self, operation, pointer, value, mask, sem, scope):
        assert (sem, scope) == (ir.MEM_SEMANTIC.ACQUIRE, ir.MEM_SYNC_SCOPE.SYSTEM)
        polls.append(1)
        before = atomic(self, operation, pointer, value, mask, sem, scope)
        counters[1] += 1
        return before

    with mock.patch.object(Builder, "create_atomic_rmw", poll):
        for chunk, count, needed in [(1, 3, 4), (0, 5, 1), (2, 5, 1)]:
            polls.clear()
            wait(counters, chunk, count)
            assert len(polls) == needed, f"{len(polls)} polls for count {count}"
        counters[0] = ABORT
        wait(counters, 0, ABORT - 1)
    assert counters[0] == ABORT, "a wait changed its counter"


def check_call() -> None:
    """The public call: what it returns, and the empty cases."""
    from tpmp_kernels.kernels.signal_linear import chunk_rows, expected, signal_linear, signal_tile

    def call(m: int, n: int, k: int, chunks: int) -> list[int]:
        x, weight, counters = torch.ones(m, k), torch.ones(n, k), torch.zeros(4, dtype=torch.int32)
        out = torch.full((m, n), torch.nan)
        got = signal_linear(x, weight, out, counters, chunks=chunks, reserved_sms=131)
        assert out.eq(k).all()
        tile = signal_tile(x, weight, reserved_sms=131)
        counts = expected(m, n, chunks, tile)
        assert got == list(zip(chunk_rows(m, chunks, tile), counts, strict=True))
        assert counters.tolist() == counts + [0] * (4 - len(counts))
        return counts

    assert len(call(130, 65, 3, 2)) == 2
    assert len(call(7, 65, 3, 4)) == 1
    assert call(0, 5, 3, 2) == []
    assert call(5, 0, 3, 2) == [0]
    assert len(call(5, 7, 0, 2)) == 1


for label, dtype_ in DTYPES.items():
    for seed_ in range(60):
        CASES[f"results-{label}-{seed_}"] = partial(check_results, seed_, dtype_)
        CASES[f"order-{label}-{seed_}"] = partial(check_order, seed_, dtype_)
CASES |= {"wait": check_wait, "call": check_call}

if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1"
    interpreter.CASES.update(CASES)
    print(json.dumps(interpreter.run(sys.argv[1:])))
