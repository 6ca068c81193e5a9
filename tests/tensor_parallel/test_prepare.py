"""Styles of whole modules: torch's tutorial with ours, and layouts of arguments and results."""

import functools

import pytest
import torch
import torch.nn.functional as F
from placed import WHOLE, integers, part, tp
from tiny_llama import HIDDEN, Llama, far, loss_of, tokens, whole
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import loss_parallel, parallelize_module

from tpmp_kernels.tensor_parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleInputOutput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    communicator_of,
    shard_of,
)

# The plan of torch's tensor-parallel tutorial, for its Llama with sequence parallelism.
BLOCK = {
    "input_layernorm": SequenceParallel(),
    "self_attn": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
    "self_attn.q_proj": ColwiseParallel(use_local_output=False),
    "self_attn.k_proj": ColwiseParallel(use_local_output=False),
    "self_attn.v_proj": ColwiseParallel(use_local_output=False),
    "self_attn.o_proj": RowwiseParallel(output_layouts=Shard(1)),
    "post_attention_layernorm": SequenceParallel(),
    "mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
    "mlp.gate_proj": ColwiseParallel(),
    "mlp.up_proj": ColwiseParallel(),
    "mlp.down_proj": RowwiseParallel(output_layouts=Shard(1)),
}


def ends(sharded_logits: bool) -> dict:
    head = {"output_layouts": Shard(-1), "use_local_output": False} if sharded_logits else {"output_layouts": WHOLE}
    return {
        "embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "lm_head": ColwiseParallel(input_layouts=Shard(1), **head),
    }


class Attention(nn.Module):
    """The tutorial's, which goes on with DTensors: heads are counted over all ranks."""

    def __init__(self, stock: nn.Module):
        super().__init__()
        self.size = stock.size
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = stock.q_proj, stock.k_proj, stock.v_proj, stock.o_proj

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (y.view(*y.shape[:2], HIDDEN // self.size, self.size).transpose(1, 2) for y in (q, k, v))
        weights = (q @ k.transpose(2, 3) / self.size**0.5).softmax(-1)
        return self.o_proj((weights @ v).transpose(1, 2).reshape(*x.shape[:2], HIDDEN))


def tutorial_model() -> nn.Module:
    model = Llama()
    for layer in model.layers:
        layer.self_attn = Attention(layer.self_attn)
    return model


def run_tutorial(sharded_logits: bool) -> tuple[float, list]:
    mesh, model = tp(), tutorial_model()
    for layer in model.layers:
        parallelize_module(layer, mesh, BLOCK)
    parallelize_module(model, mesh, ends(sharded_logits))
    exact = tutorial_model()
    exact_logits = exact(tokens())
    loss_of(exact_logits).backward()
    logits = model(tokens())
    if sharded_logits:
        with loss_parallel():
            loss_of(logits).backward()
        logits = logits.full_tensor()
    else:
        loss_of(logits).backward()
    grads = dict(exact.named_parameters())
    comm = communicator_of(mesh)
    worst = max(far(p.grad, shard_of(grads[name].grad, p, comm)) for name, p in model.named_parameters())
    return far(logits, exact_logits), worst, list(model.state_dict()) == list(exact.state_dict())


@pytest.mark.parametrize("sharded_logits", [False, True], ids=["whole logits", "loss_parallel"])
@pytest.mark.parametrize("size", [2, 4])
def test_the_plan_of_torchs_tutorial_works_with_our_styles(ranks, size, sharded_logits):
    for logits, worst, same_names in ranks(size).run(run_tutorial, sharded_logits):
        assert logits < 64 and worst < 512 and same_names


class Two(nn.Module):
    def forward(self, x: Tensor, scale: float, *, y: Tensor) -> tuple[Tensor, str]:
        return x * scale + y, "aside"


def run_prepare(plain: bool) -> None:
    mesh = tp()
    style = PrepareModuleInputOutput(
        input_layouts=(Shard(0), None),
        desired_input_layouts=(WHOLE, None),
        input_kwarg_layouts={"y": Shard(1)},
        desired_input_kwarg_layouts={"y": WHOLE},
        use_local_input=plain,
        output_layouts=(WHOLE, None),
        desired_output_layouts=(Shard(1), None),
        use_local_output=plain,
    )
    module = parallelize_module(Two(), mesh, style)
    x, y = integers(4, 8, seed=1), integers(4, 8, seed=2)
    mine = part(x, Shard(0), mesh).clone().requires_grad_()
    out, aside = module(mine, 3.0, y=part(y, Shard(1), mesh))
    assert aside == "aside" and isinstance(out, DTensor) == (not plain)
    out = out if plain else out.to_local()
    grad = integers(4, 8, seed=3)
    out.backward(part(grad, Shard(1), mesh))
    assert torch.equal(out, part(3 * x + y, Shard(1), mesh))
    assert torch.equal(mine.grad, part(3 * grad, Shard(0), mesh))
    with pytest.raises(ValueError, match="1 values for 2 layouts"):
        module(mine, y=y)


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "DTensor"])
def test_arguments_and_results_are_brought_into_the_desired_layouts(ranks, plain):
    ranks(2).run(run_prepare, plain)


def run_partial_output() -> None:
    mesh = tp()
    style = PrepareModuleOutput(output_layouts=Partial(), desired_output_layouts=WHOLE)
    module = parallelize_module(nn.Identity(), mesh, style)
    x = integers(3, seed=mesh.get_local_rank()).requires_grad_()
    y = module(x)
    y.backward(integers(3, seed=9))
    assert torch.equal(y, sum(integers(3, seed=r) for r in range(mesh.size())))
    assert torch.equal(x.grad, integers(3, seed=9))


def test_partial_sums_of_a_module_are_added(ranks):
    ranks(2).run(run_partial_output)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (functools.partial(ColwiseParallel, output_layouts=Partial()), "output_layouts is Partial"),
        (functools.partial(PrepareModuleInput, input_layouts=(WHOLE, WHOLE), desired_input_layouts=WHOLE), "as many"),
        (functools.partial(PrepareModuleInput, input_layouts=WHOLE), "as many"),
        (functools.partial(PrepareModuleInput, input_kwarg_layouts={"x": WHOLE}), "different arguments"),
    ],
)
def test_layouts_that_make_no_sense_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_whole_model_of_the_tests_has_gradients_everywhere():
    assert all(grad.abs().max() > 1e-4 for grad in whole(bias=True, qk_norm=True)[1].values())
    assert not F.embedding(tokens(), whole(padding=3)[1]["embed_tokens.weight"])[tokens() == 3].any()
