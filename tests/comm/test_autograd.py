"""Differentiable collectives: forward and backward, bitwise, on small integers; each pair is the other's transpose."""

import pytest
import torch
import torch.distributed as dist

from tpmp_kernels.comm import EmulatedLink, SelfCommunicator, autograd, communicator
from tpmp_kernels.comm._ext import C


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


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.full)])
def test_copy_is_the_identity_and_sums_gradients(ranks, size):
    for value, grad in ranks(size).run(run_copy):
        assert torch.equal(value, torch.arange(6.0))
        assert torch.equal(grad, torch.full((6,), float(sum(range(1, size + 1)))))


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.full)])
def test_all_reduce_sums_and_passes_gradients(ranks, size):
    for rank, (untouched, value, grad) in enumerate(ranks(size).run(run_all_reduce)):
        assert untouched, "the argument was written"
        assert torch.equal(value, torch.arange(6.0) * sum(range(1, size + 1)))
        assert torch.equal(grad, torch.full((6,), float(rank + 1)))


SHARD = (2, 3, 5)  # of one rank; the whole has R times as much along the dimension in question


def integers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).double()


def whole_shape(dim: int, size: int) -> list[int]:
    return [n * size if d == dim % len(SHARD) else n for d, n in enumerate(SHARD)]


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values behind other strides."""
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def run_gather(dim: int, grad: str):
    """(y, dx), each of the ranks making its own use of y under "reduce_scatter", and the same under "slice"."""
    with communicator(dist.group.WORLD, name="gather") as comm:
        x = strided(integers(*SHARD, seed=comm.rank)).requires_grad_()
        before = x.detach().clone()
        y = autograd.all_gather(x, comm, dim=dim, grad=grad, tag="test")
        y.backward(integers(*y.shape, seed=100 + (comm.rank if grad == "reduce_scatter" else 0)))
        assert torch.equal(x.detach(), before), "the argument was written"
        return y.detach(), x.grad


@pytest.mark.parametrize("grad", ["reduce_scatter", "slice"])
@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("size", [2, 3, pytest.param(4, marks=pytest.mark.full)])
def test_all_gather_is_the_shards_in_order(ranks, size, dim, grad):
    whole = torch.cat([integers(*SHARD, seed=rank) for rank in range(size)], dim)
    upstream = [integers(*whole.shape, seed=100 + rank) for rank in range(size)]
    dwhole = sum(upstream) if grad == "reduce_scatter" else upstream[0]
    for rank, (y, dx) in enumerate(ranks(size).run(run_gather, dim, grad)):
        assert torch.equal(y, whole)
        assert torch.equal(dx, dwhole.chunk(size, dim)[rank])


def run_scatter(dim: int):
    with communicator(dist.group.WORLD, name="scatter") as comm:
        x = strided(integers(*whole_shape(dim, comm.size), seed=comm.rank)).requires_grad_()
        before = x.detach().clone()
        y = autograd.reduce_scatter(x, comm, dim=dim, tag="test")
        y.backward(integers(*y.shape, seed=100 + comm.rank))
        assert torch.equal(x.detach(), before), "the argument was written"
        return y.detach(), x.grad


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("size", [2, 3, pytest.param(4, marks=pytest.mark.full)])
def test_reduce_scatter_is_a_shard_of_the_sum(ranks, size, dim):
    total = sum(integers(*whole_shape(dim, size), seed=rank) for rank in range(size))
    dwhole = torch.cat([integers(*SHARD, seed=100 + rank) for rank in range(size)], dim)
    for rank, (y, dx) in enumerate(ranks(size).run(run_scatter, dim)):
        assert torch.equal(y, total.chunk(size, dim)[rank])
        assert torch.equal(dx, dwhole)


def run_split(dim: int):
    with communicator(dist.group.WORLD, name="split") as comm:
        x = strided(integers(*whole_shape(dim, comm.size), seed=0)).requires_grad_()
        y = autograd.split(x, comm, dim=dim, tag="test")
        y.backward(integers(*y.shape, seed=100 + comm.rank))
        assert y.is_contiguous() and y.untyped_storage().nbytes() == y.nbytes, "the shard keeps the whole alive"
        return y.detach(), x.grad


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("size", [2, 3, pytest.param(4, marks=pytest.mark.full)])
def test_split_is_the_own_shard(ranks, size, dim):
    whole = integers(*whole_shape(dim, size), seed=0)
    dwhole = torch.cat([integers(*SHARD, seed=100 + rank) for rank in range(size)], dim)
    for rank, (y, dx) in enumerate(ranks(size).run(run_split, dim)):
        assert torch.equal(y, whole.chunk(size, dim)[rank])
        assert torch.equal(dx, dwhole)


def run_empty():
    with communicator(dist.group.WORLD, name="empty") as comm:
        x = torch.empty(0, 3, requires_grad=True)
        for call in (autograd.all_gather, autograd.reduce_scatter, autograd.split):
            y = call(x, comm, tag="test")
            y.sum().backward()
            assert y.shape == x.shape == x.grad.shape


def test_no_rows_at_all(ranks):
    ranks(2).run(run_empty)


def run_second_derivatives():
    """f(x) = reduce_scatter(all_gather(x)) = R x; the gradients of f^2 / 2 and of half its own square: R^2 x, R^4 x."""
    with communicator(dist.group.WORLD, name="twice") as comm:
        x = torch.full((1,), float(comm.rank + 1), requires_grad=True)
        y = autograd.reduce_scatter(autograd.all_gather(x, comm, tag="a"), comm, tag="b")
        (dx,) = torch.autograd.grad(y.square().sum() / 2, x, create_graph=True)
        (ddx,) = torch.autograd.grad(dx.square().sum() / 2, x)
        return dx.item(), ddx.item()


def test_second_derivatives_are_collectives_too(ranks):
    for rank, (dx, ddx) in enumerate(ranks(2).run(run_second_derivatives)):
        assert (dx, ddx) == (4.0 * (rank + 1), 16.0 * (rank + 1))


def alone(size: int) -> SelfCommunicator:
    comm = SelfCommunicator()
    comm.size = size
    return comm


@pytest.mark.parametrize("call", [autograd.reduce_scatter, autograd.split])
def test_what_does_not_divide_is_refused_by_name(call):
    sentence = rf"{call.__name__}: dimension 1 of x is 10, not divisible by 4 ranks; pad it to 12"
    with pytest.raises(ValueError, match=sentence):
        call(torch.zeros(8, 10), alone(4), dim=-1)


@pytest.mark.parametrize("call", [autograd.all_gather, autograd.reduce_scatter, autograd.split])
def test_dimensions_that_are_not_there_are_refused(call):
    with pytest.raises(ValueError, match=rf"{call.__name__}: dim is 2, but x has shape \[8, 8\]; pass one of its"):
        call(torch.zeros(8, 8), alone(4), dim=2)


def test_all_gather_refuses_another_gradient():
    with pytest.raises(ValueError, match='grad must be "reduce_scatter" or "slice", got \'sum\'; pass one of these'):
        autograd.all_gather(torch.zeros(2), alone(2), grad="sum")


def test_one_rank_is_the_identity():
    x = torch.arange(6.0)
    for call in (autograd.copy, autograd.all_reduce, autograd.all_gather, autograd.reduce_scatter, autograd.split):
        assert call(x, alone(1)) is x


def test_only_what_costs_no_core_overlaps():
    comm = SelfCommunicator()
    assert not comm.overlaps and EmulatedLink(comm, latency=0.0, bandwidth=1e9).overlaps


def run_overlaps():
    found = {}
    for transport in ("shm", "process_group"):
        with communicator(dist.group.WORLD, transport=transport, name=transport) as comm:
            found[transport] = comm.overlaps
    return found


@pytest.mark.skipif(C is None, reason="needs the compiled extension")
def test_transports_of_the_host_do_not_overlap(ranks):
    assert ranks(2).run(run_overlaps) == [{"shm": False, "process_group": False}] * 2
