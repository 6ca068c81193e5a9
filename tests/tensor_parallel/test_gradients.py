"""Partial gradients, added once a step: over all ranks, over blocks of neighbours, in buckets, wherever they are."""

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tpmp_kernels.comm import SelfCommunicator, communicator
from tpmp_kernels.tensor_parallel import gradients, reduce_partial_gradients


def integers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).double()


SHAPES = {"alone": (5,), "all": (3, 4), "pairs": (7, 3), "more": (11,), "pairs_more": (2,), "unused": (3,)}
PARTIAL = {"all": "size", "more": "size", "pairs": 2, "pairs_more": 2, "unused": "size"}


def module(comm) -> nn.Module:
    made = nn.Module()
    for number, (name, shape) in enumerate(SHAPES.items()):
        p = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        if name in PARTIAL:
            p.tp_partial_grad = comm.size if PARTIAL[name] == "size" else PARTIAL[name]
        if name != "unused":
            p.grad = integers(*shape, seed=100 * comm.rank + number).transpose(0, -1).contiguous().transpose(0, -1)
        made.register_parameter(name, p)
    return made


def run_reduce(bucket: int, kept: str):
    with patch.object(gradients, "BUCKET", bucket), communicator(dist.group.WORLD, name="gradients") as comm:
        model, elsewhere = module(comm), None
        places = {name: p.grad for name, p in model.named_parameters()}
        if kept != "grad":
            for p in model.parameters():
                p.main_grad, p.grad = (p.grad if kept == "main_grad" else None), None
            elsewhere = places if kept == "elsewhere" else None
        reduce_partial_gradients(model, comm, gradients=elsewhere)
        return places


@pytest.mark.parametrize(("bucket", "kept"), [(2**24, "grad"), (1, "grad"), (20, "main_grad"), (20, "elsewhere")])
@pytest.mark.parametrize("size", [2, 4])
def test_gradients_add_up_over_their_ranks_bitwise(ranks, size, bucket, kept):
    for rank, found in enumerate(ranks(size).run(run_reduce, bucket, kept)):
        assert found["unused"] is None
        for number, (name, shape) in enumerate(SHAPES.items()):
            if name == "unused":
                continue
            ranks_ = {"size": range(size), 2: range(rank // 2 * 2, rank // 2 * 2 + 2)}.get(PARTIAL.get(name), [rank])
            assert torch.equal(found[name], sum(integers(*shape, seed=100 * r + number) for r in ranks_)), name


def run_drift():
    with communicator(dist.group.WORLD, name="drift") as comm:
        made = nn.Module()
        made.pairs, made.all = (nn.Parameter(torch.zeros(1001, dtype=torch.bfloat16)) for _ in range(2))
        made.pairs.tp_partial_grad, made.all.tp_partial_grad = 2, comm.size
        for p in made.parameters():
            p.grad = torch.randn(1001, generator=torch.Generator().manual_seed(comm.rank)).bfloat16()
        reduce_partial_gradients(made, comm)
        return made.pairs.grad, made.all.grad


def test_replicas_hold_the_same_bits_in_half_precision(ranks):
    results = ranks(4).run(run_drift)
    for a, b in ((0, 1), (2, 3)):
        assert torch.equal(results[a][0], results[b][0])
    assert all(torch.equal(whole, results[0][1]) for _, whole in results)


def test_one_rank_has_nothing_to_add():
    model = nn.Linear(2, 2)
    model.weight.tp_partial_grad = 1
    reduce_partial_gradients(model, SelfCommunicator())
    assert model.weight.grad is None


def test_the_communicator_of_another_layout_is_refused():
    comm = SelfCommunicator()
    comm.size = 4
    model = nn.Linear(2, 2)
    model.weight.tp_partial_grad, model.weight.grad = 3, torch.zeros(2, 2)
    with pytest.raises(ValueError, match="weight is added over 3 neighbouring ranks, which does not divide tp=4; pass"):
        reduce_partial_gradients(model, comm)
