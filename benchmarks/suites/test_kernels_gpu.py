"""The Triton GEMMs on a GPU, bf16, forward: alone against cuBLAS, and with their epilogues against every other way.

"tpmp kernel" is our kernel always; "tpmp ops" is what users get, which may be cuBLASLt where `dispatch` says so. The
ceiling is the cuBLAS GEMM alone, without bias and activation: no epilogue can be cheaper than none. Bars are of one
shape each; the gains that they ask for are those which arithmetic allows: a pass over the result moves 4 bytes an
element, and costs 9 % of a GEMM at K = 4096 and 4.5 % at K = 8192.
"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.chosen import chosen
from benchmarks.gemms import fused_linear
from benchmarks.oracle import assert_correct
from tpmp_kernels import ops, reference
from tpmp_kernels.bench import Bar, gemm_flop, interleave, rotating

SUITE = "kernels"
# Per-rank shapes of real models (M, N, K), the first few in every run, all with SUITE=kernels: Llama-3 8B up at TP2, a
# square, Llama-3 8B o_proj at TP8, GPT-3 up at TP8; then Llama-3 8B down, qkv and lm_head, Llama-3 70B up and down,
# Qwen3-32B down, GPT-3 o_proj, DeepSeek-V3 o_proj, few tokens.
GEMMS = chosen(SUITE, 4, [
    (2048, 7168, 4096), (8192, 8192, 8192), (8192, 4096, 512), (4096, 6144, 12288),
    (8192, 4096, 3584), (8192, 1536, 4096), (4096, 32064, 4096), (8192, 7168, 8192), (8192, 8192, 3584),
    (4096, 5120, 6400), (4096, 12288, 3072), (4096, 7168, 4096), (1024, 7168, 4096), (128, 7168, 4096),
])  # fmt: skip
FUSED = chosen(SUITE, 2, [
    (2048, 7168, 4096), (4096, 3072, 768), (8192, 8192, 8192), (8192, 6144, 12288), (8192, 8192, 1024),
])  # fmt: skip
GATED = chosen(SUITE, 1, [(4096, 7168, 4096), (8192, 1792, 4096), (4096, 3584, 8192), (4096, 12800, 5120)])
CUBLAS, KERNEL, OPS = "cuBLAS GEMM", "tpmp kernel", "tpmp ops"


def text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


BARS = [
    *(Bar("GEMM", text(shape), KERNEL, CUBLAS, 0.95) for shape in GEMMS),
    *(Bar("linear+bias+gelu", text(shape), OPS, rival, 0.9) for shape in FUSED for rival in ("eager", "torch.compile")),
    *(Bar("linear+bias+gelu_tanh", text(shape), OPS, "cuBLASLt epilogue", 0.95) for shape in FUSED[:1]),
    *(Bar("gated_linear silu", f"{m}x2*{n}x{k}", OPS, "eager", 0.9) for m, n, k in GATED),
]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def operands(*shapes: tuple[int, ...]) -> list[tuple[torch.Tensor, ...]]:
    """Sets of random operands that together are more than twice the L2 cache; weights have a trained layer's scale."""
    generator = torch.Generator("cuda").manual_seed(0)
    nbytes = 2 * sum(torch.Size(shape).numel() for shape in shapes)
    sets = range(2 * torch.cuda.get_device_properties(0).L2_cache_size // nbytes + 1)

    def draw(position, shape):
        scale = shape[-1] ** -0.5 if position and len(shape) == 2 else 1.0
        return (scale * torch.randn(shape, generator=generator, device="cuda")).bfloat16()

    return [tuple(draw(i, shape) for i, shape in enumerate(shapes)) for _ in sets]


def race(contenders, ceiling, oracle, inputs) -> dict:
    """Check the contenders on what is timed, then time them and the ceiling in turns."""
    with torch.no_grad():
        for each in inputs[:2]:
            assert_correct(contenders, oracle, each, baseline=next(iter(contenders)))
        calls = {name: rotating(call, inputs) for name, call in (contenders | ceiling).items()}
        return interleave(calls, rounds=18, iterations=10, warmup=3, sync=torch.cuda.synchronize)


@pytest.mark.parametrize("shape", GEMMS, ids=text)
def test_gemm(compare, shape):
    m, n, k = shape
    contenders = {CUBLAS: F.linear, KERNEL: fused_linear}
    inputs = operands((m, k), (n, k))
    compare(
        lambda: race(contenders, {}, reference.linear, inputs),
        device="cuda", case="GEMM", shape=text(shape), dtype="bf16", baseline=CUBLAS,
        work=gemm_flop(m, n, k), unit="FLOP/s",
    )  # fmt: skip


@pytest.mark.parametrize("shape", FUSED, ids=text)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_linear_activation(compare, shape, activation):
    m, n, k = shape
    approximate = "tanh" if activation == "gelu_tanh" else "none"

    def unfused(x, weight, bias):
        return F.gelu(F.linear(x, weight, bias), approximate=approximate)

    contenders = {
        "eager": unfused,
        "torch.compile": torch.compile(unfused, dynamic=False),
        OPS: lambda x, weight, bias: ops.linear(x, weight, bias, activation=activation),
        KERNEL: lambda x, weight, bias: fused_linear(x, weight, bias, activation),
    }
    if activation == "gelu_tanh":
        contenders["cuBLASLt epilogue"] = lambda x, weight, bias: torch._addmm_activation(
            bias, x, weight.t(), use_gelu=True
        )
    inputs = operands((m, k), (n, k), (n,))
    compare(
        lambda: race(
            contenders, {CUBLAS: lambda x, weight, _: F.linear(x, weight)},
            lambda *args: reference.linear(*args, activation=activation), inputs,
        ),
        device="cuda", case=f"linear+bias+{activation}", shape=text(shape), dtype="bf16", baseline="eager",
        ceiling=CUBLAS, work=gemm_flop(m, n, k), unit="FLOP/s",
    )  # fmt: skip


@pytest.mark.parametrize("shape", GATED, ids=text)
def test_gated_linear(compare, shape):
    m, n, k = shape

    def unfused(x, w_gate, w_up):
        return F.silu(F.linear(x, w_gate)) * F.linear(x, w_up)

    contenders = {
        "eager": unfused,
        "torch.compile": torch.compile(unfused, dynamic=False),
        OPS: ops.gated_linear,
    }
    ceiling = {CUBLAS: lambda x, w_gate, w_up: (F.linear(x, w_gate), F.linear(x, w_up))}
    inputs = operands((m, k), (n, k), (n, k))
    compare(
        lambda: race(contenders, ceiling, reference.gated_linear, inputs),
        device="cuda", case="gated_linear silu", shape=f"{m}x2*{n}x{k}", dtype="bf16", baseline="eager",
        ceiling=CUBLAS, work=2 * gemm_flop(m, n, k), unit="FLOP/s",
    )  # fmt: skip
