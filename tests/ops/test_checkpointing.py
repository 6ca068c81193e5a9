"""Activation checkpointing over ops: recomputed or stored elsewhere, the gradients are the same bits."""

from functools import partial

import pytest
import torch
from block import Block
from calls import Calls
from problems import PROBLEMS, flat
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tpmp_kernels import ops

DTYPES = [pytest.param(torch.float64, marks=pytest.mark.full), torch.float32]
DTYPES += [pytest.param(torch.bfloat16, marks=pytest.mark.full)]


def gradients(call, inputs, upstream) -> list[torch.Tensor]:
    """Of every input that requires grad, through backward(), which reentrant checkpointing asks for."""
    wanted = [t for t in inputs if t.requires_grad]
    for t in wanted:
        t.grad = None
    results = [t for t in flat(call(*inputs)) if t.requires_grad]
    torch.autograd.backward(results, upstream[: len(results)])
    return [t.grad for t in wanted]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_bits(problem, dtype, reentrant):
    """Results too, but for reentrant checkpointing in low precision, which runs the forward without gradients: the CPU
    then fuses the activation and rounds once less."""
    inputs = problem.inputs(dtype, requires_grad=True)
    call = partial(problem.call, ops)
    again = partial(checkpoint, call, use_reentrant=reentrant)
    expected, got = flat(call(*inputs)), flat(again(*inputs))
    if dtype == torch.float64 or not reentrant:
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    upstream = [torch.randn_like(t) for t in expected]
    for a, b in zip(gradients(again, inputs, upstream), gradients(call, inputs, upstream), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_a_block_gives_the_same_bits(reentrant):
    """Checkpoints within a checkpoint, as a decoder has them."""
    torch.manual_seed(0)
    block = Block().double()
    inputs = [torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True), *block.parameters()]
    upstream = [torch.randn(2, 5, 8, dtype=torch.float64)]

    def twice(x, *_):
        inner = partial(checkpoint, block, use_reentrant=reentrant)
        return checkpoint(lambda x: inner(inner(x)), x, use_reentrant=reentrant)

    expected = gradients(lambda x, *_: block(block(x)), inputs, upstream)
    assert all(torch.equal(a, b) for a, b in zip(gradients(twice, inputs, upstream), expected, strict=True))


def test_tensors_saved_on_the_host_give_the_same_bits():
    torch.manual_seed(0)
    block = Block()
    inputs, upstream = [torch.randn(2, 5, 8, requires_grad=True), *block.parameters()], [torch.randn(2, 5, 8)]
    expected = gradients(lambda x, *_: block(x), inputs, upstream)

    def offloaded(x, *_):
        with torch.autograd.graph.save_on_cpu():
            return block(x)

    assert all(torch.equal(a, b) for a, b in zip(gradients(offloaded, inputs, upstream), expected, strict=True))


@pytest.mark.parametrize("policy", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE])
def test_selective_checkpointing_saves_an_op_or_runs_it_again(policy):
    x, w = torch.randn(3, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    contexts = partial(create_selective_checkpoint_contexts, lambda ctx, op, *args, **kwargs: policy)
    y = checkpoint(partial(ops.linear, activation="gelu"), x, w, use_reentrant=False, context_fn=contexts)
    with Calls() as calls:
        got = torch.autograd.grad(y.sum(), [x, w])
    assert calls.names.count("linear_with_preact") == (policy == CheckpointPolicy.PREFER_RECOMPUTE)
    expected = torch.autograd.grad(ops.linear(x, w, activation="gelu").sum(), [x, w])
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
