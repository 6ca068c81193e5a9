"""A user's own model, sharded by tables and by Hugging Face's plans, against the same model whole: fp64."""

import pytest
import torch
import torch.distributed as dist
from tiny_llama import (
    HIDDEN,
    LAYERS,
    PLAN,
    QK_NORMS,
    SEQUENCE_PLAN,
    Llama,
    far,
    loss_of,
    tokens,
    whole,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor import parallel as torchs

from tpmp_kernels.comm import SelfCommunicator, communicator
from tpmp_kernels.tensor_parallel import (
    ColumnParallelLinear,
    ColwiseParallel,
    PrepareModuleInput,
    ReplicateParallel,
    RowwiseParallel,
    SequenceParallel,
    communicator_of,
    load_state_dict,
    parallelize,
    reduce_partial_gradients,
    shard_of,
)
from tpmp_kernels.tensor_parallel.plans import _HUGGING_FACE, _REFUSED, resolve, style_of

# Sums over 32 to 320 values, some of them in another order: measured up to 40 units in the last place.
ULP = 256

STYLES = {
    **PLAN,
    "embed_tokens": RowwiseParallel(input_layouts=Replicate()),
    "layers.*.self_attn.[qkv]_proj": ColwiseParallel(),
    "layers.*.mlp.down_proj": RowwiseParallel(),
    "lm_head": ColwiseParallel(output_layouts=Replicate()),
}
del STYLES["layers.*.self_attn.q_proj"], STYLES["layers.*.self_attn.k_proj"], STYLES["layers.*.self_attn.v_proj"]
V4 = {name: f"local_{style}" if style in ("colwise", "rowwise") else style for name, style in PLAN.items()}
V4 |= {"lm_head": "colwise_rep", "layers.*.self_attn.q_norm": "replicate"}
SPLIT = {**PLAN, **{f"layers.*.mlp.{which}_proj": "colwise_gather_output" for which in ("gate", "up")}}
SPLIT |= {"layers.*.mlp.down_proj": "rowwise_split_input"}
DTENSORS = {**SEQUENCE_PLAN, "norm": "activation", "lm_head": "colwise_loss_parallel"}

CASES = {
    "hf": (PLAN, {"bias": True, "padding": 3}),
    "hf tied": (PLAN, {"tied": True}),
    "hf heads normed": ({**PLAN, **QK_NORMS}, {"qk_norm": True}),
    "hf 4.x": (V4, {}),
    "hf gathered and split": (SPLIT, {"bias": True}),
    "hf sequence parallel": (SEQUENCE_PLAN, {"bias": True}),
    "hf loss parallel": (DTENSORS, {}),
    "styles": (STYLES, {"bias": True}),
    "a list of pairs": (list(STYLES.items()), {}),
}


def run_model(plan, options: dict, defers: bool, on: str) -> tuple[float, float, str]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    place = mesh if on == "mesh" else communicator(dist.group.WORLD, name="tp")
    model = Llama(**options)
    names, submodules = list(model.state_dict()), dict(model.named_modules())
    assert parallelize(model, place, plan, defer_partial_gradients=defers) is model
    assert list(model.state_dict()) == names and dict(model.named_modules()) == submodules

    logits = model(tokens())
    with torchs.loss_parallel():
        loss_of(logits).backward()
    comm = communicator_of(place)
    if defers:
        reduce_partial_gradients(model, comm)
    exact_logits, grads = whole(**options)
    errors = {name: far(p.grad, shard_of(grads[name], p, comm)) for name, p in model.named_parameters()}
    worst = max(errors, key=errors.get)
    return far(logits if plan != DTENSORS else logits.full_tensor(), exact_logits), errors[worst], worst


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [2, 4])
def test_a_models_logits_and_gradients_are_those_of_the_whole(ranks, size, case):
    for logits, grads, name in ranks(size).run(run_model, *CASES[case], False, "mesh"):
        assert logits < ULP and grads < ULP, name


@pytest.mark.parametrize(
    ("case", "defers", "on"),
    [("hf sequence parallel", True, "mesh"), ("hf heads normed", True, "communicator"), ("hf", False, "communicator")],
)
def test_partial_gradients_deferred_and_a_communicator_in_place_of_a_mesh(ranks, case, defers, on):
    for logits, grads, name in ranks(2).run(run_model, *CASES[case], defers, on):
        assert logits < ULP and grads < ULP, name


def run_from_source() -> list[torch.Tensor]:
    """Ranks that begin with different values: the module of rank 1 becomes the module of all."""
    with communicator(dist.group.WORLD, name="tp") as comm:
        model = Llama(seed=comm.rank)
        model.register_buffer("angles", torch.tensor([1j + comm.rank, 2]))
        parallelize(model, comm, PLAN, src_data_rank=1)
        logits = model(tokens())
        assert model.steps == 4 and model.angles[0] == 1j + 1
        own = parallelize(Llama(seed=comm.rank), comm, PLAN, src_data_rank=None)
        assert far(own.norm.weight, Llama(seed=comm.rank).norm.weight) == 0
        return logits.detach()


def test_all_ranks_take_the_values_of_the_source_rank(ranks):
    exact, _ = whole(seed=1)
    assert all(far(logits, exact) < ULP for logits in ranks(2).run(run_from_source))


def run_counted(checkpointed: bool) -> tuple[list[str], list[str]]:
    """The tags of the collectives of forward and of backward."""
    with communicator(dist.group.WORLD, name="tp") as comm:
        model, called, collect = parallelize(Llama(), comm, PLAN), [], comm._collect
        comm._collect = lambda call, *rest: (called.append(call.tag), collect(call, *rest))[1]
        if checkpointed:
            for layer in model.layers:
                inner = layer.forward
                layer.forward = lambda x, inner=inner: torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=False)
        logits = model(tokens())
        forward = called[:]
        called.clear()
        loss_of(logits).backward()
        grads = whole()[1]
        assert all(far(p.grad, shard_of(grads[name], p, comm)) < ULP for name, p in model.named_parameters())
        model.eval()
        with torch.no_grad():
            assert far(model(tokens()), logits.detach()) == 0
        return forward, called


def test_layers_that_read_the_same_reduce_its_gradient_once(ranks):
    forward, backward = ranks(2).run(run_counted, False)[0]
    assert len(forward) == 1 + 2 * LAYERS + 1  # the embedding, o_proj and down_proj, the gathered logits
    reductions = [tag for tag in backward[: 1 + 2 * LAYERS] if tag.endswith(".grad")]
    # One each for the head, and for q, k, v and gate, up of every layer.
    assert len(reductions) == 1 + 2 * LAYERS == len(set(reductions))
    assert [tag for tag in backward if "self_attn.input" in tag] == [
        f"layers.{i}.self_attn.input.grad" for i in reversed(range(LAYERS))
    ]


def test_recomputed_layers_share_too(ranks):
    _, backward = ranks(2).run(run_counted, True)[0]
    assert sum("self_attn.input" in tag for tag in backward) == LAYERS


def run_from_meta() -> float:
    """A model too large for a rank: sharded without memory, allocated, then filled."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    options = {"bias": True, "tied": True}
    model = parallelize(Llama(**options).to("meta"), mesh, SEQUENCE_PLAN).to_empty(device="cpu")
    model.lm_head.weight = model.embed_tokens.weight  # to_empty unties, of any module
    load_state_dict(model, Llama(**options).state_dict(), mesh)
    loss_of(model(tokens())).backward()
    grads, comm = whole(**options)[1], communicator_of(mesh)
    return max(far(p.grad, shard_of(grads[name], p, comm)) for name, p in model.named_parameters())


def test_a_model_sharded_on_the_device_meta_is_allocated_and_filled_afterwards(ranks):
    assert max(ranks(2).run(run_from_meta)) < ULP


class Reuse(nn.Module):
    """Column layers called on the same x, on another one, and on the same after it was written to, which is allowed
    where no weight needs it for its gradient."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(HIDDEN, 8, bias=False), nn.Linear(HIDDEN, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 1.0
        first = self.b(x * 2) + self.a(x)
        if not self.a.weight.requires_grad:
            x *= 3
        return first + self.b(x) + self.a(x)


def run_reuse(frozen: bool) -> None:
    with communicator(dist.group.WORLD, name="tp") as comm:
        torch.manual_seed(0)
        exact, ours = (Reuse().double().requires_grad_(not frozen) for _ in range(2))
        ours.load_state_dict(exact.state_dict())
        parallelize(ours, comm, {"*": "colwise"})
        x, mine = (torch.ones(3, HIDDEN, dtype=torch.float64, requires_grad=True) for _ in range(2))
        y, exact_y = ours(mine), exact(x)
        exact_y.square().sum().backward()
        y.square().sum().backward()
        assert far(y, shard_like(exact_y, comm)) < ULP and far(mine.grad, x.grad) < ULP
        assert ours.a.shares is ours.b.shares and ours.a.shares.last is None
        # Outside its parent's forward a layer makes a copy of its own, and nothing is kept.
        alone = ours.a(mine)
        assert ours.a.shares.last is None and alone.requires_grad


def shard_like(y: torch.Tensor, comm) -> torch.Tensor:
    return y.chunk(comm.size, dim=-1)[comm.rank]


@pytest.mark.parametrize("frozen", [False, True])
def test_the_shared_copy_is_that_of_the_tensor_as_it_is(ranks, frozen):
    ranks(2).run(run_reuse, frozen)


def four() -> SelfCommunicator:
    """Enough of a communicator of four ranks for what is refused before any call."""
    comm = SelfCommunicator()
    comm.size = 4
    return comm


TWICE = {"layers.*.mlp.*": "colwise", "layers.1.mlp.down_proj": "rowwise"}
REFUSED = [
    ({"layers.*.attn.q_proj": "colwise"}, ValueError, r"matches no module; nearest are layers.\*.self_attn.q_proj"),
    ({**PLAN, "model.norm": "replicate"}, ValueError, "'model.norm' matches no module"),
    ({"layers.*.mlp.*.*": "replicate"}, ValueError, "matches no module"),
    (TWICE, ValueError, r"layers.1.mlp.down_proj is matched by 'layers.\*.mlp.\*' with Colwise.* leave one of them"),
    ({**PLAN, "norm": "colwise"}, TypeError, "norm: ColwiseParallel is for nn.Linear and nn.Embedding, got RMSNorm"),
    ({"lm_head": torchs.ColwiseParallel()}, TypeError, "torch's ColwiseParallel; import that name from tpmp_kernels"),
    ({"lm_head": None}, TypeError, "'lm_head' is given None"),
    ({"lm_head": "colwise_replicated"}, ValueError, "asks for 'colwise_replicated'; known are colwise,"),
    ({"lm_head": "packed_colwise"}, ValueError, "'packed_colwise': a weight that packs several"),
    ({**PLAN, "norm": SequenceParallel()}, ValueError, "norm: use_local_output=False gives DTensors"),
]  # fmt: skip


@pytest.mark.parametrize(("plan", "error", "match"), REFUSED, ids=range(len(REFUSED)))
def test_a_plan_that_does_not_fit_is_refused_and_nothing_is_changed(plan, error, match):
    model = Llama()
    before = {name: (type(each), dict(each.named_parameters())) for name, each in model.named_modules()}
    with pytest.raises(error, match=match):
        parallelize(model, four(), plan)
    assert before == {name: (type(each), dict(each.named_parameters())) for name, each in model.named_modules()}
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())


def test_a_size_that_does_not_divide_is_refused_in_one_sentence():
    model = Llama(vocab=50)
    match = r"num_embeddings of embed_tokens is 50, not divisible by tp=4; use tp in \[1, 2\]"
    with pytest.raises(ValueError, match=match) as refused:
        parallelize(model, four(), PLAN)
    assert "\n" not in str(refused.value) and type(model.lm_head) is nn.Linear


def test_a_tied_weight_that_one_of_its_places_leaves_whole_is_refused():
    plan = {name: style for name, style in PLAN.items() if name != "embed_tokens"}
    with pytest.raises(ValueError, match=r"embed_tokens.weight as R.*, lm_head.weight as S.*; cut it alike"):
        parallelize(Llama(tied=True), four(), plan)


def test_every_name_of_hugging_face_has_its_style_or_its_reason():
    styles = {name: style_of(name, "x") for name in _HUGGING_FACE}
    assert styles["colwise"] == styles["local_colwise"] == ColwiseParallel()
    assert styles["rowwise_rep"] == RowwiseParallel(input_layouts=Replicate())
    assert styles["vocab_reduce_scatter"] == RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
    assert styles["replicated_with_grad_allreduce"] == ReplicateParallel(partial_gradients=True)
    assert isinstance(styles["module_allgather_hidden_states"], PrepareModuleInput)
    for name in _REFUSED:
        with pytest.raises(ValueError, match=f"asks for '{name}': "):
            style_of(name, "x")


def test_a_star_stands_for_one_part_of_a_name():
    found = [name for name, _, _ in resolve(Llama(), {"layers.*": "replicate", "layers.?.mlp.[gu]*": "colwise"})]
    assert found == [f"layers.{i}{rest}" for i in range(LAYERS) for rest in ("", ".mlp.gate_proj", ".mlp.up_proj")]


def test_a_module_under_two_names_is_sharded_once():
    model = nn.ModuleDict({"a": nn.Linear(8, 8)})
    model["b"] = model["a"]
    parallelize(model, SelfCommunicator(), {"a": "colwise", "b": "colwise"})
    assert model["a"] is model["b"] and isinstance(model["a"], ColumnParallelLinear)
    with pytest.raises(ValueError, match=r"is matched by 'a' with .* and by 'b' with"):
        parallelize(nn.ModuleDict({"a": (one := nn.Linear(8, 8)), "b": one}), four(), {"a": "colwise", "b": "rowwise"})


def test_the_module_itself_is_named_by_the_empty_pattern():
    assert isinstance(parallelize(nn.Linear(8, 4), SelfCommunicator(), {"": "colwise"}), ColumnParallelLinear)
