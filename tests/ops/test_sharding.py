"""Ops on DTensors over two ranks: forward and backward equal the unsharded op, whatever the placements.

fp64, so that only the order of a sum separates the two. The problems' sizes are odd: shards are uneven.
"""

import itertools
import random

import pytest
import torch
from problems import INNER, PROBLEMS, flat

from tpmp_kernels import ops
from tpmp_kernels.ops import sharding

BY_NAME = {p.name: p for p in [*PROBLEMS, *INNER]}
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}
SAMPLE = 3


def drawn(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """The same on every rank, whatever it ran before: distribute_tensor hands out rank 0's."""
    generator = torch.Generator().manual_seed(17)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def op_of(problem):
    return getattr(torch.ops.tpmp_kernels, problem.op).default


def mesh_of(size: int):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (size,))


def distributed(mesh, tensor, placement):
    from torch.distributed.tensor import distribute_tensor

    cut = distribute_tensor(tensor.detach().clone(), mesh, [placement])
    return cut.requires_grad_(tensor.requires_grad)


def full(result):
    from torch.distributed.tensor import DTensor

    assert isinstance(result, DTensor)
    return result.full_tensor()


def placements_of(tensor) -> list:
    """Replicate, and Shard of every dimension that two ranks can share."""
    from torch.distributed.tensor import Replicate, Shard

    return [Replicate(), *(Shard(d) for d, size in enumerate(tensor.shape) if size > 1)]


def chosen(tensors: list, arguments: tuple, rule, sample: int | None) -> list[list]:
    """Placements of `tensors`: those that the op's rule names, and a seeded sample (or all) of the others."""
    positions = [next(i for i, arg in enumerate(arguments) if arg is t) for t in tensors]
    named = [[inputs[i] for i in positions] for _, inputs in rule(*arguments)]
    others = [list(c) for c in itertools.product(*map(placements_of, tensors)) if list(c) not in named]
    return named + (others if sample is None else random.Random(8).sample(others, min(sample, len(others))))


def upstream_placement(result):
    """A placement for a result's gradient: its own, or Replicate where it is a sum."""
    from torch.distributed.tensor import Replicate

    placement = result.placements[0]
    return Replicate() if placement.is_partial() else placement


def differs(got, expected, what: str, placements) -> list[str]:
    try:
        torch.testing.assert_close([full(t) for t in got], list(expected), **TOLERANCE)
    except AssertionError as error:
        return [f"{what} of {placements}: {error}"]
    return []


def check_problem(name: str, sample: int | None) -> list[str]:
    problem, mesh, wrong = BY_NAME[name], mesh_of(2), []
    inputs = problem.inputs(torch.float64, requires_grad=True)
    differentiable = [t for t in inputs if t.requires_grad]
    expected = flat(problem.call(ops, *inputs))
    upstream = drawn(*(t.shape for t in expected))
    truth = torch.autograd.grad(expected, differentiable, upstream)
    expected = [t.detach() for t in expected]
    for placements in chosen(inputs, problem.raw(*inputs), sharding.RULES[op_of(problem)], sample):
        cut = [distributed(mesh, t, p) for t, p in zip(inputs, placements, strict=True)]
        got = flat(problem.call(ops, *cut))
        wrong += differs([t.detach() for t in got], expected, "forward", placements)
        seeds = [distributed(mesh, u, upstream_placement(t)) for u, t in zip(upstream, got, strict=True)]
        grads = torch.autograd.grad(got, [t for t in cut if t.requires_grad], seeds)
        wrong += differs(grads, truth, "gradients", placements)
    return wrong


def check_inner(name: str, sample: int | None) -> list[str]:
    inner, mesh, wrong = BY_NAME[name], mesh_of(2), []
    arguments = tuple(a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in inner.arguments())
    tensors = [a for a in arguments if torch.is_tensor(a)]
    expected = flat(op_of(inner)(*arguments))
    sharding._hand_over()
    for placements in chosen(tensors, arguments, sharding.RULES[op_of(inner)], sample):
        left = iter(placements)
        cut = [distributed(mesh, a, next(left)) if torch.is_tensor(a) else a for a in arguments]
        wrong += differs(flat(op_of(inner)(*cut)), expected, "result", placements)
    return wrong


def with_a_rule(cases):
    return pytest.mark.parametrize("name", [p.name for p in cases if op_of(p) in sharding.RULES])


@with_a_rule(PROBLEMS)
def test_dtensor_forward_and_backward(ranks, name):
    assert ranks(2).run(check_problem, name, SAMPLE) == [[], []]


@pytest.mark.full
@with_a_rule(PROBLEMS)
def test_dtensor_forward_and_backward_of_every_placement(ranks, name):
    assert ranks(2).run(check_problem, name, None, timeout=300.0) == [[], []]


@with_a_rule(INNER)
def test_dtensor_inner_ops(ranks, name):
    assert ranks(2).run(check_inner, name, SAMPLE) == [[], []]


def check_plans() -> list[str]:
    """Column, row, sequence and replicated: the placements that a plan expects, and no collective in forward."""
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.debug import CommDebugMode

    whole, column, row, last, batch, sequence = Replicate(), Shard(0), Shard(1), Shard(2), Shard(0), Shard(1)
    mesh, wrong = mesh_of(2), []
    x, w, b, r, square = drawn((2, 6, 8), (4, 8), (4,), (2, 6, 4), (8, 8))

    def linear(x, w, b, r):
        return ops.linear(x, w, b, activation="gelu", residual=r)

    def pair(x, up, down):
        return ops.linear(ops.linear(x, up, activation="silu"), down)

    plans = [
        ("column", linear, (x, w, b, r), (whole, column, column, last), last),
        ("row", ops.linear, (x, w), (last, row), Partial()),
        ("batch", linear, (x, w, b, r), (batch, whole, whole, batch), batch),
        ("sequence", linear, (x, w, b, r), (sequence, whole, whole, sequence), sequence),
        ("replicated", linear, (x, w, b, r), (whole,) * 4, whole),
        ("gated column", ops.gated_linear, (x, w, w), (whole, column, column), last),
        ("gated sequence", ops.gated_linear, (x, w, w), (sequence, whole, whole), sequence),
        ("norm sequence", ops.rms_norm, (x, x[0, 0]), (sequence, whole), sequence),
        ("column, row", pair, (x, square, w), (whole, column, row), Partial()),
    ]  # fmt: skip
    for name, call, tensors, placements, expected in plans:
        cut = [distributed(mesh, t, p) for t, p in zip(tensors, placements, strict=True)]
        with CommDebugMode() as counts:
            y = call(*cut)
        if y.placements != (expected,) or counts.get_total_counts():
            wrong.append(f"{name}: {y.placements}, {counts.get_comm_counts()}")
        wrong += differs([y], [call(*tensors)], name, placements) if name == "replicated" else []
    return wrong


def test_dtensor_plans_need_no_redistribution(ranks):
    assert ranks(2).run(check_plans) == [[], []]


def check_decisions() -> list[str]:
    """The same tensors with an activation, after DTensor has decided for none: K may be cut for the latter alone."""
    mesh, wrong = mesh_of(2), []
    from torch.distributed.tensor import Shard

    x, w = drawn((6, 8), (4, 8))
    cut = distributed(mesh, x, Shard(1)), distributed(mesh, w, Shard(1))
    for activation in (None, "gelu", None, "relu"):
        wrong += differs(
            [ops.linear(*cut, activation=activation)], [ops.linear(x, w, activation=activation)], "y", activation
        )
    return wrong


def test_dtensor_decides_anew_for_every_activation(ranks):
    assert ranks(2).run(check_decisions) == [[], []]


def check_compiled() -> list[str]:
    from torch.distributed.tensor import Replicate, Shard

    def block(x, norm, gate, down):
        h, stream = ops.rms_norm(x, norm, residual=x)
        return ops.linear(ops.gated_linear(h, gate, gate), down), stream

    mesh = mesh_of(2)
    tensors = [t.requires_grad_() for t in drawn((2, 6, 8), (8,), (4, 8), (8, 4))]
    placements = Replicate(), Replicate(), Shard(0), Shard(1)
    cut = [distributed(mesh, t, p) for t, p in zip(tensors, placements, strict=True)]
    results = []
    for call in (torch.compile(block, fullgraph=True, backend="aot_eager"), block):
        y, stream = call(*cut)
        grads = torch.autograd.grad(y.full_tensor().square().sum() + stream.full_tensor().sum(), cut)
        results.append([y, stream, *grads])
    return differs(results[0], [full(t) for t in results[1]], "compiled", placements)


def test_dtensor_fullgraph(ranks):
    assert ranks(2).run(check_compiled) == [[], []]


def check_refusals() -> list[str]:
    from torch.distributed.tensor import Replicate

    mesh, said = mesh_of(2), []
    (x, w), main_grad = drawn((6, 8), (8, 8)), torch.zeros(8, 8, dtype=torch.float64)
    whole = [distributed(mesh, t, Replicate()) for t in (x, w, main_grad)]
    for call in (
        lambda: ops.linear(whole[0], w),
        lambda: ops.rms_norm(x, whole[1][0]),
        lambda: ops.wgrad(whole[0], whole[0], main_grad=whole[2]),
    ):
        try:
            call()
        except TypeError as error:
            said.append(str(error))
    return said


def test_dtensor_is_refused_by_name(ranks):
    mixed_linear, mixed_norm, writing = ranks(2).run(check_refusals)[0]
    assert mixed_linear.startswith("linear: x is a DTensor but weight is a plain Tensor; distribute")
    assert mixed_norm.startswith("rms_norm: weight is a DTensor but x is a plain Tensor")
    assert writing.startswith("wgrad_into: expected no DTensor, since ")
    assert not any("\n" in text for text in (mixed_linear, mixed_norm, writing))


def check_two_dimensions(name: str) -> list[str]:
    """On a mesh of two dimensions the rules combine: batch over one, every other placement over the other."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh, problem, wrong = init_device_mesh("cpu", (2, 2)), BY_NAME[name], []
    inputs = problem.inputs(torch.float64)
    expected = flat(problem.call(ops, *inputs))
    for placements in chosen(inputs, problem.raw(*inputs), sharding.RULES[op_of(problem)], 6):
        pairs = [[Shard(0) if t.dim() == 3 else Replicate(), p] for t, p in zip(inputs, placements, strict=True)]
        cut = [distribute_tensor(t, mesh, pair) for t, pair in zip(inputs, pairs, strict=True)]
        wrong += differs(flat(problem.call(ops, *cut)), expected, "forward", pairs)
    return wrong


@pytest.mark.full
@with_a_rule(PROBLEMS)
def test_dtensor_on_a_mesh_of_two_dimensions(ranks, name):
    assert ranks(4).run(check_two_dimensions, name) == [[]] * 4


def test_every_op_has_a_sharding_rule_or_a_reason():
    without = [op for op in registered() if op not in sharding.RULES and op not in sharding.REFUSED]
    assert not without, f"no sharding rule and no reason: {without}"


def registered() -> list:
    names = torch._C._dispatch_get_all_op_names()
    return [getattr(torch.ops.tpmp_kernels, n.split("::")[1]).default for n in names if n.startswith("tpmp_kernels::")]
