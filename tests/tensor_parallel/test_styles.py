"""The styles, applied by torch's own parallelize_module, against the whole module. Small integers as values: every sum
is exact, so bits must agree."""

import gc
import itertools
import pickle

import pytest
import torch
import torch.distributed as dist
from placed import WHOLE, integers, part, tp
from tiny_llama import HIDDEN, Llama, far
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module

from tpmp_kernels.comm import SelfCommunicator
from tpmp_kernels.errors import TransportError
from tpmp_kernels.tensor_parallel import (
    ColwiseParallel,
    ReplicateParallel,
    RowwiseParallel,
    SequenceParallel,
    close_communicators,
    communicator_of,
    reduce_partial_gradients,
    shard_of,
)

BATCH, SEQUENCE, IN, OUT, IDS = 4, 8, 12, 16, 20
LAYOUTS = (WHOLE, Shard(0), Shard(1), Shard(-1))


def stock(kind: str) -> tuple[nn.Module, Tensor]:
    """A layer with small integers in it, and an input for it."""
    if kind == "linear":
        layer, x = nn.Linear(IN, OUT), integers(BATCH, SEQUENCE, IN, seed=1)
    else:
        layer, x = nn.Embedding(IDS, OUT, padding_idx=3), torch.arange(BATCH * SEQUENCE).view(BATCH, SEQUENCE) % IDS
    for i, parameter in enumerate(layer.double().parameters()):
        parameter.data.copy_(integers(*parameter.shape, seed=2 + i))
    return layer, x


def run_layouts(kind: str, style: type) -> list[str]:
    """The combinations of layouts in which this rank's output or gradients differ from its part of the whole's."""
    mesh, wrong = tp(), []
    sources = LAYOUTS if kind == "linear" else LAYOUTS[:2]
    for source, target, plain, typed in itertools.product(sources, LAYOUTS, (True, False), (False, True)):
        layer, x = stock(kind)
        exact_x = x.clone().requires_grad_(x.is_floating_point())
        exact = layer(exact_x)
        grad = integers(*exact.shape, seed=7)
        exact_grads = torch.autograd.grad(exact, list(layer.parameters()), grad, retain_graph=True)
        if x.is_floating_point():
            exact.backward(grad)

        mine = part(x, source, mesh).clone().requires_grad_(x.is_floating_point())
        given = DTensor.from_local(mine, mesh, [source], run_check=False) if typed else mine
        options = {"input_layouts": source, "output_layouts": target, "use_local_output": plain}
        parallelize_module(layer, mesh, style(**options))
        for parameter in layer.parameters():
            parameter.grad = None
        y = layer(given)
        upstream = part(grad, target, mesh)
        if not plain:
            assert isinstance(y, DTensor) and y.shape == exact.shape
            # A replicated output may get a gradient that is a partial sum, here all of it from rank 0.
            partial = target.is_replicate() and typed
            y = y.to_local(grad_placements=[Partial() if partial else y.placements[0]])
            upstream = upstream * (mesh.get_local_rank() == 0) if partial else upstream
        y.backward(upstream)
        comm = communicator_of(mesh)
        same = torch.equal(y, part(exact, target, mesh))
        same &= mine.grad is None or torch.equal(mine.grad, part(exact_x.grad, source, mesh))
        for parameter, exact_grad in zip(layer.parameters(), exact_grads, strict=True):
            same &= torch.equal(parameter.grad, shard_of(exact_grad, parameter, comm))
        if not same:
            wrong.append(f"{source} to {target}, {'plain' if plain else 'DTensor'} output, {typed=}")
    return wrong


@pytest.mark.parametrize("style", [ColwiseParallel, RowwiseParallel])
@pytest.mark.parametrize("kind", ["linear", "embedding"])
@pytest.mark.parametrize("size", [2, 4])
def test_every_layout_in_front_and_behind_equals_the_whole_layer_bitwise(ranks, size, kind, style):
    assert ranks(size).run(run_layouts, kind, style) == [[]] * size


def run_in_place() -> None:
    mesh, rank = tp(), dist.get_rank()
    layer = nn.Sequential(nn.Linear(IN, OUT), nn.Linear(OUT, IN))
    with torch.no_grad():
        layer[0].weight.fill_(rank + 1)
    first, called = layer[0], []
    first.register_forward_hook(lambda *_: called.append("hook"))
    first.weight.requires_grad_(False)
    parallelize_module(layer, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})
    layer.eval()
    layer(torch.ones(3, IN))
    assert layer[0] is first and called == ["hook"] and not first.training
    assert not first.weight.requires_grad and first.bias.requires_grad
    assert (first.in_features, first.out_features) == (IN, OUT)
    # The weight of rank 0, whatever the others had.
    assert first.weight.shape == (OUT // mesh.size(), IN) and (first.weight == 1).all()
    assert first.weight.untyped_storage().nbytes() == first.weight.numel() * 4

    own = nn.Linear(IN, OUT)
    with torch.no_grad():
        own.weight.fill_(rank + 1)
    parallelize_module(own, mesh, ColwiseParallel(), src_data_rank=None)
    assert (own.weight == rank + 1).all()

    never = parallelize_module(nn.Linear(IN, OUT, device="meta"), mesh, RowwiseParallel())
    assert never.weight.is_meta and never.weight.shape == (OUT, IN // mesh.size())


def test_a_module_is_changed_in_place_and_takes_the_values_of_the_source_rank(ranks):
    ranks(4).run(run_in_place)


def run_tied() -> None:
    mesh = tp()
    table, head = nn.Embedding(IDS, OUT), nn.Linear(OUT, IDS, bias=False)
    head.weight = table.weight
    parallelize_module(table, mesh, RowwiseParallel(input_layouts=Replicate()))
    with pytest.raises(ValueError, match=r"tied to a parameter that is cut as S\(0\)|Shard\(dim=0\)"):
        parallelize_module(head, mesh, RowwiseParallel())
    parallelize_module(head, mesh, ColwiseParallel())
    assert head.weight is table.weight


def test_tied_weights_stay_tied(ranks):
    ranks(2).run(run_tied)


def run_shared_heads(heads: int, defers: bool) -> list[float]:
    """q and o by heads, k and v with fewer heads than ranks."""
    from tpmp_kernels.tensor_parallel.layouts import Group

    mesh, model = tp(), Llama(kv_heads=heads, bias=True)
    comm, attention = communicator_of(mesh), model.layers[0].self_attn
    exact = Llama(kv_heads=heads, bias=True).layers[0].self_attn
    styles = {"q_proj": ColwiseParallel(), "o_proj": RowwiseParallel()}
    styles |= {name: ColwiseParallel(heads=heads) for name in ("k_proj", "v_proj")}
    for name, style in styles.items():
        style.install(name, getattr(attention, name), Group(comm, mesh), defers=defers)
    x = torch.randn(2, 4, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mine, theirs = (x.clone().requires_grad_() for _ in range(2))
    y, exact_y = attention(mine), exact(theirs)
    y.sum().backward()
    exact_y.sum().backward()
    if defers:
        reduce_partial_gradients(attention, comm)
    grads = dict(exact.named_parameters())
    found = [far(y, exact_y), far(mine.grad, theirs.grad)]
    assert defers or not any(hasattr(p, "tp_partial_grad") for p in attention.parameters())
    for name, p in attention.named_parameters():
        whole = grads[name].grad
        found.append(far(p.grad, shard_of(whole, p, comm), whole))
    return found


@pytest.mark.parametrize("defers", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
def test_fewer_heads_than_ranks_are_shared_by_neighbours(ranks, heads, defers):
    assert max(itertools.chain(*ranks(4).run(run_shared_heads, heads, defers))) < 64


def run_norm(defers: bool, thawed: bool) -> None:
    from tpmp_kernels.tensor_parallel.layouts import Group

    mesh = tp()
    comm, x, grad = communicator_of(mesh), integers(2, 8, 4, seed=1), integers(2, 8, 4, seed=2)
    norm, exact = (nn.LayerNorm(4).double() for _ in range(2))
    norm.requires_grad_(not thawed)
    SequenceParallel(use_local_output=True).install("norm", norm, Group(comm, None), defers=defers)
    norm.requires_grad_()
    norm(part(x, Shard(1), mesh)).backward(part(grad, Shard(1), mesh))
    exact(x).backward(grad)
    if defers:
        reduce_partial_gradients(norm, comm)
    assert far(norm.weight.grad, exact.weight.grad) < 16
    assert torch.equal(norm.bias.grad, exact.bias.grad)


@pytest.mark.parametrize(("defers", "thawed"), [(False, False), (False, True), (True, False)])
def test_gradients_of_a_norm_on_parts_of_the_sequence_are_added(ranks, defers, thawed):
    ranks(4).run(run_norm, defers, thawed)


def run_owner() -> None:
    whole = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    comm = communicator_of(whole)
    assert comm.size == 2 and comm is communicator_of(whole["tp"]) and comm is not communicator_of(whole["dp"])
    layers = [
        parallelize_module(nn.Linear(IN, OUT), whole["tp"], style()) for style in (ColwiseParallel, RowwiseParallel)
    ]
    assert all(layer.comm is comm for layer in layers)
    assert communicator_of(SelfCommunicator()).size == 1
    assert pickle.loads(pickle.dumps(whole))._tpmp_kept.communicators == {}
    close_communicators(whole)
    with pytest.raises(TransportError):
        comm.barrier()
    again = communicator_of(whole)
    assert again is not comm
    again.barrier()

    mesh = tp()
    held = communicator_of(mesh)._leave
    del mesh
    gc.collect()
    assert not held.alive, "the communicator outlived its mesh"


def test_the_communicator_is_made_once_a_mesh_dimension_and_closed_with_the_mesh(ranks):
    ranks(4).run(run_owner)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def wrapped() -> nn.Linear:
    layer = nn.Linear(8, 8)
    layer.forward = lambda x: x
    return layer


REFUSED = [
    (ColwiseParallel(), nn.LayerNorm(8), TypeError, "name: ColwiseParallel is for nn.Linear and nn.Embedding"),
    (ColwiseParallel(), Scaled(8, 8), TypeError, "name: Scaled is no plain Linear"),
    (ColwiseParallel(), wrapped(), TypeError, "name: Linear is no plain Linear"),
    (RowwiseParallel(), nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), TypeError, "is no plain Linear"),
    (
        ColwiseParallel(),
        nn.Linear(8, 6),
        ValueError,
        r"out_features of name is 6, not divisible by tp=4; use tp in \[1, 2",
    ),
    (RowwiseParallel(), nn.Linear(6, 8), ValueError, "in_features of name is 6"),
    (ColwiseParallel(), nn.Embedding(8, 6), ValueError, "embedding_dim of name is 6"),
    (RowwiseParallel(), nn.Embedding(6, 8), ValueError, "num_embeddings of name is 6"),
    (RowwiseParallel(), nn.Embedding(8, 8, max_norm=1.0), ValueError, "max_norm"),
    (ColwiseParallel(heads=3), nn.Linear(8, 12), ValueError, r"is 3 heads and tp=4, .* use tp in \[1, 3\]"),
    (ColwiseParallel(heads=16), nn.Linear(8, 8), ValueError, "is not 16 heads of equal size"),
    (ColwiseParallel(heads=2, output_layouts=WHOLE), nn.Linear(8, 8), ValueError, "cannot be gathered"),
    (SequenceParallel(), nn.Dropout(0.1), ValueError, "masks of Dropout"),
]


@pytest.mark.parametrize(("style", "module", "error", "match"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_sharded_is_refused_by_name(style, module, error, match):
    with pytest.raises(error, match=match):
        style.check("name", module, 4, has_mesh=True)


def test_dtensors_without_a_mesh_are_refused():
    with pytest.raises(ValueError, match="use_local_output=False gives DTensors"):
        ColwiseParallel(use_local_output=False).check("name", nn.Linear(8, 8), 2, has_mesh=False)


def test_styles_of_equal_options_are_equal():
    assert ColwiseParallel() == ColwiseParallel(input_layouts=Replicate()) != ColwiseParallel(output_layouts=WHOLE)
    assert ColwiseParallel() != RowwiseParallel() and ReplicateParallel() != SequenceParallel()
    assert "heads=2" in repr(ColwiseParallel(heads=2))
