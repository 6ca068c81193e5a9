"""The CPU ops against plain torch, torch.compile and torch's own fused loss: one thread, forward and training.

The problems are those of `tpmp compare`; "training" is forward and backward. Memory is what a call needs beside
operands and results. Linears alone, with their GEMM as a ceiling, are in test_kernels.py.
"""

import pytest

from benchmarks.oracle import check_errors
from tpmp_kernels.bench import Bar
from tpmp_kernels.bench.compare import measure
from tpmp_kernels.bench.compare.problems import DTYPES, problem
from tpmp_kernels.bench.memory import extra_bytes

SUITE = "ops"
LOSS = (2048, 32000, 1024)  # tokens, vocabulary, hidden
TRAINING = "linear_cross_entropy training"

CASES = [
    ("mlp", (512, 3072, 768), "gelu"),
    ("gated_mlp", (512, 2048, 768), "silu"),
    ("cross_entropy", (512, 32000), None),
    ("rms_norm", (2048, 1024), None),
    ("layer_norm", (2048, 1024), None),
    ("rope", (2, 512, 16, 4, 64), None),
    ("glu", (2048, 3072), "silu"),
]


def _bars(dtype: str) -> list[Bar]:
    shape, in_forward = "x".join(map(str, LOSS)), "tpmp in forward"
    return [
        Bar(TRAINING, shape, "tpmp cpu", "F.linear_cross_entropy chunked", 3, dtype),
        Bar(TRAINING, shape, in_forward, "eager", 1 / 1.15, dtype),
        Bar(TRAINING, shape, in_forward, "eager", 10, dtype, "memory"),
    ]


BARS = [bar for dtype in ("fp32", "bf16") for bar in _bars(dtype)]

pytestmark = pytest.mark.usefixtures("one_thread")


def race(compare, op, shape, activation, dtype, *, backward, rounds, iterations, leave_out=()):
    asked = problem(op, shape, activation)
    every = measure.contenders(asked, "cpu")
    calls = {name: call for name, call in every.items() if not isinstance(call, str) and name not in leave_out}
    draws = measure.draws_of(asked, DTYPES[dtype], "cpu")
    check_errors(measure.errors(asked, calls, draws[0], backward=backward))
    steps = {name: measure.step(call, backward=backward) for name, call in calls.items()}
    memory = {name: extra_bytes(call, draws[0]) for name, call in steps.items()}
    compare(
        lambda: measure.times(calls, draws, backward=backward, rounds=rounds, iterations=iterations),
        case=f"{asked.case} {'training' if backward else 'forward'}",
        shape="x".join(map(str, shape)),
        dtype=dtype,
        baseline=measure.EAGER,
        work=asked.flop and asked.flop * (3 if backward else 1),
        unit="FLOP/s",
        memory=memory,
    )


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("op", "shape", "activation"), CASES, ids=[op for op, *_ in CASES])
def test_op(compare, op, shape, activation, dtype, backward):
    race(compare, op, shape, activation, dtype, backward=backward, rounds=9, iterations=2)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_linear_cross_entropy(compare, dtype):
    """Seconds a call: few rounds. torch.compile leaves the loss as it is at this size and needs a minute to say so."""
    race(
        compare, "linear_cross_entropy", LOSS, None, dtype,
        backward=True, rounds=3, iterations=1, leave_out=(measure.COMPILED,),
    )  # fmt: skip
