"""Fused CPU linears against the unfused reference and torch.compile, one thread, forward.

The ceiling is torch's GEMM alone, in the same dtype: no fusion of what follows it can be faster. Where the CPU
multiplies bf16 slower than fp32, widened operands are.
"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.oracle import assert_correct
from tpmp_kernels import ops, reference
from tpmp_kernels.bench import Bar, gemm_flop, interleave, rotating

SUITE = "kernels"
CACHE_BYTES = 64 << 20  # weights of a layer come from memory: other layers ran since its last call
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

LINEAR = "linear+bias+gelu", "512x3072x768", "tpmp ops.linear"
GATED = "gated_linear silu", "512x2*2048x768", "tpmp ops.gated_linear"
BARS = [
    Bar(*LINEAR, "eager", 1.25, "fp32"),
    Bar(*LINEAR, "eager", 1.15, "bf16"),
    *(Bar(*case, "torch.compile", 1.0, dtype) for case in (LINEAR, GATED) for dtype in DTYPES),
    *(Bar(*GATED, "eager", 0.95, dtype) for dtype in DTYPES),
]

pytestmark = pytest.mark.usefixtures("one_thread")


def operands(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[tuple[torch.Tensor, ...]]:
    """Sets of random operands that together exceed the cache; weights have the scale of a trained layer's."""
    generator = torch.Generator().manual_seed(0)
    nbytes = sum(torch.Size(shape).numel() for shape in shapes) * dtype.itemsize
    sets = range(CACHE_BYTES // nbytes + 1)
    x, *weights = shapes

    def draw(shape, scale):
        return (scale * torch.randn(shape, generator=generator)).to(dtype)

    return [(draw(x, 1.0), *(draw(weight, weight[-1] ** -0.5) for weight in weights)) for _ in sets]


def race(contenders, ceiling, oracle, inputs) -> dict:
    """Check the contenders, then time them and the ceiling in turns."""
    with torch.no_grad():
        for each in inputs:
            assert_correct(contenders, oracle, each, baseline="eager")
        calls = {name: rotating(call, inputs) for name, call in (contenders | ceiling).items()}
        return interleave(calls, rounds=16, iterations=4, warmup=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(512, 3072, 768)], ids=lambda shape: "x".join(map(str, shape)))
def test_linear_gelu(compare, shape, dtype):
    m, n, k = shape

    def unfused(x, weight, bias):
        return F.gelu(F.linear(x, weight, bias))

    contenders = {
        "eager": unfused,
        "torch.compile": torch.compile(unfused, dynamic=False),
        "tpmp ops.linear": lambda x, weight, bias: ops.linear(x, weight, bias, activation="gelu"),
    }
    gemm = {"GEMM alone": lambda x, weight, bias: F.linear(x, weight)}
    inputs = operands(DTYPES[dtype], (m, k), (n, k), (n,))
    compare(
        lambda: race(contenders, gemm, lambda *args: reference.linear(*args, activation="gelu"), inputs),
        case="linear+bias+gelu",
        shape=f"{m}x{n}x{k}",
        dtype=dtype,
        baseline="eager",
        ceiling="GEMM alone",
        work=gemm_flop(m, n, k),
        unit="FLOP/s",
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(512, 2048, 768)], ids=lambda shape: "x".join(map(str, shape)))
def test_gated_linear(compare, shape, dtype):
    m, n, k = shape

    def unfused(x, w_gate, w_up):
        return F.silu(F.linear(x, w_gate)) * F.linear(x, w_up)

    contenders = {
        "eager": unfused,
        "torch.compile": torch.compile(unfused, dynamic=False),
        "tpmp ops.gated_linear": ops.gated_linear,
    }
    gemms = {"GEMMs alone": lambda x, w_gate, w_up: (F.linear(x, w_gate), F.linear(x, w_up))}
    inputs = operands(DTYPES[dtype], (m, k), (n, k), (n, k))
    compare(
        lambda: race(contenders, gemms, reference.gated_linear, inputs),
        case="gated_linear silu",
        shape=f"{m}x2*{n}x{k}",
        dtype=dtype,
        baseline="eager",
        ceiling="GEMMs alone",
        work=2 * gemm_flop(m, n, k),
        unit="FLOP/s",
    )
