"""The fused Triton linear on a GPU against unfused torch, forward, bf16; run by `make gpu-check`.

The ceiling is the cuBLAS GEMM alone, without bias and activation: no epilogue can be cheaper than none.
"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.oracle import assert_correct
from tpmp_kernels import ops, reference
from tpmp_kernels.bench import gemm_flop, interleave, rotating

SUITE = "kernels"
# Per-rank shapes of real models (M, N, K): Llama-3 8B up at TP2, GPT-3 up at TP8, GPT-2 up whole, a square.
SHAPES = [(2048, 7168, 4096), (4096, 6144, 12288), (4096, 3072, 768), (8192, 8192, 8192)]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def operands(m: int, n: int, k: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Sets of random (x, weight, bias) that together are more than twice the L2 cache."""
    generator = torch.Generator("cuda").manual_seed(0)
    cache = torch.cuda.get_device_properties(0).L2_cache_size

    def draw(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator, device="cuda")).bfloat16()

    sets = range(2 * cache // (2 * (m * k + n * k)) + 1)
    return [(draw(m, k), draw(n, k, scale=k**-0.5), draw(n)) for _ in sets]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_linear_gelu(compare, shape):
    m, n, k = shape
    contenders = {
        "eager": lambda x, weight, bias: F.gelu(F.linear(x, weight, bias)),
        "tpmp ops.linear": lambda x, weight, bias: ops.linear(x, weight, bias, activation="gelu"),
    }
    gemm = {"cuBLAS GEMM": lambda x, weight, bias: F.linear(x, weight)}
    inputs = operands(m, n, k)

    def race():
        with torch.no_grad():
            for each in inputs:
                assert_correct(contenders, _oracle, each, baseline="eager")
            calls = {name: rotating(call, inputs) for name, call in (contenders | gemm).items()}
            return interleave(calls, rounds=18, iterations=20, warmup=3, sync=torch.cuda.synchronize)

    compare(
        race,
        device="cuda",
        case="linear+bias+gelu",
        shape=f"{m}x{n}x{k}",
        dtype="bf16",
        baseline="eager",
        ceiling="cuBLAS GEMM",
        work=gemm_flop(m, n, k),
        unit="FLOP/s",
    )


def _oracle(x, weight, bias):
    return reference.linear(x, weight, bias, activation="gelu")
