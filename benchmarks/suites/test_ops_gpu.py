"""The ops on a GPU, bf16: the fused loss against the materialised one, a gated MLP in training, and the neighbours
against a copy of the bytes that they cannot avoid.

The problems are those of `tpmp compare`. Liger-Kernel takes part where it is installed.
"""

import pytest
import torch

from benchmarks.chosen import chosen
from benchmarks.oracle import check_errors
from benchmarks.peers.liger_loss import liger_loss
from tpmp_kernels.bench import Bar, interleave, rotating
from tpmp_kernels.bench.compare import measure
from tpmp_kernels.bench.compare.problems import problem
from tpmp_kernels.bench.memory import extra_bytes

SUITE = "ops"
LOSS, LOSS_TEXT = (8192, 128256, 4096), "8192x128256x4096"  # tokens, vocabulary, hidden of Llama-3 8B
TRAINING, COPY = "linear_cross_entropy training", "copy"
RECOMPUTING, IN_FORWARD, LIGER = "tpmp triton", "tpmp in forward", "Liger-Kernel"

# (op, shape, activation, elements of half precision that the forward reads and writes)
NEIGHBOURS = chosen(SUITE, 3, [
    ("rms_norm", (16384, 4096), None, 4 * 16384 * 4096),  # x and residual in, their sum and y out
    ("glu", (16384, 14336), "silu", 3 * 16384 * 14336),
    ("cross_entropy", (8192, 128256), None, 8192 * 128256),
    ("layer_norm", (16384, 4096), None, 4 * 16384 * 4096),
    ("rope", (4, 4096, 32, 8, 128), None, 2 * 4 * 4096 * 40 * 128),
])  # fmt: skip
BARS = [
    Bar(TRAINING, LOSS_TEXT, RECOMPUTING, "eager", 0.85),
    Bar(TRAINING, LOSS_TEXT, IN_FORWARD, "eager", 1.0),
    *(Bar(TRAINING, LOSS_TEXT, ours, "eager", 10, quantity="memory") for ours in (RECOMPUTING, IN_FORWARD)),
    *(Bar(TRAINING, LOSS_TEXT, ours, LIGER, 3) for ours in (RECOMPUTING, IN_FORWARD)),
    *(
        Bar(f"{problem(op, shape, activation).case} forward", "x".join(map(str, shape)), "tpmp triton", COPY, 0.85)
        for op, shape, activation, _ in NEIGHBOURS
    ),
]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def race(compare, op, shape, activation, *, backward, rounds, iterations, peers=None, leave_out=()):
    asked = problem(op, shape, activation)
    every = measure.contenders(asked, "cuda") | (peers or {})
    calls = {name: call for name, call in every.items() if not isinstance(call, str) and name not in leave_out}
    absent = {name: reason for name, reason in every.items() if isinstance(reason, str)}
    draws = measure.draws_of(asked, torch.bfloat16, "cuda")
    check_errors(measure.errors(asked, calls, draws[0], backward=backward))
    steps = {name: measure.step(call, backward=backward) for name, call in calls.items()}
    compare(
        lambda: measure.times(calls, draws, backward=backward, rounds=rounds, iterations=iterations) | absent,
        device="cuda", case=f"{asked.case} {'training' if backward else 'forward'}", shape="x".join(map(str, shape)),
        dtype="bf16", baseline=measure.EAGER, work=asked.flop and asked.flop * (3 if backward else 1), unit="FLOP/s",
        memory={name: extra_bytes(call, draws[0]) for name, call in steps.items()},
    )  # fmt: skip


def test_linear_cross_entropy(compare):
    race(
        compare, "linear_cross_entropy", LOSS, None, backward=True, rounds=5, iterations=2, peers={LIGER: liger_loss()},
        leave_out=(measure.COMPILED, "tpmp cpu"),
    )  # fmt: skip


def test_gated_mlp(compare):
    race(
        compare, "gated_mlp", (8192, 7168, 4096), "silu", backward=True, rounds=9, iterations=4,
        leave_out=("tpmp cpu",),
    )  # fmt: skip


@pytest.mark.parametrize(("op", "shape", "activation", "elements"), NEIGHBOURS, ids=[op for op, *_ in NEIGHBOURS])
def test_neighbour(compare, op, shape, activation, elements):
    asked = problem(op, shape, activation)
    every = measure.contenders(asked, "cuda")
    calls = {name: every[name] for name in (measure.EAGER, measure.COMPILED, "tpmp triton")}
    draws = measure.draws_of(asked, torch.bfloat16, "cuda")
    check_errors(measure.errors(asked, calls, draws[0], backward=False))
    source, target = (torch.randn(elements // 2, device="cuda").bfloat16() for _ in range(2))

    def timed():
        steps = {name: rotating(measure.step(call, backward=False), draws) for name, call in calls.items()}
        steps[COPY] = lambda: target.copy_(source)
        return interleave(steps, rounds=18, iterations=10, warmup=3, sync=torch.cuda.synchronize)

    compare(
        timed, device="cuda", case=f"{asked.case} forward", shape="x".join(map(str, shape)), dtype="bf16",
        baseline=measure.EAGER, ceiling=COPY, work=2 * elements, unit="B/s",
    )  # fmt: skip
