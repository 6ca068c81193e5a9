"""The GEMM that signals, with a consumer on a second stream behind the wait kernel: 10,000 runs, bit for bit.

Before each run the result and the consumer's copy are NaN, so that a tile taken before it was stored is seen.
"""

import time

import pytest
import torch

from tpmp_kernels.kernels import gemm, linear, tiles
from tpmp_kernels.kernels.signal_linear import ABORT, expected, signal_linear, signal_tile, wait

pytestmark = pytest.mark.gpu
M, N = 2000, 1536  # hundreds of tiles, the last row block in part
CHUNKS, DEEP, SHALLOW = 4, 4096, 256
CYCLES = 1_000_000  # of sleep: about 0.5 ms, longer than the launches of a run take


def plain(x: torch.Tensor, weight: torch.Tensor, tile: tiles.Tile) -> torch.Tensor:
    """What the kernel without signals computes on that tile."""
    y = x.new_empty(len(x), len(weight))
    gemm.launch(linear.linear_kernel, linear.arguments(x, weight, None, None, y, None, None, tile), tile, x.device)
    return y


class Run:
    """One problem, its right result, and a consumer that takes each chunk once it is counted."""

    def __init__(self, k: int, programs: int | None = None):
        torch.manual_seed(0)
        self.x, self.weight = (torch.randn(rows, k, device="cuda").bfloat16() for rows in (M, N))
        self.reserved = 0 if programs is None else gemm.chip(self.x.device)[1] - programs
        self.right = plain(
            self.x, self.weight,
            gemm.own_tile("linear", self.x, self.weight, epilogue=tiles.Epilogue(), reserved_sms=self.reserved),
        )  # fmt: skip
        self.out, self.copy = (torch.empty_like(self.right) for _ in range(2))
        self.counters = torch.zeros(CHUNKS, dtype=torch.int32, device="cuda")
        self.wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        self.stream, self.zeroed, self.copied = torch.cuda.Stream(), torch.cuda.Event(), torch.cuda.Event()

    def once(self, *, sleep: int = 0, early: int = 0) -> None:
        """The GEMM and its consumer; adds to `wrong` the elements that differ. `early`: tiles it does not wait for."""
        self.out.fill_(torch.nan)
        self.copy.fill_(torch.nan)
        self.counters.zero_()
        self.zeroed.record()
        if sleep:
            torch.cuda._sleep(sleep)
        chunks = signal_linear(
            self.x, self.weight, self.out, self.counters, chunks=CHUNKS, reserved_sms=self.reserved
        )  # fmt: skip
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self.zeroed)
            for i, (rows, count) in enumerate(chunks):
                wait(self.counters, i, count - early)
                # A kernel that reads, as NCCL's do, and not the copy engine.
                torch.mul(self.out[rows], 1, out=self.copy[rows])
            self.copied.record()
        self.copied.wait()
        self.wrong += self.copy.view(torch.int16).ne(self.right.view(torch.int16)).sum()

    def counts(self) -> list[int]:
        return expected(M, N, CHUNKS, signal_tile(self.x, self.weight, reserved_sms=self.reserved))


@pytest.mark.parametrize(
    ("runs", "k", "programs", "sleep"),
    [
        (4000, SHALLOW, None, 0),  # chunks are taken while others are multiplied
        (3000, SHALLOW, None, CYCLES),  # the first gate is reached before the GEMM begins
        (2000, DEEP, None, 0),
        (1000, SHALLOW, 7, 0),  # each program takes many tiles, and chunks end far apart
    ],
)
def test_cuda_consumer_sees_every_tile(runs, k, programs, sleep):
    run = Run(k, programs)
    for _ in range(runs):
        run.once(sleep=sleep)
    assert int(run.wrong) == 0
    assert run.counters.tolist() == run.counts()


def test_cuda_a_consumer_that_does_not_wait_for_the_last_tile_is_seen():
    """One program: the last tile of a chunk is stored long after the last but one, for which alone it waits here."""
    run = Run(DEEP, programs=1)
    run.once()
    assert int(run.wrong) == 0
    run.once(early=1)
    assert int(run.wrong) > 0


def test_cuda_a_consumer_that_does_not_wait_is_seen():
    run = Run(DEEP)
    run.once()
    assert int(run.wrong) == 0
    run.once(sleep=20 * CYCLES, early=max(run.counts()))
    assert int(run.wrong) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (67, 131, 257), (1000, 4099, 512), (4096, 1024, 1024)], ids=str)
def test_cuda_odd_shapes_have_the_plain_bits_and_their_counts(dtype, shape):
    """One row, rows that are not aligned to 16 bytes, a transposed operand, more chunks than row blocks."""
    m, n, k = shape
    x, weight = torch.randn(k, m, device="cuda").to(dtype).t(), torch.randn(n, k, device="cuda").to(dtype)
    out = torch.full((m, n), torch.nan, dtype=dtype, device="cuda")
    counters = torch.zeros(64, dtype=torch.int32, device="cuda")
    chunks = signal_linear(x, weight, out, counters, chunks=64)
    assert torch.equal(out, plain(x, weight, signal_tile(x, weight)))
    assert counters.tolist() == [count for _, count in chunks] + [0] * (64 - len(chunks))


def test_cuda_abort_ends_a_wait():
    counters, stream, done = torch.zeros(2, dtype=torch.int32, device="cuda"), torch.cuda.Stream(), torch.cuda.Event()
    # Both kernels are loaded here: loading one may wait for all that run, and below one of them spins.
    counters.fill_(ABORT)
    wait(counters, 1, 5)
    counters.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        wait(counters, 1, 5)
        done.record()
    time.sleep(0.1)
    assert not done.query(), "it waits for nothing"
    counters.fill_(ABORT)
    deadline = time.monotonic() + 10
    while not done.query() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert done.query(), "it waits on, although it was aborted"
