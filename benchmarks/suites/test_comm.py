"""Our backend against gloo through torch.distributed's own functions: ranks on this host, one thread each.

What contenders and the memcpy ceiling are, and how a sample is taken, is said in tpmp_kernels/bench/comm.py. The last
case is a whole program: a training step of benchmarks/peers/dtensor_gpt.py, of which two copies on the same ranks take
turns, one on gloo and one on tpmp.
"""

import functools

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from benchmarks.peers import dtensor_gpt
from tpmp_kernels.bench import Bar, interleave, slowest
from tpmp_kernels.bench.comm import CALLS, MESSAGE, ON_EMPTY, labels, timings, tpmp_group
from tpmp_kernels.testing import RankPool

SUITE = "comm"
KIB, MIB = 1 << 10, 1 << 20
SIZES = [4 * KIB, 64 * KIB, MIB, 16 * MIB, 64 * MIB]
ALL_REDUCE, STEP = "all_reduce 2 ranks", "DTensor step 2 ranks"
PROGRAM = "4 layers, 4x256x512"
SIZE_NAMES = [labels("all_reduce", nbytes, 2)["shape"] for nbytes in SIZES]

# Medians of one run: how many times as fast as the rival the contender is to be.
BARS = [
    *(Bar(ALL_REDUCE, size, "tpmp", "gloo", speed) for size, speed in zip(SIZE_NAMES, (20, 12, 6, 5, 5), strict=True)),
    Bar(ALL_REDUCE, "16 MiB", "tpmp", "memcpy", 1 / 1.3),
    Bar(ALL_REDUCE, "64 MiB", "tpmp", "memcpy", 1 / 1.3),
    Bar(ALL_REDUCE, "16 MiB", ON_EMPTY, "tpmp", 1.3),
    Bar(MESSAGE, "64 KiB", "tpmp", "gloo", 5),
    Bar(MESSAGE, "16 MiB", "tpmp", "gloo", 2),
    *(Bar("all_reduce 4 ranks", size, "tpmp", "gloo", 1) for size in SIZE_NAMES),
    Bar(STEP, PROGRAM, "tpmp", "gloo", 1.15),
]


@pytest.fixture(scope="module")
def pool():
    """`pool(ranks)`: one pool of each size, the last one alone: idle ranks must not take part in what is timed."""
    pools: dict[int, RankPool] = {}

    def of(ranks: int) -> RankPool:
        if ranks not in pools:
            while pools:
                pools.popitem()[1].close()
            pools[ranks] = RankPool(ranks)
        return pools[ranks]

    yield of
    for each in pools.values():
        each.close()


CASES = [(2, call, nbytes) for call in ("all_reduce", MESSAGE) for nbytes in SIZES]
CASES += [(2, call, nbytes) for call in CALLS if call != "all_reduce" for nbytes in (64 * KIB, 16 * MIB)]
CASES += [(4, "all_reduce", nbytes) for nbytes in SIZES]


@pytest.mark.parametrize(
    ("ranks", "call", "nbytes"), CASES, ids=[f"{ranks}-{call}-{nbytes // KIB}KiB" for ranks, call, nbytes in CASES]
)
def test_call(compare, pool, ranks, call, nbytes):
    compare(lambda: timings(pool(ranks), call, nbytes), threads=1, **labels(call, nbytes, ranks))


def test_dtensor_step(compare, pool):
    compare(
        lambda: slowest(pool(2).run(time_steps, [], timeout=300)),
        case=STEP,
        shape=PROGRAM,
        dtype="fp32",
        baseline="gloo",
        threads=1,
    )


def time_steps(options: list[str]) -> dict:
    """What each rank runs: the same steps of two models that start alike, each in a mesh of its own."""
    args = dtensor_gpt.options().parse_args(options)
    groups = {"gloo": dist.new_group(backend="gloo"), "tpmp": tpmp_group()}
    steps, losses = {}, {}
    for name, group in groups.items():
        # DTensor takes meshes of equal names and ranks for one, and with it the group of the first.
        step = dtensor_gpt.stepper(args, DeviceMesh.from_group(group, "cpu", mesh_dim_names=(f"tp_{name}",)))
        losses[name] = [step(i) for i in range(2)]
        steps[name] = functools.partial(step, 2)
    if losses["tpmp"] != pytest.approx(losses["gloo"], rel=1e-4):
        raise AssertionError(f"tpmp: the losses of the first steps are {losses['tpmp']}, on gloo {losses['gloo']}")
    return interleave(steps, before=dist.barrier, rounds=args.steps, iterations=1, warmup=1)
