"""Differentiable collectives: forward and backward of `copy` and `all_reduce` are each other's transpose."""

import pytest
import torch
import torch.distributed as dist

from tpmp_kernels.comm import autograd, communicator


def run_copy():
    with communicator(dist.group.WORLD, name="copy") as comm:
        x = torch.arange(6.0).requires_grad_()
        y = autograd.copy(x, comm)
        y.backward(torch.full((6,), float(comm.rank + 1)))
        return y.detach(), x.grad


def run_all_reduce():
    with communicator(dist.group.WORLD, name="all_reduce") as comm:
        x = (torch.arange(6.0) * (comm.rank + 1)).requires_grad_()
        before = x.detach().clone()
        y = autograd.all_reduce(x, comm)
        y.backward(torch.full((6,), float(comm.rank + 1)))
        return torch.equal(x.detach(), before), y.detach(), x.grad


@pytest.mark.parametrize("size", [2, 4])
def test_copy_is_the_identity_and_sums_gradients(ranks, size):
    for value, grad in ranks(size).run(run_copy):
        assert torch.equal(value, torch.arange(6.0))
        assert torch.equal(grad, torch.full((6,), float(sum(range(1, size + 1)))))


@pytest.mark.parametrize("size", [2, 4])
def test_all_reduce_sums_and_passes_gradients(ranks, size):
    for rank, (untouched, value, grad) in enumerate(ranks(size).run(run_all_reduce)):
        assert untouched, "the argument was written"
        assert torch.equal(value, torch.arange(6.0) * sum(range(1, size + 1)))
        assert torch.equal(grad, torch.full((6,), float(rank + 1)))
