"""kernels.signal_linear compiled ahead of time: what every GEMM must satisfy, and the order of stores and signal."""

import re
from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from tpmp_kernels.kernels import tiles

pytest.importorskip("triton")

import triton
from aot_gemm import ALIGNED, ARCHES, DTYPES, TOKENS, Case, cases, check, empty, sampled
from aot_signal import faults
from triton.tools.tensor_descriptor import TensorDescriptor

from tpmp_kernels.kernels import aot, signal_linear

EPILOGUES = [tiles.Epilogue(), tiles.Epilogue(wide=True)]
CHUNKS = 8


def aligned(n: int, k: int) -> bool:
    return k == ALIGNED


def signalling(case: Case) -> Case:
    """The case as signal_linear launches it: every tile persistent, none flattened."""
    return replace(case, tile=replace(case.tile, persistent=True, flatten=False))


GRID = [signalling(case) for case in cases("linear", EPILOGUES, EPILOGUES, aligned) if case.arch != "gfx942"]
SAMPLE = sampled(GRID, EPILOGUES[:1], 0)


def arguments(case: Case) -> dict:
    dtype, e, m, n, k = DTYPES[case.dtype], case.epilogue, TOKENS, case.n, case.k
    return signal_linear.arguments(
        empty(m, k, dtype=dtype), empty(n, k, dtype=dtype), empty(m, n, dtype=torch.float32 if e.wide else dtype),
        empty(CHUNKS, dtype=torch.int32), CHUNKS, case.tile,
    )  # fmt: skip


def build(kernel, named: dict, arch: str = "sm90", *, num_warps: int = 4, num_stages: int = 3) -> aot.Compiled:
    return aot.compile(kernel, named, arch=arch, num_warps=num_warps, num_stages=num_stages)


@lru_cache(maxsize=1)
def build_case(case: Case) -> aot.Compiled:
    named, tile = arguments(case), case.tile
    kernel = signal_linear.signal_linear_kernel
    return build(kernel, named, case.arch, num_warps=tile.num_warps, num_stages=tile.num_stages)


def check_signal(case: Case) -> None:
    check(signal_linear.signal_linear_kernel, arguments(case), case)
    built = build_case(case)
    assert faults(built.code) == []
    if case.tile.loads != "scalars":
        pipelined = tiles.shared_estimate(replace(case.tile, num_stages=case.tile.num_stages - 1), "linear", case.dtype)
        assert built.shared >= pipelined, f"{built.shared} B of shared memory: the loads are not pipelined"


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_aot_signal(case):
    check_signal(case)


@pytest.mark.full
@pytest.mark.parametrize("case", [c for c in GRID if c not in SAMPLE], ids=str)
def test_aot_signal_full(case):
    check_signal(case)


@pytest.mark.parametrize(
    "arch", [pytest.param(a, marks=[pytest.mark.full] * (a != "sm90")) for a in ARCHES if a != "gfx942"]
)
def test_aot_wait_loads_anew_and_forgets_what_it_had_cached(arch):
    """An acquire of the system in a loop, by one warp; no more than a few registers, nothing stored."""
    named = {"counters": empty(CHUNKS, dtype=torch.int32), "chunk": 3, "count": 16}
    built = build(signal_linear.wait_kernel, named, arch, num_warps=1)
    polls = r"(LDG\S*|ATOMG?\S*)\.STRONG\.SYS"
    assert built.count_in_loops(polls) == 1, built.code
    assert built.count_in_loops(r"CCTL\.IVALL") == 1, built.code
    assert built.count("STG") == 0


@pytest.mark.parametrize(
    ("lines", "by", "fault"),
    [
        (r"BAR\.SYNC", "NOP", "no barrier between a store and RED"),
        (r"MEMBAR\.ALL\.SYS", "MEMBAR.ALL.GPU", "no fence of the system between a store and RED"),
        (r"\.STRONG\.SYS", ".STRONG.GPU", "is not of the system"),
    ],
)
def test_aot_signal_check_sees_what_is_taken_out_of_our_code(lines, by, fault):
    head, stored, tail = build_case(SAMPLE[0]).code.rpartition(" STG.")
    assert faults(head + stored + tail) == []
    found = faults(head + stored + re.sub(lines, by, tail))
    assert found and fault in found[0], found


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("without_barrier", "no barrier between"),
        pytest.param("before_the_store", "a store after the last signal", marks=pytest.mark.full),
        pytest.param("within_the_device", "is not of the system", marks=pytest.mark.full),
        pytest.param("relaxed", "no fence of the system between", marks=pytest.mark.full),
        pytest.param("by_descriptor", "stores by descriptor", marks=pytest.mark.full),
    ],
)
def test_aot_signal_check_sees_counterexamples(name, fault):
    import aot_signal_counterexample

    out = empty(16, 64, dtype=torch.float32)
    if name == "by_descriptor":
        out = TensorDescriptor.from_tensor(out, [16, 64])
    named = {"out": out, "counter": empty(1, dtype=torch.int32)}
    found = faults(build(getattr(aot_signal_counterexample, name), named).code)
    if name == "without_barrier" and not triton.__version__.startswith("3.6."):
        assert found == []  # newer compilers set a barrier before an atomic of their own accord; we do not rely on it
    else:
        assert any(fault in each for each in found), found
