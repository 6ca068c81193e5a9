"""How much of an all-reduce the GEMM in front of it hides: linear_all_reduce on two ranks over an emulated link.

GEMM alone       the unsplit product, on both ranks at once: what nothing can undercut
none             one GEMM, then one collective: serial
tpmp chunked     8 chunks of rows, each posted while the next is multiplied
8 chunk GEMMs    those products without any collective; what they take beyond the whole one is the tax of cutting
at the bar       no contender: the time at which E would be the ceiling - 0.05, from the other medians of the run

The link has no latency, and the bandwidth at which communication takes r times the GEMM, measured on the spot. Its time
costs no core; the bytes themselves move through shared memory, on the cores that multiply.

E = 1 - (T_overlap - T_gemm) / (T_serial - T_gemm) is the share of the exposed communication that is gone, and losses of
cutting count against it (Flux, arXiv 2406.06858). The last of C chunks has nothing to hide under, and a tax is paid of
the GEMM, so that E cannot exceed 1 - 1/C - tax / r.
"""

import functools

import pytest
import torch
import torch.distributed as dist

from benchmarks.pool import in_processes_of_their_own
from tpmp_kernels import ops
from tpmp_kernels.bench import Bar, Timing, interleave, show_percent, slowest
from tpmp_kernels.comm import EmulatedLink, communicator
from tpmp_kernels.comm.arguments import Collective
from tpmp_kernels.comm.emulated import bytes_moved
from tpmp_kernels.comm.overlap import linear_all_reduce
from tpmp_kernels.comm.overlap.plan import bounds

SUITE = "overlap"
CASE, CHUNKS, RATIOS = "linear_all_reduce 2 ranks", 8, (0.25, 0.5, 1.0)
M, N, K = 1024, 1024, 2048
GEMM, NONE, OURS, PARTS, AT_BAR = "GEMM alone", "none", "tpmp chunked", f"{CHUNKS} chunk GEMMs", "at the bar"
SLACK = 0.05


def shape(r: float) -> str:
    return f"{M}x{N}x{K}, r = {r:g}"


BARS = [Bar(CASE, shape(r), OURS, AT_BAR, 1) for r in RATIOS]


@pytest.mark.parametrize("r", RATIOS)
def test_hidden(compare, capsys, r):
    def measure() -> dict[str, Timing]:
        timings = slowest(in_processes_of_their_own(time_modes, r))
        return timings | {AT_BAR: Timing((time_at(highest(timings, r) - SLACK, timings),))}

    rows = compare(measure, case=CASE, shape=shape(r), dtype="fp32", baseline=NONE, ceiling=GEMM, threads=1)
    timings = {row.contender: Timing((row.median,)) for row in rows}
    with capsys.disabled():
        print(f"\n{CASE}, {shape(r)}: E = {hidden(timings):.2f}, ceiling {highest(timings, r):.2f} "
              f"(tax {show_percent(tax(timings))})")  # fmt: skip


def hidden(timings: dict[str, Timing]) -> float:
    """E."""
    gemm, serial, ours = (timings[name].median for name in (GEMM, NONE, OURS))
    return 1 - (ours - gemm) / (serial - gemm)


def tax(timings: dict[str, Timing]) -> float:
    """What cutting adds to the GEMM, as a share of it."""
    return timings[PARTS].median / timings[GEMM].median - 1


def highest(timings: dict[str, Timing], r: float) -> float:
    """The E that no schedule of so many chunks exceeds."""
    return 1 - 1 / CHUNKS - tax(timings) / r


def time_at(e: float, timings: dict[str, Timing]) -> float:
    """Seconds of a call whose E is `e`."""
    gemm, serial = timings[GEMM].median, timings[NONE].median
    return gemm + (1 - e) * (serial - gemm)


# ---- what each rank runs


def time_modes(r: float) -> dict[str, Timing]:
    plain = communicator(dist.group.WORLD, transport="shm", name="overlap")
    x, weight = torch.randn(M, K), torch.randn(N, K)
    product = functools.partial(ops.linear, x, weight)
    gemm = interleave({GEMM: product}, before=plain.barrier, rounds=9, iterations=1)[GEMM].median
    agreed = plain.broadcast(torch.tensor([gemm], dtype=torch.float64), 0).item()
    nbytes = bytes_moved(Collective("all_reduce", M * N, torch.empty(M, N)), plain.rank, plain.size)
    comm = EmulatedLink(plain, latency=0.0, bandwidth=nbytes / (r * agreed))
    contenders = {
        GEMM: product,
        NONE: functools.partial(linear_all_reduce, x, weight, comm, mode="none"),
        OURS: functools.partial(linear_all_reduce, x, weight, comm, mode="chunked", chunks=CHUNKS),
        PARTS: functools.partial(in_chunks, x, weight),
    }
    check(contenders)
    return interleave(contenders, before=dist.barrier, rounds=20, iterations=1, warmup=2)


def in_chunks(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The products as the chunked linear makes them, into one result."""
    y = x.new_empty(len(x), len(weight))
    for rows in bounds(len(x), CHUNKS):
        torch.mm(x[rows], weight.t(), out=y[rows])
    return y


def check(contenders: dict) -> None:
    """Modes against each other, and the parts against the whole; the errors are those of the order of summation."""
    for one, other in ((NONE, OURS), (GEMM, PARTS)):
        torch.testing.assert_close(contenders[one](), contenders[other](), rtol=1e-4, atol=1e-3)
