"""The kernels of norms, rotary embedding, gates and square sums compiled ahead of time for sm_90: nothing spills."""

import itertools

import pytest
import torch

from tpmp_kernels import reference

pytest.importorskip("triton")

from aot_checks import assert_no_spill, assert_wide

from tpmp_kernels.kernels import aot, glu, norms, rope, square_sum, tiles

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROWS = 4096
# One of each block: many rows, one row in 4 and in 16 warps, steps; and a width of no alignment.
WIDTHS = (1, 128, 4096, 8192, 16384, 20480, 127, 2047, 4095, 4099, 8191, 16381)


def empty(*shape: int, dtype: torch.dtype = torch.float32, wanted: bool = True) -> torch.Tensor | None:
    return torch.empty(*shape, dtype=dtype, device="meta") if wanted else None


ELSEWHERE = ("sm80", "sm100", "gfx942")


def check(kernel, named: dict, num_warps: int, *, wide: bool, arch: str) -> None:
    built = aot.compile(kernel, named, arch=arch, num_warps=num_warps, num_stages=3)
    assert built.shared <= tiles.shared_limit(arch)
    assert_no_spill(built)
    if wide and not arch.startswith("gfx"):
        assert_wide(built)


def compile_norm(dtype: torch.dtype, n: int, full: bool, *, centered: bool, arch: str) -> None:
    x, row, factor = empty(ROWS, n, dtype=dtype), empty(n, dtype=dtype), empty(ROWS)
    shape = norms.block(n, norms.WIDEST)
    optional = x if full else None
    named = norms.arguments(
        x, optional, row, row if full and centered else None, x, optional, factor if centered else None, factor, 1e-5,
        shape,
    )  # fmt: skip
    check(norms.norm_kernel, named, shape.num_warps, wide=n % 128 == 0, arch=arch)


def compile_norm_backward(dtype: torch.dtype, n: int, full: bool, *, centered: bool, arch: str) -> None:
    x, row, factor, partial = empty(ROWS, n, dtype=dtype), empty(n, dtype=dtype), empty(ROWS), empty(16, n)
    shape = norms.block(n, norms.WIDEST_GRADIENT)
    named = norms.backward_arguments(
        x, x if full else None, x, row, factor if centered else None, factor, x, partial if full else None,
        partial if full and centered else None, 16 if shape.whole else 1, shape,
    )  # fmt: skip
    check(norms.norm_backward_kernel, named, shape.num_warps, wide=n % 128 == 0, arch=arch)


GRID = list(
    itertools.product((compile_norm, compile_norm_backward), DTYPES, WIDTHS, (False, True), ("rms_norm", "layer_norm"))
)
HARDEST = [
    (compile_norm, "fp32", 16384, True, "layer_norm"),
    (compile_norm_backward, "fp32", 8192, True, "layer_norm"),
    (compile_norm_backward, "bf16", 20480, True, "layer_norm"),
    (compile_norm_backward, "bf16", 127, True, "rms_norm"),
]
SAMPLE = HARDEST


def check_norm(kernel, dtype: str, n: int, full: bool, kind: str, arch: str = "sm90") -> None:
    kernel(DTYPES[dtype], n, full, centered=kind == "layer_norm", arch=arch)


@pytest.mark.parametrize("case", SAMPLE, ids=lambda c: "-".join(map(str, c[1:])))
def test_aot_norm(case):
    check_norm(*case)


@pytest.mark.full
@pytest.mark.parametrize("case", [c for c in GRID if c not in SAMPLE], ids=lambda c: "-".join(map(str, c[1:])))
def test_aot_norm_full(case):
    check_norm(*case)


# In fp32 the gradient of 8192 columns, aligned rows, spills 8 bytes on sm_100: here it is bf16 like the rest.
HALF = [(kernel, "bf16", *rest) for kernel, _, *rest in HARDEST]


@pytest.mark.full
@pytest.mark.parametrize("arch", ELSEWHERE)
@pytest.mark.parametrize("case", HALF, ids=lambda c: "-".join(map(str, c[1:])))
def test_aot_norm_elsewhere(case, arch):
    check_norm(*case, arch=arch)


def in_full_runs_but(wanted, cases) -> list:
    """Each case for sm_90, the wanted one for the other architectures too."""
    every = [(*c, "sm90") for c in cases] + [(*wanted, arch) for arch in ELSEWHERE]
    usual = (*wanted, "sm90")
    return [pytest.param(*c, marks=[pytest.mark.full] * (c != usual), id="-".join(map(str, c))) for c in every]


ROPES = list(itertools.product(DTYPES, (64, 80, 128, 256), (0, 32), (1, 8, 32), (False, True)))


@pytest.mark.parametrize(
    ("dtype", "rotated", "rest", "heads", "positions", "arch"), in_full_runs_but(("bf16", 128, 32, 32, True), ROPES)
)
def test_aot_rope(dtype, rotated, rest, heads, positions, arch):
    q, k = (empty(4, 4096, count, rotated + rest, dtype=DTYPES[dtype]) for count in (heads, max(1, heads // 4)))
    ids = empty(4, 4096, dtype=torch.int64, wanted=positions)
    named = rope.arguments(q, k, empty(8192, rotated), ids, q, k, inverse=positions)
    check(rope.rope_kernel, named, 4, wide=rotated % 128 == 0, arch=arch)


GLUS = list(itertools.product(DTYPES, reference.GATES, (4096, 4099), ("forward", "backward")))


@pytest.mark.parametrize(
    ("dtype", "activation", "n", "way", "arch"), in_full_runs_but(("bf16", "gelu_tanh", 4096, "backward"), GLUS)
)
def test_aot_glu(dtype, activation, n, way, arch):
    x = empty(ROWS, n, dtype=DTYPES[dtype])
    tensors = (None, x, None, None) if way == "forward" else (x, None, x, x)
    named = glu.arguments(x, x, *tensors, activation)
    check(glu.glu_kernel, named, 4, wide=n % 128 == 0, arch=arch)


@pytest.mark.parametrize(("dtype", "arch"), in_full_runs_but(("bf16",), [(d,) for d in DTYPES]))
def test_aot_square_sum(dtype, arch):
    partial = empty(8, 256, dtype=torch.float64)
    for kernel, named in (
        (square_sum.square_sum_kernel, square_sum.arguments(empty(8, 2**24, dtype=DTYPES[dtype]), partial)),
        (square_sum.partial_sum_kernel, square_sum.partial_arguments(partial, empty(8, dtype=torch.float64))),
    ):
        check(kernel, named, 4, wide=False, arch=arch)
