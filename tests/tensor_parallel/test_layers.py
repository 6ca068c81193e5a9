"""Tensor-parallel layers against the whole layer. Small integers as values: every sum is exact, so bits must agree."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tpmp_kernels.comm import SelfCommunicator, communicator
from tpmp_kernels.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    shard_of,
    vocab_parallel_cross_entropy,
)

TOKENS, HIDDEN, WIDE, VOCAB = 12, 16, 24, 40


def integers(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator).to(torch.float64)


def fill(layer, comm, **full):
    for name, parameter in layer.named_parameters():
        parameter.data.copy_(shard_of(full[name], parameter, comm))
    return layer


def run_pair():
    """Column, then row: the outputs, and the gradients of input and weights with this rank's placements."""
    with communicator(dist.group.WORLD, name="pair") as comm:
        x = integers(TOKENS, HIDDEN, seed=1).requires_grad_()
        column = ColumnParallelLinear(HIDDEN, WIDE, comm, bias=True, activation="relu", dtype=x.dtype)
        row = RowParallelLinear(WIDE, HIDDEN, comm, bias=True, dtype=x.dtype)
        fill(column, comm, weight=integers(WIDE, HIDDEN, seed=2), bias=integers(WIDE, seed=3))
        fill(row, comm, weight=integers(HIDDEN, WIDE, seed=4), bias=integers(HIDDEN, seed=5))
        y = row(column(x))
        y.backward(integers(TOKENS, HIDDEN, seed=6))
        grads = {"column": column.weight.grad, "column_bias": column.bias.grad, "row": row.weight.grad}
        return y.detach(), x.grad, grads, row.bias.grad


@pytest.mark.parametrize("size", [2, 4])
def test_column_then_row_equals_the_whole_mlp_bitwise(ranks, size):
    x = integers(TOKENS, HIDDEN, seed=1).requires_grad_()
    w1, b1, w2, b2 = (
        t.requires_grad_()
        for t in (
            integers(WIDE, HIDDEN, seed=2),
            integers(WIDE, seed=3),
            integers(HIDDEN, WIDE, seed=4),
            integers(HIDDEN, seed=5),
        )
    )
    y = F.linear(F.relu(F.linear(x, w1, b1)), w2, b2)
    y.backward(integers(TOKENS, HIDDEN, seed=6))
    for rank, (ours, x_grad, grads, bias_grad) in enumerate(ranks(size).run(run_pair)):
        assert torch.equal(ours, y)
        assert torch.equal(x_grad, x.grad)
        assert torch.equal(grads["column"], w1.grad.chunk(size)[rank])
        assert torch.equal(grads["column_bias"], b1.grad.chunk(size)[rank])
        assert torch.equal(grads["row"], w2.grad.chunk(size, dim=1)[rank])
        assert torch.equal(bias_grad, b2.grad)


def run_embedding():
    with communicator(dist.group.WORLD, name="embedding") as comm:
        layer = VocabParallelEmbedding(VOCAB, HIDDEN, comm, padded_vocab=VOCAB, dtype=torch.float64)
        fill(layer, comm, weight=integers(VOCAB, HIDDEN, seed=7))
        y = layer(torch.arange(VOCAB).flip(0).view(4, -1))
        y.backward(integers(*y.shape, seed=8))
        return y.detach(), layer.weight.grad


@pytest.mark.parametrize("size", [2, 4])
def test_embedding_equals_the_whole_table_bitwise(ranks, size):
    weight = integers(VOCAB, HIDDEN, seed=7).requires_grad_()
    y = F.embedding(torch.arange(VOCAB).flip(0).view(4, -1), weight)
    y.backward(integers(*y.shape, seed=8))
    for rank, (ours, grad) in enumerate(ranks(size).run(run_embedding)):
        assert torch.equal(ours, y)
        assert torch.equal(grad, weight.grad.chunk(size)[rank])


def run_loss(scale: float, dtype: torch.dtype):
    with communicator(dist.group.WORLD, name="loss") as comm:
        full = (integers(TOKENS, VOCAB, seed=9) * scale).to(dtype)
        logits = full.chunk(comm.size, dim=1)[comm.rank].clone().requires_grad_()
        loss = vocab_parallel_cross_entropy(logits, targets(), comm)
        loss.backward(integers(TOKENS, seed=10).to(loss.dtype))
        return loss.detach(), logits.grad


def targets() -> torch.Tensor:
    return torch.randint(0, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(11))


@pytest.mark.parametrize("scale", [1.0, 200.0])  # at 200 exp overflows unless the global maximum is subtracted
@pytest.mark.parametrize("size", [2, 4])
def test_cross_entropy_equals_torch_on_whole_logits(ranks, size, scale):
    logits = (integers(TOKENS, VOCAB, seed=9) * scale).requires_grad_()
    loss = F.cross_entropy(logits, targets(), reduction="none")
    loss.backward(integers(TOKENS, seed=10))
    # A sum of 40 exponentials, a logarithm and a division: a few units in the last place of fp64.
    bound = 64 * torch.finfo(torch.float64).eps
    for rank, (ours, grad) in enumerate(ranks(size).run(run_loss, scale, torch.float64)):
        assert (ours - loss).abs().max() <= bound * loss.abs().max().clamp(min=1)
        assert (grad - logits.grad.chunk(size, dim=1)[rank]).abs().max() <= bound * 4


def test_cross_entropy_of_bf16_logits_is_computed_in_fp32(ranks):
    logits = integers(TOKENS, VOCAB, seed=9)
    loss = F.cross_entropy(logits, targets(), reduction="none")
    for ours, grad in ranks(2).run(run_loss, 1.0, torch.bfloat16):
        assert ours.dtype == torch.float32 and grad.dtype == torch.bfloat16
        # The integers are exact in bf16, so only fp32 arithmetic is between the two.
        assert (ours - loss).abs().max() <= 64 * torch.finfo(torch.float32).eps * loss.max()


def test_what_does_not_divide_is_refused_with_the_allowed_numbers():
    comm = SelfCommunicator()
    comm.size = 4
    with pytest.raises(ValueError, match=r"out_features is 6, not divisible by tp=4; use tp in \[1, 2, 3\]"):
        ColumnParallelLinear(8, 6, comm)


def test_gathered_logits_are_refused():
    with pytest.raises(ValueError, match=r"expected logits \[T, V/R\]"):
        vocab_parallel_cross_entropy(torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64), SelfCommunicator())
