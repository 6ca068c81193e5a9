"""Column layers on one x: what is sent, when, and what is kept; gradients wherever they are wanted, and refusals."""

import copy
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tpmp_kernels import ops
from tpmp_kernels.comm import EmulatedLink, SelfCommunicator, communicator
from tpmp_kernels.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelHead,
    column_linears,
    copies,
    gate_and_up,
    parallelize,
    shard_of,
)

TOKENS, HIDDEN, WIDE = 8, 6, 10


def integers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).double()


def three(comm, sequence_parallel: bool, **how) -> list[ColumnParallelLinear]:
    layers = [
        ColumnParallelLinear(HIDDEN, WIDE, comm, bias=True, sequence_parallel=sequence_parallel, **how)
        for _ in range(3)
    ]
    for number, layer in enumerate(layers):
        with torch.no_grad():
            layer.weight.copy_(shard_of(integers(WIDE, HIDDEN, seed=number), layer.weight, comm))
            layer.bias.copy_(shard_of(integers(WIDE, seed=10 + number), layer.bias, comm))
    return layers


def own(x: torch.Tensor, comm, sequence_parallel: bool) -> torch.Tensor:
    return x.chunk(comm.size)[comm.rank].clone() if sequence_parallel else x.clone()


class Recorded(EmulatedLink):
    """A link that writes down what is posted and what is waited for."""

    def __init__(self, comm, overlaps: bool):
        super().__init__(comm, latency=0.0, bandwidth=float("inf"))
        self.events: list[str] = []
        self._overlaps = overlaps

    @property
    def overlaps(self) -> bool:
        return self._overlaps

    def _post(self, call, landed):
        self.events.append(f"post {call.kind}")
        work, events = super()._post(call, landed), self.events
        finish = work.finish

        def finished(timeout):
            if not events or events[-1] != f"wait {call.kind}":
                events.append(f"wait {call.kind}")
            finish(timeout)

        work.finish = finished
        return work


def run_recorded(overlaps: bool, sequence_parallel: bool):
    with communicator(dist.group.WORLD, name="recorded") as plain:
        comm = Recorded(plain, overlaps)
        layers = three(comm, sequence_parallel, dtype=torch.float64)
        x = own(integers(TOKENS, HIDDEN, seed=20), comm, sequence_parallel).requires_grad_()
        outputs = column_linears(x, layers)
        forward, comm.events = comm.events, []

        def recorded(*args):
            comm.events.append("wgrad")
            return ops.main_grad.weight_grad(*args)

        with patch.object(copies, "weight_grad", recorded):
            torch.autograd.backward(outputs, [y.clone() for y in outputs])
        return forward, comm.events


GATHER, REDUCE, SCATTER = (["post " + k, "wait " + k] for k in ("all_gather", "all_reduce", "reduce_scatter"))


@pytest.mark.parametrize(
    ("overlaps", "sequence_parallel", "forward", "backward"),
    [
        (False, False, [], [*REDUCE, "wgrad", "wgrad", "wgrad"]),
        (True, False, [], [REDUCE[0], "wgrad", "wgrad", "wgrad", REDUCE[1]]),
        (False, True, GATHER, [*SCATTER, *GATHER, "wgrad", "wgrad", "wgrad"]),
        (True, True, GATHER, [GATHER[0], SCATTER[0], GATHER[1], "wgrad", "wgrad", "wgrad", SCATTER[1]]),
    ],
)
def test_one_call_serves_all_layers_behind_their_weights(ranks, overlaps, sequence_parallel, forward, backward):
    for sent in ranks(2).run(run_recorded, overlaps, sequence_parallel):
        assert sent == (forward, backward)


class Siblings(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(HIDDEN, WIDE, dtype=torch.float64) for _ in range(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.a(x), self.b(x)


def run_siblings(overlaps: bool) -> list[str]:
    """Of a module of someone's own, which calls its layers one by one, and one of them not at all."""
    with communicator(dist.group.WORLD, name="siblings") as plain:
        comm, exact = Recorded(plain, overlaps), Siblings()
        ours = parallelize(copy.deepcopy(exact), comm, {"*": "colwise"})
        seen = []
        ours.c.weight.register_hook(seen.append)
        x, mine = (integers(TOKENS, HIDDEN, seed=20).requires_grad_() for _ in range(2))
        outputs, comm.events = ours(mine), []

        def recorded(*args):
            comm.events.append("wgrad")
            return ops.main_grad.weight_grad(*args)

        with patch.object(copies, "weight_grad", recorded):
            sum(y.sum() for y in outputs).backward()
        events = comm.events
        sum(y.sum() for y in exact(x)).backward()
        torch.testing.assert_close(mine.grad, x.grad)
        for name, whole in exact.named_parameters():
            parameter = ours.get_parameter(name)
            if name.startswith("c"):
                assert parameter.grad is None and not seen
            else:
                torch.testing.assert_close(parameter.grad, shard_of(whole.grad, parameter, comm))
        return events


@pytest.mark.parametrize("overlaps", [False, True])
def test_layers_called_one_by_one_reduce_once_behind_their_weights(ranks, overlaps):
    expected = [REDUCE[0], "wgrad", "wgrad", REDUCE[1]] if overlaps else [*REDUCE, "wgrad", "wgrad"]
    assert ranks(2).run(run_siblings, overlaps) == [expected] * 2


def run_kept(gated: bool):
    with communicator(dist.group.WORLD, name="kept") as comm:
        found = []
        for link in (comm, EmulatedLink(comm, latency=0.0, bandwidth=float("inf"))):
            q, k, v = three(link, True, dtype=torch.float64)
            q.bias = k.bias = None
            x = own(integers(TOKENS, HIDDEN, seed=20), link, True).requires_grad_()
            kept = []

            def pack(t, kept=kept):
                kept.append(tuple(t.shape))
                return t

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                gate_and_up(x, q, k) if gated else column_linears(x, [q, k, v])
            found.append(kept)
        return found


@pytest.mark.parametrize("gated", [False, True])
def test_the_gathered_x_is_not_kept(ranks, gated):
    for found in ranks(2).run(run_kept, gated):
        for kept in found:
            assert (TOKENS // 2, HIDDEN) in kept and (TOKENS, HIDDEN) not in kept


def whole_gradients(needed=(True, True, True)):
    x = integers(TOKENS, HIDDEN, seed=20).requires_grad_()
    weights = [integers(WIDE, HIDDEN, seed=n).requires_grad_() for n in range(3)]
    biases = [integers(WIDE, seed=10 + n).requires_grad_() for n in range(3)]
    for weight, bias, used in zip(weights, biases, needed, strict=True):
        if used:
            F.linear(x, weight, bias).square().sum().backward()
    return x.grad, [w.grad for w in weights], [b.grad for b in biases]


def run_partly(sequence_parallel: bool, overlaps: bool, case: str):
    """A part of the layers and of x frozen, or unused."""
    with communicator(dist.group.WORLD, name="partly") as comm:
        comm = EmulatedLink(comm, latency=0.0, bandwidth=float("inf")) if overlaps else comm
        layers = three(comm, sequence_parallel, dtype=torch.float64)
        x = own(integers(TOKENS, HIDDEN, seed=20), comm, sequence_parallel).requires_grad_(case != "x frozen")
        if case == "weights frozen":
            for layer in layers:
                layer.weight.requires_grad_(False)
        if case == "one frozen":
            layers[1].requires_grad_(False)
        if case == "checkpointed":
            outputs = checkpoint(lambda x: column_linears(x, layers), x, use_reentrant=False)
        else:
            outputs = column_linears(x, layers)
        used = outputs[::2] if case == "one unused" else outputs
        sum(y.square().sum() for y in used).backward()
        expected = whole_gradients((True, case != "one unused", True))
        frozen = {"x frozen": [True, [0] * 3, [0] * 3], "weights frozen": [0, [1] * 3, [0] * 3]}
        frozen = {**frozen, "one frozen": [0, [0, 1, 0], [0, 1, 0]]}.get(case, [0, [0] * 3, [0] * 3])
        assert x.grad is None if frozen[0] else torch.equal(x.grad, own(expected[0], comm, sequence_parallel))
        for layer, dweight, dbias, *without in zip(layers, *expected[1:], *frozen[1:], strict=True):
            for p, want, gone in ((layer.weight, dweight, without[0]), (layer.bias, dbias, without[1])):
                if gone or want is None:
                    assert p.grad is None or (not gone and not p.grad.any())
                else:
                    assert torch.equal(p.grad, shard_of(want, p, comm))


CASES = ["all", "x frozen", "weights frozen", "one frozen", "one unused", "checkpointed"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("sequence_parallel", "overlaps"), [(False, False), (True, False), (False, True), (True, True)]
)
def test_gradients_are_those_that_are_wanted(ranks, sequence_parallel, overlaps, case):
    ranks(2).run(run_partly, sequence_parallel, overlaps, case)


def run_main_grad(dtype: torch.dtype, sequence_parallel: bool):
    with communicator(dist.group.WORLD, name="main_grad") as comm:
        layers = three(comm, sequence_parallel, dtype=dtype)
        ops.attach_main_grad(p for layer in layers for p in layer.parameters())
        x = own(integers(TOKENS, HIDDEN, seed=20), comm, sequence_parallel).to(dtype)
        for _ in range(2):
            sum(y.sum() for y in column_linears(x, layers)).backward()
        return [(layer.weight.main_grad, layer.weight.grad) for layer in layers]


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_weights_with_a_main_grad_get_theirs_there(ranks, dtype, sequence_parallel):
    for rank, weights in enumerate(ranks(2).run(run_main_grad, dtype, sequence_parallel)):
        x = integers(TOKENS, HIDDEN, seed=20)
        expected = 2 * x.sum(0).expand(WIDE, HIDDEN).chunk(2)[rank]  # of two microbatches; dy is one everywhere
        for main_grad, grad in weights:
            assert torch.equal(main_grad.double(), expected)
            assert grad is None if dtype == torch.bfloat16 else torch.equal(grad, main_grad)


def run_autocast(sequence_parallel: bool):
    with communicator(dist.group.WORLD, name="autocast") as comm:
        layers = three(comm, sequence_parallel)
        x = own(integers(TOKENS, HIDDEN, seed=20), comm, sequence_parallel).float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            outputs = column_linears(x, layers)
        sum(y.sum() for y in outputs).backward()
        return [y.detach() for y in outputs], x.grad, [layer.weight.grad for layer in layers]


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_autocast_is_that_of_a_linear(ranks, sequence_parallel):
    x = integers(TOKENS, HIDDEN, seed=20)
    for rank, (outputs, dx, dweights) in enumerate(ranks(2).run(run_autocast, sequence_parallel)):
        for number, (y, dweight) in enumerate(zip(outputs, dweights, strict=True)):
            whole = F.linear(x, integers(WIDE, HIDDEN, seed=number), integers(WIDE, seed=10 + number))
            assert y.dtype == torch.bfloat16 and torch.equal(y, whole.chunk(2, -1)[rank].bfloat16())
            assert dweight.dtype == torch.float32
            assert torch.equal(dweight, x.sum(0).expand(WIDE, HIDDEN).chunk(2)[rank].float())
        total = sum(integers(WIDE, HIDDEN, seed=n).sum(0) for n in range(3)).expand(TOKENS, HIDDEN)
        assert dx.dtype == torch.float32
        assert (dx - (total.chunk(2)[rank] if sequence_parallel else total)).abs().max() <= 0.02 * total.abs().max()


def run_twice():
    with communicator(dist.group.WORLD, name="twice") as comm:
        layers = three(comm, False, dtype=torch.float64)
        x = integers(TOKENS, HIDDEN, seed=20).requires_grad_()
        with pytest.raises(NotImplementedError, match="column_linears: expected to be differentiated once"):
            torch.autograd.grad(column_linears(x, layers)[0].sum(), x, create_graph=True)


def test_second_derivatives_are_refused(ranks):
    ranks(2).run(run_twice)


def group(size: int) -> SelfCommunicator:
    comm = SelfCommunicator()
    comm.size = size
    return comm


def test_what_cannot_be_is_refused_by_name():
    comm = group(2)
    plain, parallel = (ColumnParallelLinear(HIDDEN, WIDE, comm, sequence_parallel=flag) for flag in (False, True))
    with pytest.raises(ValueError, match="column_linears: the layers differ in communicator or sequence_parallel, so"):
        column_linears(torch.zeros(4, HIDDEN), [plain, parallel])
    with pytest.raises(ValueError, match="gate_and_up: the layers differ in communicator"):
        gate_and_up(torch.zeros(4, HIDDEN), plain, ColumnParallelLinear(HIDDEN, WIDE, group(2)))
    with pytest.raises(ValueError, match=r"a shard of the flattened tokens, \[M/R, K\], got \[2, 2, 6\]; pass"):
        parallel(torch.zeros(2, 2, HIDDEN))
    with pytest.raises(ValueError, match="gate_and_up: up has a bias, an activation or a gathered output, which"):
        gate_and_up(torch.zeros(4, HIDDEN), plain, ColumnParallelLinear(HIDDEN, WIDE, comm, bias=True))
    with pytest.raises(ValueError, match=r"RowParallelLinear: 5 tokens cannot be cut over tp=2 .*; pad the batch to 6"):
        RowParallelLinear(WIDE, HIDDEN, comm, sequence_parallel=True)(torch.zeros(5, WIDE // 2))
    with pytest.raises(ValueError, match="split: dimension 1 of x is 5, not divisible by 2 ranks; pad it to 6"):
        RowParallelLinear(WIDE, HIDDEN, comm, input_is_parallel=False)(torch.zeros(5, 5))
    with pytest.raises(ValueError, match=r"weight has shape \[5, 6\] but x has shape \[4, 7\]"):
        plain(torch.zeros(4, 7))


def test_a_head_is_a_column_layer_without_bias():
    head = VocabParallelHead(HIDDEN, 128, group(1))
    torch.nn.init.normal_(head.weight)
    x = torch.randn(4, HIDDEN)
    assert torch.equal(head(x), ops.linear(x, head.weight))
