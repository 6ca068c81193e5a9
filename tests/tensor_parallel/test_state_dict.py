"""State dicts of sharded modules: what they hold, refused shards, and the way through checkpoints to another tp."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tiny_llama import HIDDEN, PLAN, Llama
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tpmp_kernels.comm import Communicator, communicator
from tpmp_kernels.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
    communicator_of,
    full_tensors,
    head_shard,
    load_state_dict,
    padded_vocab_size,
    parallelize,
    shard_of,
    state_dict,
)

IDS, MULTIPLE, KV_HEADS, SIZE = 50, 8, 2, 4
PADDED = padded_vocab_size(IDS, MULTIPLE)


def tp() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))


class Model(nn.Module):
    """One of each of our layers: a padded vocabulary tied to the head, key heads shared where there are few."""

    def __init__(self, comm: Communicator, multiple: int = MULTIPLE):
        super().__init__()
        padded = padded_vocab_size(IDS, multiple)
        self.table = VocabParallelEmbedding(IDS, HIDDEN, comm, padded_vocab=padded)
        self.key = ColumnParallelLinear(
            HIDDEN, KV_HEADS * SIZE, comm, bias=True, replicas=head_shard(8, KV_HEADS, comm).replicas
        )
        self.out = RowParallelLinear(HIDDEN, HIDDEN, comm, bias=True)
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = VocabParallelHead(HIDDEN, IDS, comm, padded_vocab=padded, weight=self.table.weight)
        self.register_buffer("steps", torch.tensor(0, dtype=torch.int64))


SHAPES = {
    "table.weight": (IDS, HIDDEN),
    "key.weight": (KV_HEADS * SIZE, HIDDEN),
    "key.bias": (KV_HEADS * SIZE,),
    "out.weight": (HIDDEN, HIDDEN),
    "out.bias": (HIDDEN,),
    "norm.weight": (HIDDEN,),
    "norm.bias": (HIDDEN,),
    "head.weight": (IDS, HIDDEN),
    "steps": (),
}


def exact(seed: int = 0) -> dict[str, Tensor]:
    """The whole values, without padding."""
    generator = torch.Generator().manual_seed(seed)
    values = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items() if name != "steps"}
    return {**values, "head.weight": values["table.weight"], "steps": torch.tensor(7 + seed)}


def filled(comm: Communicator, *, multiple: int = MULTIPLE) -> Model:
    model, values = Model(comm, multiple), exact()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(shard_of(values[name], parameter, comm))
        model.steps.copy_(values["steps"])
    return model


def assert_holds(model: nn.Module, values: dict[str, Tensor], comm: Communicator) -> None:
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert torch.equal(tensor, shard_of(values[name], tensor, comm)), name


def run_dtensors(replicas: int) -> dict[str, tuple]:
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (replicas, size // replicas), mesh_dim_names=("dp", "tp")) if replicas > 1 else tp()
    comm = communicator_of(mesh)
    model = filled(comm)
    state = state_dict(model, mesh)
    assert type(state["steps"]) is Tensor
    values = exact()
    for name, tensor in state.items():
        if not isinstance(tensor, DTensor):
            continue
        parameter = model.get_parameter(name)
        assert tensor.to_local().data_ptr() == parameter.data_ptr()
        rows = len(values[name])
        assert torch.equal(tensor.full_tensor()[:rows], values[name]) and not tensor.full_tensor()[rows:].any()
    again = state_dict(model, mesh)
    shared = [n for n in state if n.startswith("key") and len(state[n].placements) > 1]
    assert all(again[n].device_mesh is state[n].device_mesh for n in shared), "a mesh is made anew at every call"
    return {
        n: (tuple(t.shape), t.stride(), t.placements, t.device_mesh.mesh_dim_names)
        for n, t in state.items()
        if n != "steps"
    }


@pytest.mark.parametrize(("size", "replicas"), [(1, 1), (2, 1), (4, 1), (4, 2)])
def test_state_is_dtensors_whose_shape_does_not_depend_on_tp(ranks, size, replicas):
    for state in ranks(size).run(run_dtensors, replicas):
        assert state.keys() == SHAPES.keys() - {"head.weight", "steps"}  # the head's is the table's, saved there
        assert {name: shape for name, (shape, *_) in state.items()} == {
            **{name: SHAPES[name] for name in state},
            "table.weight": (PADDED, HIDDEN),
        }
        assert all(torch.empty(shape).stride() == stride for shape, stride, *_ in state.values())
        assert state["table.weight"][2:] == ((Shard(0),), ("tp",))
        assert state["out.weight"][2:] == ((Shard(1),), ("tp",))
        assert state["norm.weight"][2:] == ((Replicate(),), ("tp",))
        shared = ((Shard(0), Replicate()), ("tp_kv", "tp_rep")) if size // replicas == 4 else ((Shard(0),), ("tp",))
        assert state["key.weight"][2:] == state["key.bias"][2:] == shared


def run_full(on: str) -> list:
    mesh = tp()
    comm = communicator_of(mesh)
    model = filled(comm)
    place = mesh if on == "mesh" else comm
    state = state_dict(model, place, full=True)
    assert [name for name, _ in full_tensors(model, place)] == list(state) == list(model.state_dict())
    assert all(type(tensor) is Tensor for tensor in state.values())
    assert state["table.weight"].data_ptr() == state["head.weight"].data_ptr()
    return [name for name, tensor in state.items() if not torch.equal(tensor, exact()[name])]


@pytest.mark.parametrize(("size", "on"), [(1, "mesh"), (2, "mesh"), (4, "mesh"), (2, "communicator")])
def test_full_state_is_plain_and_without_padding(ranks, size, on):
    assert ranks(size).run(run_full, on) == [[]] * size


def run_save(folder: str) -> None:
    mesh = tp()
    dcp.save(state_dict(filled(communicator_of(mesh)), mesh), checkpoint_id=folder)


def run_load(folder: str) -> None:
    mesh = tp()
    comm = communicator_of(mesh)
    model = Model(comm)
    dcp.load(state_dict(model, mesh), checkpoint_id=folder)  # into the parameters' own memory
    assert_holds(model, exact(), comm)
    assert model.head.weight is model.table.weight


@pytest.mark.parametrize(("saved", "loaded"), [(2, 4), (2, 1), (4, 2), (1, 4)])
def test_a_checkpoint_of_one_tp_loads_at_another(ranks, tmp_path, saved, loaded):
    ranks(saved).run(run_save, str(tmp_path))
    ranks(loaded).run(run_load, str(tmp_path))


def run_load_whole(padding: int | None, multiple: int, on: str) -> None:
    """From plain whole tensors, as a stock module has them, without padding or with that of another multiple."""
    mesh = tp()
    comm = communicator_of(mesh)
    model, values = Model(comm, multiple), exact(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(9)
    given = dict(values)
    if padding is not None:
        given["table.weight"] = torch.cat([given["table.weight"], torch.full((padding, HIDDEN), 3.0)])
        del given["head.weight"]
    load_state_dict(model, given, mesh if on == "mesh" else comm)
    assert_holds(model, values, comm)


@pytest.mark.parametrize(
    ("padding", "multiple", "on"), [(None, 8, "mesh"), (6, 8, "communicator"), (2, 64, "mesh"), (14, 4, "mesh")]
)
@pytest.mark.parametrize("size", [2, 4])
def test_whole_tensors_are_loaded_and_each_rank_keeps_its_part(ranks, size, padding, multiple, on):
    ranks(size).run(run_load_whole, padding, multiple, on)


def run_load_dtensors() -> None:
    """DTensors of tp 2, of the same tp, and of another placement, into tp 4."""
    mesh = tp()
    comm = communicator_of(mesh)
    values = exact()
    padded = {**values, "table.weight": torch.cat([values["table.weight"], torch.zeros(PADDED - IDS, HIDDEN)])}
    del padded["head.weight"]
    halves = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))["tp"]
    for place, placement in ((halves, Shard(0)), (mesh, Shard(0)), (mesh, Replicate())):
        state = {n: distribute_tensor(t, place, [placement]) if t.dim() else t for n, t in padded.items()}
        model = Model(comm)
        load_state_dict(model, state, mesh)
        assert_holds(model, values, comm)

    wholes, real = [], DTensor.full_tensor
    DTensor.full_tensor = lambda self, **options: wholes.append(self) or real(self, **options)
    try:
        model = Model(comm)
        load_state_dict(model, state_dict(filled(comm), mesh), mesh)
    finally:
        DTensor.full_tensor = real
    assert_holds(model, values, comm)
    assert not wholes, "what lies as the parameter does was made whole"


def test_dtensors_of_any_layout_are_loaded(ranks):
    ranks(4).run(run_load_dtensors)


def run_one_at_a_time() -> int:
    """The most whole tensors that lived at one time while DTensors of another tp were loaded."""
    import weakref

    mesh = tp()
    comm = communicator_of(mesh)
    state = {n: distribute_tensor(t, mesh, [Replicate()]) if t.dim() else t for n, t in exact().items()}
    alive, most, real = weakref.WeakSet(), [0], DTensor.full_tensor

    class Whole(Tensor):
        pass

    def watched(self):
        whole = real(self).clone().as_subclass(Whole)
        alive.add(whole)
        most[0] = max(most[0], len(alive))
        return whole

    DTensor.full_tensor = watched
    try:
        load_state_dict(Model(comm), state, mesh)
    finally:
        DTensor.full_tensor = real
    return most[0]


def test_one_whole_tensor_at_a_time(ranks):
    assert ranks(2).run(run_one_at_a_time) == [1, 1]


def run_stock(options: dict) -> None:
    """A stock model, sharded, out as whole tensors, into a stock model and back."""
    mesh = tp()
    model = parallelize(Llama(**options), mesh, PLAN)
    whole = state_dict(model, mesh, full=True)
    assert list(whole) == list(Llama(**options).state_dict())
    stock = Llama(**options, seed=5)
    stock.load_state_dict(whole)
    assert all(torch.equal(t, Llama(**options).state_dict()[n]) for n, t in stock.state_dict().items())
    other = parallelize(Llama(**options, seed=5), mesh, PLAN)
    load_state_dict(other, stock.state_dict(), mesh)
    assert all(torch.equal(p, q) for p, q in zip(other.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("tied", [False, True])
def test_a_stock_models_state_goes_both_ways(ranks, tied):
    ranks(2).run(run_stock, {"tied": tied, "bias": True})


def run_wrong_shards() -> list[str]:
    mesh = tp()
    comm, rank = communicator_of(mesh), dist.get_rank()

    def model() -> Model:
        return filled(comm)

    short, strided, cast, lacking, marked = (model() for _ in range(5))
    if rank == 1:
        short.out.weight.data = short.out.weight.data[:, :-1].contiguous()
        cast.norm.weight.data = cast.norm.weight.data.double()
        lacking.norm.bias = None
        marked.out.bias.tp_placement = Shard(0)
    strided.out.weight.data = strided.out.weight.data.t().contiguous().t()
    texts = []
    for wrong in (short, strided, cast, lacking, marked):
        with pytest.raises(ValueError, match="state_dict: ") as refused:
            state_dict(wrong, mesh)
        texts.append(str(refused.value))
    return texts


def test_shards_that_are_no_parts_of_one_tensor_are_refused_on_every_rank(ranks):
    texts = ranks(2).run(run_wrong_shards)
    assert texts[0] == texts[1]
    short, strided, cast, lacking, marked = texts[0]
    assert "out.weight is [32, 16] float32" in short and "[32, 15] float32" in short and "rank 1" in short
    assert "out.weight on rank 0 has strides (1, 32)" in strided
    assert "norm.weight is [32] float32" in cast and "[32] float64" in cast
    assert "only rank 0 of 0 and 1 has 'norm.bias'" in lacking
    assert "out.bias" in marked and "as R" in marked and "as S(0)" in marked


def run_refused() -> list[str]:
    mesh = tp()
    model = filled(communicator_of(mesh))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    values = exact()
    lacking = {name: tensor for name, tensor in values.items() if name not in ("out.bias", "key.weight")}
    wrong = [
        lacking,
        {**values, "extra": torch.zeros(1)},
        {**values, "out.weight": torch.zeros(HIDDEN, HIDDEN + 2)},
        {**values, "table.weight": torch.zeros(IDS - 1, HIDDEN)},
        {**values, "key.bias": torch.zeros(())},
    ]
    texts = []
    for state in wrong:
        with pytest.raises(ValueError, match="load_state_dict: ") as refused:
            load_state_dict(model, state, mesh)
        texts.append(str(refused.value))
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    load_state_dict(model, {"norm.weight": torch.full((HIDDEN,), 3.0), "extra": torch.zeros(1)}, mesh, strict=False)
    assert (model.norm.weight == 3).all()
    with pytest.raises(ValueError, match="is on the device meta"):
        load_state_dict(
            parallelize(nn.Linear(8, 8, device="meta"), mesh, {"": "colwise"}), nn.Linear(8, 8).state_dict(), mesh
        )
    return texts


def test_a_state_that_does_not_fit_is_refused_and_nothing_is_changed(ranks):
    missing, extra, shape, short, scalar = ranks(2).run(run_refused)[0]
    assert "the state has no key.weight, out.bias; " in missing
    assert "has what the module has not: extra" in extra
    assert "out.weight is [32, 34] in the state and [32, 32] in the module" in shape
    assert f"table.weight is [{IDS - 1}, 32] in the state and [{PADDED}, 32]" in short
    assert "key.bias is [] in the state" in scalar


def run_meshes() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with communicator(dist.group.WORLD, name="tp") as comm:
        model = Model(comm)
    with pytest.raises(ValueError, match="the mesh has no name"):
        state_dict(model, mesh)
    with pytest.raises(ValueError, match='none of them called "tp"'):
        state_dict(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "pp")))


def test_meshes_without_a_tensor_parallel_dimension_are_refused(ranks):
    ranks(4).run(run_meshes)
