"""Layers whose collective runs under their GEMM give what those without give, on small integers to the bit."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from tpmp_kernels import ops
from tpmp_kernels.comm import EmulatedLink, SelfCommunicator, communicator
from tpmp_kernels.comm import overlap as overlapped
from tpmp_kernels.comm.overlap import Rates
from tpmp_kernels.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    column_linears,
    gate_and_up,
    shard_of,
)

TOKENS, HIDDEN, WIDE = 192, 12, 24
SLOW = Rates({torch.float64: 6e8}, 0.0)  # GEMMs that take as long as the link here, so that auto takes chunks


def integers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed)).double()


class Block(nn.Module):
    """q, k, v and a gated MLP, each between a column and a row layer."""

    def __init__(self, comm, bias: bool, **how):
        super().__init__()
        names = ("q", "k", "v", "gate", "up")
        columns = {
            name: ColumnParallelLinear(HIDDEN, WIDE, comm, bias=bias and len(name) == 1, **how) for name in names
        }
        self.columns = nn.ModuleDict(columns)
        self.out, self.down = (RowParallelLinear(WIDE, HIDDEN, comm, bias=bias, **how) for _ in range(2))
        for number, parameter in enumerate(self.parameters()):
            with torch.no_grad():
                shape = [n * comm.size if d == cut_of(parameter) else n for d, n in enumerate(parameter.shape)]
                parameter.copy_(shard_of(integers(*shape, seed=number), parameter, comm))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = column_linears(x, [self.columns[name] for name in "qkv"])
        y = self.out(q + k - v)
        return y + self.down(gate_and_up(x, self.columns["gate"], self.columns["up"], activation="silu"))


def cut_of(parameter: torch.Tensor) -> int | None:
    placement = getattr(parameter, "tp_placement", None)
    return getattr(placement, "dim", None)


def run_block(how: dict, sequence_parallel: bool, dtype: torch.dtype) -> tuple:
    with communicator(dist.group.WORLD, name="block") as plain:
        comm = EmulatedLink(plain, latency=0.0, bandwidth=1e8)
        results = []
        for each in ({}, how):
            options = {"sequence_parallel": sequence_parallel, "dtype": dtype} | each
            block = Block(comm, bias=True, **options)
            x = integers(TOKENS, HIDDEN, seed=50).to(dtype)
            x = (x.chunk(comm.size)[comm.rank].clone() if sequence_parallel else x).requires_grad_()
            y = block(x)
            y.backward(torch.ones_like(y))
            results.append([y.detach(), x.grad, *(p.grad for p in block.parameters())])
        return results


@pytest.mark.parametrize("how", [{"overlap": "chunked"}, {"overlap": "auto", "rates": SLOW}], ids=["chunked", "auto"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("size", [2, 3])
def test_block_is_the_one_without_overlap(ranks, size, sequence_parallel, how):
    for usual, ours in ranks(size).run(run_block, how, sequence_parallel, torch.float64):
        for a, b in zip(usual, ours, strict=True):
            # silu's exp is not exact; everything else is
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-10)


class Tagged(EmulatedLink):
    """A link that writes down the tags of its calls."""

    def __init__(self, comm):
        super().__init__(comm, latency=0.0, bandwidth=1e8)
        self.tags: list[str] = []

    def _post(self, call, landed):
        self.tags.append(call.tag)
        return super()._post(call, landed)


def chunked(tags: list[str]) -> list[str]:
    """Whose calls came in more than one piece."""
    return sorted({tag.partition("[1/")[0] for tag in tags if "[1/" in tag})


def run_calls(how: dict, sequence_parallel: bool) -> tuple[list, list[str]]:
    """What two layers in a row give, to the bit, and the tags of what was sent."""
    with communicator(dist.group.WORLD, name="calls") as plain:
        comm = Tagged(plain)
        x = integers(TOKENS, HIDDEN, seed=1)
        x = (x.chunk(comm.size)[comm.rank].clone() if sequence_parallel else x).requires_grad_()
        options = {"sequence_parallel": sequence_parallel, "dtype": torch.float64, "bias": True} | how
        up, down = ColumnParallelLinear(HIDDEN, WIDE, comm, **options), RowParallelLinear(WIDE, HIDDEN, comm, **options)
        with torch.no_grad():
            for seed, p in enumerate([up.weight, up.bias, down.weight, down.bias]):
                p.copy_(integers(*p.shape, seed=10 * comm.rank * (p is not down.bias) + seed))
        down(up(x)).backward(torch.ones_like(x))
        values = [x.grad, *(p.grad for p in (*up.parameters(), *down.parameters()))]
        return values, chunked(comm.tags)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_pair_is_bitwise_the_one_without_overlap(ranks, sequence_parallel):
    usual = ranks(2).run(run_calls, {}, sequence_parallel)
    calls = ["column.grad", "RowParallelLinear"]
    if sequence_parallel:
        calls += ["column", "RowParallelLinear.grad"]
    for how in ({"overlap": "chunked"}, {"overlap": "auto", "rates": SLOW}):
        for (expected, _), (values, sent) in zip(usual, ranks(2).run(run_calls, how, sequence_parallel), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(expected, values, strict=True))
            assert sent == sorted(calls)
    assert all(sent == [] for _, sent in usual)


class Unhidden(Tagged):
    """A link that moves bytes on the cores that compute."""

    overlaps = False


def run_unfit(case: str) -> list[str]:
    with communicator(dist.group.WORLD, name="unfit") as plain:
        comm = (Unhidden if case == "transport" else Tagged)(plain)
        activation = "gelu" if case == "activation" else None
        how = {"dtype": torch.float64, "overlap": "auto", "rates": None if case == "rates" else SLOW}
        layer = ColumnParallelLinear(HIDDEN, WIDE, comm, sequence_parallel=True, activation=activation, **how)
        layer(torch.ones(TOKENS, HIDDEN, dtype=torch.float64)).sum().backward()
        return chunked(comm.tags)


@pytest.mark.parametrize("case", ["transport", "activation", "rates", "fit"])
def test_auto_leaves_alone_what_gains_nothing(ranks, case):
    """By the default rates these products are too short to hide anything."""
    assert ranks(2).run(run_unfit, case) == [["column"] if case == "fit" else []] * 2


def run_few_rows() -> list[str]:
    with communicator(dist.group.WORLD, name="few") as plain:
        comm = Tagged(plain)
        layer = ColumnParallelLinear(HIDDEN, WIDE, comm, bias=True, overlap="auto", rates=SLOW, dtype=torch.float64)
        layer(torch.ones(40, HIDDEN, dtype=torch.float64, requires_grad=True)).sum().backward()
        return comm.tags


def test_one_chunk_is_the_usual_way(ranks):
    """Which has the bias in the GEMM's epilogue, and dX under the weight gradient too."""
    assert ranks(2).run(run_few_rows) == [["column.grad"]] * 2


def test_refusals():
    comm = SelfCommunicator()
    for layer in (ColumnParallelLinear, RowParallelLinear):
        with pytest.raises(
            ValueError, match=rf"{layer.__name__}: overlap is 'signal'; pass one of none, chunked, auto"
        ):
            layer(4, 4, comm, overlap="signal")
    for wrong in ({"activation": "gelu"}, {"input_is_copied": True}):
        with pytest.raises(ValueError, match='overlap "chunked" cannot have an activation'):
            ColumnParallelLinear(4, 4, comm, overlap="chunked", **wrong)
    layers = [ColumnParallelLinear(4, 4, comm, overlap=each) for each in ("none", "auto")]
    with pytest.raises(ValueError, match="column_linears: the layers differ in overlap; make them alike"):
        column_linears(torch.zeros(2, 4), layers)


def test_one_rank_has_nothing_to_hide():
    layer = RowParallelLinear(4, 4, SelfCommunicator(), overlap="chunked")
    x = torch.randn(3, 4)
    assert torch.equal(layer(x), ops.linear(x, layer.weight))
    assert torch.equal(layer(x), F.linear(x, layer.weight))
    assert overlapped.plan_of("linear_all_reduce", x.shape, [layer.weight.shape], x.dtype, layer.comm).mode == "none"
