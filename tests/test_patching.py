"""tpmp_kernels.patch: one model computes by our ops, to within rounding, and everything else is as it was."""

import copy
import functools
import io

import patchable_models
import pytest
import torch
from bounds import assert_no_worse_than_torch
from patchable_models import (
    GPT2MLP,
    MLP,
    VOCAB,
    WIDTH,
    Attention,
    CappedForCausalLM,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    OneMoreRMSNorm,
    RMSNorm,
    RotaryEmbedding,
    apply_rotary_pos_emb,
)
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import tpmp_kernels
from tpmp_kernels.ops import use_backend

OPS = ("linear_cross_entropy", "mlp", "norm", "rope")
LLAMA = {"gated_mlp", "linear_cross_entropy", "rms_norm", "rope"}
MODELS = {"llama": LlamaForCausalLM, "gpt2": GPT2LMHeadModel}


def make(kind=LlamaForCausalLM) -> nn.Module:
    torch.manual_seed(0)
    model = kind().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms and biases of ones and zeros would not show whether they are read.
            parameter.add_(0.1 * torch.randn(parameter.shape)) if parameter.dim() == 1 else parameter.mul_(0.7)
    return model


def batch() -> dict:
    ids = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.masked_fill(ids % 5 == 0, -100)}


def step(model: nn.Module, **inputs) -> dict[str, torch.Tensor]:
    """The loss and every gradient of a training step."""
    model.zero_grad()
    output = model(**(inputs or batch()))
    output.loss.backward()
    return {"loss": output.loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


class _Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, name = func.name().split("::")
        if space == "tpmp_kernels":
            self.names.add(name)
        return func(*args, **(kwargs or {}))


def calls(model: nn.Module, **inputs) -> set[str]:
    """Our ops that a forward runs."""
    with torch.no_grad(), _Calls() as seen:
        model(**(inputs or batch()))
    return seen.names


def of(patched, op: str) -> set[str]:
    return {site.module for site in patched.replaced if site.op == op}


# ---- what is replaced


def test_what_matches_is_found_and_listed():
    model = make()
    patched = tpmp_kernels.patch(model)
    assert patched.skipped == ()
    assert of(patched, "mlp") == {"model.layers.0.mlp", "model.layers.1.mlp"}
    norms = {f"model.layers.{i}.{name}_layernorm" for i in (0, 1) for name in ("input", "post_attention")}
    assert of(patched, "norm") == {*norms, "model.norm"}
    assert of(patched, "rope") == {"model.layers.0.self_attn", "model.layers.1.self_attn"}
    assert of(patched, "linear_cross_entropy") == {"(model)"}
    assert calls(model) == LLAMA
    head, columns, *rows = repr(patched).splitlines()
    assert head == "LlamaForCausalLM: 10 modules replaced, 0 left alone" and len(rows) == 10
    starts = [columns.index(name) for name in ("class", "op ", "computed by")]
    row = next(row for row in rows if row.startswith("model.layers.1.mlp "))
    assert [row[start:].split()[0] for start in starts] == ["MLP", "mlp", "ops.gated_mlp"]


def test_gpt2_is_found():
    model = make(GPT2LMHeadModel)
    patched = tpmp_kernels.patch(model)
    assert of(patched, "mlp") == {"transformer.h.0.1", "transformer.h.1.1"}
    assert of(patched, "norm") == {"transformer.h.0.0", "transformer.h.1.0", "transformer.ln_f"}
    assert calls(model) == {"mlp", "layer_norm", "linear_cross_entropy"}


@pytest.mark.parametrize("op", OPS)
def test_only_what_is_asked_for(op):
    model = make()
    patched = tpmp_kernels.patch(model, op)
    assert {site.op for site in patched.replaced} == {op}
    assert calls(model) == {site.how.removeprefix("ops.") for site in patched.replaced} and len(calls(model)) == 1


@pytest.mark.parametrize(
    "act, name", [(nn.GELU(), "gelu"), (nn.GELU("tanh"), "gelu_tanh"), (nn.functional.silu, "silu")]
)
def test_activations_are_told_by_what_they_compute(act, name):
    mlp = MLP(act)
    x = torch.randn(4, WIDTH)
    expected = mlp(x)
    tpmp_kernels.patch(mlp, "mlp")
    torch.testing.assert_close(mlp(x), expected)


@pytest.mark.parametrize("eps", [None, 1e-3])
@pytest.mark.parametrize("kind", [nn.RMSNorm, nn.LayerNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_torch(kind, eps, dtype):
    norm = kind(WIDTH, **{} if eps is None else {"eps": eps}).to(dtype)
    nn.init.normal_(norm.weight)
    x = (torch.randn(3, 5, WIDTH) * 1e-3).to(dtype)  # small enough for eps to count
    expected = norm(x)
    tpmp_kernels.patch(norm, "norm")
    torch.testing.assert_close(norm(x), expected)
    assert calls(norm, input=x) == {"layer_norm" if kind is nn.LayerNorm else "rms_norm"}  # by keyword too


# ---- equivalence


@pytest.mark.parametrize(
    "kind, ops",
    [("llama", None), *(("llama", op) for op in OPS), ("gpt2", None), *(("gpt2", op) for op in OPS[:3])],
)
def test_losses_and_gradients(kind, ops):
    """Against the stock model in fp64, no worse than twice the stock model in fp32, and a unit in the last place."""
    model = make(MODELS[kind])
    exact, stock = step(copy.deepcopy(model).double()), step(model)
    tpmp_kernels.patch(model, ops)
    ours = step(model)
    assert ours.keys() == exact.keys() and len(exact) > 10
    for name in exact:
        assert_no_worse_than_torch(ours[name], stock[name], exact[name], 2.0**-23, least=1)


@pytest.mark.parametrize(
    "options",
    [
        {"num_items_in_batch": 7},
        {"num_items_in_batch": torch.tensor(7)},
        {"ignore_index": 3},
        {"shift_labels": torch.arange(18).view(2, 9)},
    ],
    ids=["int", "tensor", "ignore_index", "shift_labels"],
)
def test_options_of_the_loss(options):
    model = make()
    inputs = batch() | options | ({"labels": batch()["input_ids"]} if "ignore_index" in options else {})
    exact, stock = step(copy.deepcopy(model).double(), **inputs), step(model, **inputs)
    tpmp_kernels.patch(model, "linear_cross_entropy")
    ours = step(model, **inputs)
    for name in exact:
        assert_no_worse_than_torch(ours[name], stock[name], exact[name], 2.0**-23, least=1)


def test_what_a_forward_returns():
    model, inputs = make(), batch()
    stock = model(**inputs)
    with tpmp_kernels.patch(model, "linear_cross_entropy"):
        ours, positional = model(**inputs), model(inputs["input_ids"], None, inputs["labels"])
        without = model(inputs["input_ids"])
    assert ours.logits is None and torch.equal(ours.last_hidden_state, stock.last_hidden_state)
    assert positional.logits is None and torch.equal(positional.loss, ours.loss)
    assert without.loss is None and torch.equal(without.logits, stock.logits)


def test_positions_of_each_row():
    model, inputs = make(), batch() | {"position_ids": torch.stack([torch.arange(9), torch.arange(9) * 3 + 1])}
    exact, stock = step(copy.deepcopy(model).double(), **inputs), step(model, **inputs)
    tpmp_kernels.patch(model, "rope")
    ours = step(model, **inputs)
    for name in exact:
        assert_no_worse_than_torch(ours[name], stock[name], exact[name], 2.0**-23, least=1)


def test_learned_angles_keep_their_gradient():
    model = make()
    model.model.rotary_emb.inv_freq.requires_grad_()
    tpmp_kernels.patch(model, "rope")
    step(model)
    assert model.model.rotary_emb.inv_freq.grad.abs().max() > 0


class _Turned(nn.Module):
    def forward(self, q, k, *angles, **options):
        return apply_rotary_pos_emb(q, k, *angles, **options)


@pytest.mark.parametrize(
    "dtype, options, ours",
    [
        (torch.float32, {}, {"rope"}),
        (torch.bfloat16, {}, {"rope"}),  # cos and sin in fp32: so are the results
        (torch.float32, {"unsqueeze_dim": 2}, set()),
    ],
)
def test_rotations(dtype, options, ours):
    attention, table = nn.ModuleList([_Turned(), RotaryEmbedding()])
    shapes = [(2, 5, 3, 6), (2, 5, 1, 6)] if options else [(2, 3, 5, 6), (2, 1, 5, 6)]
    inputs = [torch.randn(shape).to(dtype) for shape in shapes] + [*table(torch.zeros(1), torch.arange(5)[None])]
    expected = attention(*inputs, **options)
    tpmp_kernels.patch(nn.ModuleList([attention, table]), "rope")
    with _Calls() as seen:
        got = attention(*inputs, **options)
    torch.testing.assert_close(got, expected)
    assert seen.names == ours


def test_generation_is_the_same():
    model, ids = make(), batch()["input_ids"]

    def greedy() -> torch.Tensor:
        tokens = ids
        with torch.inference_mode():
            for _ in range(6):
                tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
        return tokens

    expected = greedy()
    tpmp_kernels.patch(model)
    assert torch.equal(greedy(), expected)


def test_dropout_is_kept():
    model = make(GPT2LMHeadModel).train()
    losses = {}
    for name, seed in (("stock", 3), ("ours", 3), ("other", 4)):
        if name == "ours":
            tpmp_kernels.patch(model, ["mlp"])
        torch.manual_seed(seed)
        losses[name] = model(**batch()).loss.item()
    assert losses["ours"] == pytest.approx(losses["stock"], rel=1e-6) and abs(losses["other"] - losses["stock"]) > 1e-3
    model.eval()
    assert torch.equal(model(**batch()).loss, model(**batch()).loss)


@pytest.mark.parametrize("kind", MODELS)
def test_autocast(kind):
    model = make(MODELS[kind])
    exact = step(copy.deepcopy(model).double())
    with torch.autocast("cpu", torch.bfloat16):
        stock, before = step(model), model(**batch())
        tpmp_kernels.patch(model)
        ours, after = step(model), model(**batch())
        assert len(calls(model)) >= 3
    assert (after.loss.dtype, after.last_hidden_state.dtype) == (before.loss.dtype, before.last_hidden_state.dtype)
    for name in exact:
        assert ours[name].dtype == stock[name].dtype
        assert_no_worse_than_torch(ours[name], stock[name], exact[name], 2.0**-8, least=1)


def test_two_dtypes_are_left_to_the_stock_forward():
    norm, x = RMSNorm(WIDTH), torch.randn(3, WIDTH, dtype=torch.bfloat16)
    expected = norm(x)
    tpmp_kernels.patch(norm)
    assert expected.dtype == torch.float32 and torch.equal(norm(x), expected)


# ---- what stays


def test_parameters_state_and_generators_stay():
    model = make()
    names, state, before = [*dict(model.named_parameters())], model.state_dict(), torch.get_rng_state()
    parameters = [*model.parameters()]
    tpmp_kernels.patch(model)
    after = model.state_dict()
    assert [*after] == [*state] and all(after[k].data_ptr() == state[k].data_ptr() for k in state)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert [*dict(model.named_parameters())] == names and torch.equal(torch.get_rng_state(), before)


def test_nothing_global_changes():
    kinds = (LlamaForCausalLM, Attention, MLP, RMSNorm)
    before = [kind.forward for kind in kinds]
    other = make()
    tpmp_kernels.patch(make())
    assert all(kind.forward is forward for kind, forward in zip(kinds, before, strict=True))
    assert patchable_models.apply_rotary_pos_emb is apply_rotary_pos_emb
    assert calls(other) == set()


def test_hooks_run():
    model, seen = make(), []
    tpmp_kernels.patch(model)
    layer = model.model.layers[0]
    for name in ("mlp", "input_layernorm", "self_attn"):
        module = getattr(layer, name)
        module.register_forward_pre_hook(lambda *_, name=name: seen.append(("before", name)))
        module.register_forward_hook(lambda *_, name=name: seen.append(("after", name)))
        module.register_full_backward_hook(lambda *_, name=name: seen.append(("gradient", name)))
    model.register_forward_hook(lambda *_: seen.append("model"))
    step(model)
    forward = [(when, name) for name in ("input_layernorm", "self_attn", "mlp") for when in ("before", "after")]
    assert seen == [*forward, "model", *(("gradient", name) for name in ("mlp", "self_attn", "input_layernorm"))]
    assert calls(model) == LLAMA


@pytest.mark.parametrize(
    "kind, path, op",
    [
        (LlamaForCausalLM, "model.layers.0.mlp.gate_proj", "gated_mlp"),
        (LlamaForCausalLM, "model.layers.0.mlp.act_fn", "gated_mlp"),
        (LlamaForCausalLM, "lm_head", "linear_cross_entropy"),
        (GPT2LMHeadModel, "transformer.h.0.1.c_proj", "mlp"),
    ],
)
def test_a_hook_inside_brings_the_stock_forward_back(kind, path, op):
    """The op would not call the layer that has it."""
    model, seen = make(lambda: kind(layers=1)), []
    handle = model.get_submodule(path).register_forward_hook(lambda *_: seen.append(path))
    tpmp_kernels.patch(model)
    assert seen == []  # a proof runs no hooks
    assert op not in calls(model) and seen == [path]
    handle.remove()
    assert op in calls(model) and seen == [path]


def test_a_layer_that_was_exchanged_brings_the_stock_forward_back():
    """As adapters do: what stands for gate_proj now is no linear that the op knows."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    mlp, x = MLP(), torch.randn(3, WIDTH)
    tpmp_kernels.patch(mlp)
    doubled = Doubled(WIDTH, 40, bias=False)
    doubled.weight, mlp.gate_proj = mlp.gate_proj.weight, doubled
    assert torch.equal(mlp(x), MLP.forward(mlp, x))


# ---- and back


def test_undo_restores_exactly():
    model = make()
    before, expected = [set(vars(m)) for m in model.modules()], step(model)
    with tpmp_kernels.patch(model, ops={"mlp", "norm"}) as patched:
        assert calls(model) == {"gated_mlp", "rms_norm"}
    assert [set(vars(m)) for m in model.modules()] == before and calls(model) == set()
    assert all(torch.equal(grad, expected[name]) for name, grad in step(model).items())
    again = tpmp_kernels.patch(model)
    patched.undo()  # of the first, a second time: not of what came after it
    assert calls(model) == LLAMA and "7 modules undone" in repr(patched)
    again.undo()
    assert [set(vars(m)) for m in model.modules()] == before


def test_an_error_inside_undoes_too():
    model = make()
    with pytest.raises(KeyError), tpmp_kernels.patch(model):
        raise KeyError
    assert calls(model) == set()


def test_patches_of_other_modules_come_and_go_in_any_order():
    model = make()
    first, second = tpmp_kernels.patch(model, ["mlp"]), tpmp_kernels.patch(model, ["norm", "rope"])
    first.undo()
    assert calls(model) == {"rms_norm", "rope"}
    third = tpmp_kernels.patch(model, ["mlp"])
    second.undo()
    assert calls(model) == {"gated_mlp"}
    third.undo()
    assert calls(model) == set()


def test_a_second_patch_of_a_module_is_refused():
    model = make()
    patched = tpmp_kernels.patch(model, ["mlp"])
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp .* one that patch bound for 'mlp'; undo that first"):
        tpmp_kernels.patch(model)
    assert calls(model) == {"gated_mlp"}
    patched.undo()
    assert calls(model) == set()


def test_undo_does_not_take_off_what_lies_over_it():
    model = make()
    patched = tpmp_kernels.patch(model)
    mlp = model.model.layers[1].mlp
    ours = mlp.forward
    mlp.forward = lambda x: 2 * ours(x)
    with pytest.raises(RuntimeError, match="the forward of a MLP is expected to be the one that patch bound"):
        patched.undo()
    assert calls(model) == LLAMA
    mlp.forward = ours
    patched.undo()
    assert calls(model) == set()


def test_a_deep_copy_is_patched_and_its_own():
    model = make()
    patched = tpmp_kernels.patch(model)
    twin, twin_patched = copy.deepcopy((model, patched))
    expected = model(**batch()).loss
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(**batch()).loss, expected)
    patched.undo()
    assert calls(model) == set() and calls(twin) == LLAMA
    twin_patched.undo()
    assert calls(twin) == set()


def test_pickles():
    model, buffer, state = make(), io.BytesIO(), io.BytesIO()
    expected = model(**batch()).loss
    tpmp_kernels.patch(model)
    torch.save(model, buffer)
    torch.save(model.state_dict(), state)
    for file in (buffer, state):
        file.seek(0)
    other = make().apply(lambda m: m.reset_parameters() if isinstance(m, nn.Linear) else None)
    other.load_state_dict(torch.load(state))
    assert torch.equal(other(**batch()).loss, expected)
    back = torch.load(buffer, weights_only=False)
    assert calls(back) == set() and torch.equal(back(**batch()).loss, expected)
    tpmp_kernels.patch(back)
    assert calls(back) == LLAMA


# ---- what is refused


class _Detached(MLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x.detach())) * self.up_proj(x))


class _DroppedInside(GPT2MLP):
    def forward(self, hidden_states):
        return self.c_proj(self.dropout(self.act(self.c_fc(hidden_states))))


class _OutsideEps(RMSNorm):
    def forward(self, hidden_states):
        return (
            self.weight * hidden_states / (hidden_states.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)
        )


class _Interleaved(RotaryEmbedding):
    def forward(self, x, position_ids):
        return tuple(t[..., : t.shape[-1] // 2].repeat_interleave(2, -1) for t in super().forward(x, position_ids))


class _Summed(LlamaForCausalLM):
    def loss_function(self, logits, labels, vocab_size, num_items_in_batch=None, **kwargs):
        return super().loss_function(logits, labels, vocab_size, num_items_in_batch=num_items_in_batch or 1)


def _with_forward(module: nn.Module) -> nn.Module:
    module.forward = functools.partial(type(module).forward, module)
    return module


def _with_rotary(rotary: nn.Module) -> nn.Module:
    model = LlamaForCausalLM()
    model.model.rotary_emb = rotary
    return model


def _with_classes(count: int) -> nn.Module:
    model = LlamaForCausalLM()
    model.config.vocab_size = count
    return model


def _with_head(**options) -> nn.Module:
    model = LlamaForCausalLM()
    model.lm_head = nn.Linear(WIDTH, VOCAB, **options)
    return model


@pytest.mark.parametrize(
    "build, op, reason",
    [
        (
            lambda: MLP(bias=True),
            "mlp",
            "its gate_proj, Linear(in_features=24, out_features=40, bias=True), is no layer",
        ),
        (lambda: MLP(nn.Mish()), "mlp", "its act_fn is none of silu, gelu, gelu_tanh"),
        (lambda: MLP(nn.Hardtanh()), "mlp", "its act_fn is none of"),
        (_Detached, "mlp", "has other values or gradients than ops.gated_mlp"),
        (_DroppedInside, "mlp", "has other values or gradients than ops.mlp"),
        (lambda: _with_forward(MLP()), "mlp", "already one of the instance's own"),
        (lambda: OneMoreRMSNorm(WIDTH), "norm", "has other values or gradients than ops.rms_norm"),
        (lambda: _OutsideEps(WIDTH), "norm", "has other values or gradients than ops.rms_norm"),
        (lambda: nn.LayerNorm(WIDTH, elementwise_affine=False), "norm", "it has no weight of one dimension"),
        (lambda: nn.RMSNorm((3, WIDTH)), "norm", "it has no weight of one dimension"),
        (lambda: _with_rotary(_Interleaved()), "rope", "the halves of _Interleaved's cos and sin differ"),
        (lambda: _with_rotary(nn.Identity()), "rope", "no rotary embedding with an inv_freq"),
        (CappedForCausalLM, "linear_cross_entropy", "its forward does more than lm_head and loss_function"),
        (lambda: _with_classes(7), "linear_cross_entropy", "each once, for 53 classes"),
        (_Summed, "linear_cross_entropy", "loss_function: its forward has other values"),
        (lambda: _with_head(bias=True), "linear_cross_entropy", "is no torch.nn.Linear without bias"),
    ],
    ids=lambda value: None if callable(value) else value[:20],
)
def test_what_cannot_be_proved_is_left_alone(build, op, reason):
    module = build()
    with pytest.raises(
        ValueError, match=f"^patch: nothing in {type(module).__name__} matches: '{op}' looks for"
    ) as error:
        tpmp_kernels.patch(module, [op])
    assert reason in str(error.value)
    both = nn.ModuleList([module, nn.LayerNorm(3)])
    skipped = [site for site in tpmp_kernels.patch(both).skipped if site.op == op]
    assert skipped and all(reason in site.how and site.module.startswith("0") for site in skipped)


def test_gelu_that_is_another_is_refused():
    class QuickGELU(nn.Module):
        def forward(self, z):
            return z * torch.sigmoid(1.702 * z)

    with pytest.raises(ValueError, match="its act_fn is none of"):
        tpmp_kernels.patch(MLP(QuickGELU()))


def test_another_rotation_is_refused(monkeypatch):
    monkeypatch.setattr(patchable_models, "apply_rotary_pos_emb", lambda q, k, c, s: apply_rotary_pos_emb(q, k, c, -s))
    with pytest.raises(ValueError, match="apply_rotary_pos_emb: its forward has other values"):
        tpmp_kernels.patch(make(), "rope")


@pytest.mark.parametrize(
    "ops, message",
    [
        (["mlp", "nrom"], "expected ops out of linear_cross_entropy, mlp, norm, rope, got 'nrom'; leave ops out"),
        ([], "expected ops out of linear_cross_entropy, mlp, norm, rope, got none; leave ops out"),
        (
            ["norm", "rope"],
            "nothing in GPT2LMHeadModel matches: 'rope' looks for attention modules .*; leave it out of ops",
        ),
    ],
    ids=["unknown", "none", "not there"],
)
def test_ops_that_are_none_are_refused(ops, message):
    model = make(GPT2LMHeadModel)
    with pytest.raises(ValueError, match=message):
        tpmp_kernels.patch(model, ops)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_model_without_any_is_refused():
    with pytest.raises(
        ValueError, match=r"nothing in Linear matches: .*'mlp' looks for .*; got none; pass another model"
    ):
        tpmp_kernels.patch(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn.Module, got dict; pass the loaded model"):
        tpmp_kernels.patch({})


# ---- torch.compile, CUDA graphs


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.full] * (k == "llama")) for k in MODELS])
def test_compiles_as_one_graph(kind):
    model = make(lambda: MODELS[kind](layers=1))
    tpmp_kernels.patch(model)
    expected, graphs = step(model), []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    got = step(torch.compile(model, fullgraph=True, backend=backend))
    assert all(f"tpmp_kernels.{name}" in graphs[0] for name in calls(model))
    for name, value in expected.items():
        torch.testing.assert_close(got["_orig_mod." * (name != "loss") + name], value)


def test_a_compiled_module_follows_patch_and_undo():
    ran, mlp, x = [], MLP(), torch.randn(3, WIDTH)

    def backend(graph, inputs):
        def run(*args):
            ran.append("tpmp_kernels" in graph.code)
            return graph.forward(*args)

        return run

    compiled = torch.compile(mlp, fullgraph=True, backend=backend)
    compiled(x)
    patched = tpmp_kernels.patch(mlp)
    compiled(x)
    patched.undo()
    compiled(x)
    assert ran == [False, True, False]


def test_layers_compiled_one_by_one_share_a_graph():
    model, counter = make(lambda: LlamaForCausalLM(layers=4)), CompileCounter()
    tpmp_kernels.patch(model)
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend=counter)
    model(**batch())
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", MODELS)
def test_nothing_asks_for_a_value(kind):
    """Tensors without values go through forward and backward, so that a CUDA graph can capture them."""
    model = make(MODELS[kind])
    tpmp_kernels.patch(model)
    fake = FakeTensorMode()
    tensors = {name: fake.from_tensor(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    inputs = {name: fake.from_tensor(tensor) for name, tensor in batch().items()}
    with fake:
        torch.func.functional_call(model, tensors, (), inputs).loss.backward()
    assert all(tensors[name].grad is not None for name, _ in model.named_parameters())


# ---- Hugging Face's own


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": VOCAB}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, "n_positions": 64}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
FAMILIES = {"Llama": 10, "Qwen2": 10, "Qwen3": 14, "Mistral": 10, "GPT2": 8}


def hugging_face(family: str) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="make peers installs transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(GPT2 if family == "GPT2" else SIZES | HEADS), **TOKENS)
    name = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    return make(lambda: getattr(transformers, name)(config))


@pytest.mark.parametrize("family", FAMILIES)
def test_hugging_face(family):
    """The oracle is the definitions in fp64: Hugging Face's own norms and losses go through fp32."""
    model, inputs = hugging_face(family), batch()
    exact = copy.deepcopy(model).double()
    tpmp_kernels.patch(exact)
    with use_backend("reference"):
        exact = step(exact)
    stock, logits = step(model), model(inputs["input_ids"]).logits
    patched = tpmp_kernels.patch(model)
    assert len(patched.replaced) == FAMILIES[family] and not patched.skipped
    assert len(calls(model)) == (3 if family == "GPT2" else 4)
    ours = step(model)
    for name in exact:
        assert_no_worse_than_torch(ours[name], stock[name], exact[name], 2.0**-22, least=1)
        assert (stock[name] - exact[name]).abs().max() <= 1e-5 * exact[name].abs().max()
    torch.testing.assert_close(model(inputs["input_ids"]).logits, logits)
    assert model(**inputs, return_dict=False)[0] == ours["loss"]
    few = model(**inputs, num_items_in_batch=torch.tensor(3)).loss
    patched.undo()
    torch.testing.assert_close(few, model(**inputs, num_items_in_batch=torch.tensor(3)).loss)
    assert all(torch.equal(grad, stock[name]) for name, grad in step(model).items())


@pytest.mark.parametrize("family", ["Qwen3", "GPT2"])
def test_hugging_face_generates(family):
    model, ids = hugging_face(family), batch()["input_ids"][:1]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
    expected = model.generate(ids, **options)
    tpmp_kernels.patch(model)
    assert torch.equal(model.generate(ids, **options), expected)


def test_hugging_face_gemma_keeps_its_norms():
    model = hugging_face("Gemma")
    expected = step(model)["loss"]
    patched = tpmp_kernels.patch(model)
    assert {site.kind for site in patched.skipped} == {"GemmaRMSNorm"} and len(patched.skipped) == 5
    torch.testing.assert_close(step(model)["loss"], expected)
