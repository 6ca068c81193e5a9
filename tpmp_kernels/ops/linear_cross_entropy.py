"""ops.linear_cross_entropy: the loss of x @ weight^T without the logits ever being whole, differentiable.

    recompute   forward   slices of the vocabulary: z = x @ W_s^T, statistics; one exchange over the group; loss
    (default)   backward  the same slices and z again: d, see ops/vocab.py; dx += d @ W_s, dW_s = d^T @ x
    in forward  for each chunk of tokens: z of all slices, statistics, exchange, d over z, dx and dW += d^T @ x;
    (grad_scale)          backward hands dx and dW out

Four GEMMs against three: the first form keeps three numbers a token for backward, the second dx and dW. On CUDA the
first stores no logits: the epilogue of their GEMM makes the statistics, of all slices at once, or d of a slice. Apple's
Cut Cross-Entropy (arXiv 2411.09009) and Liger-Kernel (arXiv 2410.10989) are the two ideas; here both are exact and
shared over ranks. x is the same on all ranks and dx complete, unless partial_dx: the op equals the one that holds the
whole weight.
"""

from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.effects import _EffectType, _register_effectful_op

from tpmp_kernels import reference
from tpmp_kernels.ops import backend, checks, main_grad, vocab, vocab_slices
from tpmp_kernels.ops._register import below_autograd, lowest, register

_OP = "linear_cross_entropy"


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    grad_scale: float | None = None,
    partial_dx: bool = False,
) -> Tensor:
    """Cross entropy of the logits x @ weight^T with the ids target, in fp32 (fp64 for fp64).

    x [..., D], weight [V_r, D], target [...] (int64) -> [...] for reduction "none", else a scalar; "mean" is over the
    tokens whose target is not ignore_index. `group` cuts the vocabulary over ranks, equally by default; otherwise,
    `vocab_start` is the id of this rank's first row. vocab_size is the number of classes, and must be given on a group;
    rows beyond it are padding, neither read nor given a gradient. Loss and dx are the same bits on all ranks.
    label_smoothing as in torch; z_loss adds z_loss * lse^2 (PaLM, 2022); softcap makes the logits cap tanh(z / cap)
    (Gemma 2, 2024).

    partial_dx leaves dx as this rank's part, in x's dtype, of a sum over the ranks that stands in front of x, as in the
    backward of comm.autograd's all_gather: a reduce-scatter of half the bytes where x was gathered.

    grad_scale is the gradient that backward will bring (1.0 for loss.backward()), for reduction "mean" or "sum": the
    gradients are then made along with the loss, for a quarter less arithmetic and the memory of dW from forward to
    backward, which happens once. ValueError where backward brings another (on CUDA, an assertion on the device).

    ValueError for shapes, devices, options, shards that do not tile the vocabulary and, on the CPU, a target that is
    no class; TypeError for dtypes.
    """
    checks.weight(_OP, "weight", weight, x)
    checks.shape(_OP, "target", target, x.shape[:-1])
    checks.together(_OP, x, weight=weight)
    if grad_scale is not None and reduction == "none":
        raise ValueError(
            f'{_OP}: grad_scale needs one gradient for all tokens, got reduction "none"; pass "sum" or "mean"'
        )
    loss = vocab.arguments(
        _OP, weight.shape[0], target, x, group, vocab_start, vocab_size,
        label_smoothing, z_loss, softcap, ignore_index, reduction,
    )  # fmt: skip
    if backend.choose(x) == "reference":
        return reference.linear_cross_entropy(
            x, weight, target, group=group, vocab_start=vocab_start, vocab_size=vocab_size,
            label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap, ignore_index=ignore_index,
            reduction=reduction, grad_scale=grad_scale, partial_dx=partial_dx,
        )  # fmt: skip
    return _linear_cross_entropy(x, weight, target, main_grad.slot(weight), grad_scale, partial_dx, *loss)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, target, slot, grad_scale, partial_dx, *options):
        ctx.slot, ctx.grad_scale, ctx.partial_dx, ctx.options = slot, grad_scale, partial_dx, options
        need_x, need_weight, *_ = ctx.needs_input_grad
        with below_autograd():
            if grad_scale is None:
                loss, statistics = _saved(x, weight, target, *options)
                ctx.save_for_backward(x, weight, target, statistics)
            else:
                how = need_x, need_weight, slot is not None, partial_dx
                loss, *ctx.made = _with_gradients(x, weight, target, grad_scale, *how, *options)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        need_x, need_weight, *rest = ctx.needs_input_grad
        # Under create_graph the weight's gradient is autograd's: the sum in main_grad has no graph.
        adds = need_weight and ctx.slot is not None and not torch.is_grad_enabled()
        if ctx.grad_scale is not None:
            dx, dweight = _handed_out(ctx.made, dloss, ctx.grad_scale)
            if adds:
                _add_to_main_grad(dweight, ctx.slot)
        elif adds:
            dx = _backward_of_parameter(dloss, *ctx.saved_tensors, ctx.slot, need_x, ctx.partial_dx, *ctx.options)
        else:
            dx, dweight = _backward(dloss, *ctx.saved_tensors, need_x, need_weight, ctx.partial_dx, *ctx.options)
        return dx if need_x else None, dweight if need_weight and not adds else None, *(None for _ in rest)


def _handed_out(made: list[Tensor], dloss: Tensor, grad_scale: float) -> tuple[Tensor, Tensor]:
    if not made:
        raise RuntimeError(
            f"{_OP}: with grad_scale, backward hands out its gradients once, and was asked again; leave out grad_scale"
        )
    if dloss.is_cuda or type(dloss) is not Tensor:
        message = f"{_OP}: backward must bring the gradient grad_scale={grad_scale}, got another; pass that one"
        torch._assert_async((dloss == grad_scale).all(), message)
    elif dloss.item() != dloss.new_tensor(grad_scale).item():
        raise ValueError(
            f"{_OP}: backward must bring the gradient grad_scale={grad_scale}, got {dloss.item()}; pass that one"
        )
    dx, dweight = made
    made.clear()
    return dx, dweight


def _forward(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    slot: Tensor | None,
    grad_scale: float | None,
    partial_dx: bool,
    *options,
) -> Tensor:
    return _forward_saved(x, weight, target, *options)[0]


def _forward_saved(x: Tensor, weight: Tensor, target: Tensor, *options) -> tuple[Tensor, Tensor]:
    """(loss, what backward needs of each row [3, T])."""
    loss = vocab.Loss(*options)
    each, statistics = vocab_slices.losses(x, weight, target.reshape(-1), loss)
    return vocab.reduced(each, target, loss), statistics


def _forward_with_gradients(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    grad_scale: float,
    need_x: bool,
    need_weight: bool,
    wide: bool,
    partial_dx: bool,
    *options,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = vocab.Loss(*options)
    each, *made = vocab_slices.losses_and_gradients(
        x, weight, target.reshape(-1), grad_scale, need_x, need_weight, wide, partial_dx, loss
    )
    return vocab.reduced(each, target, loss), *(x.new_empty(0) if t is None else t for t in made)


def _gradients(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    statistics: Tensor,
    need_x: bool,
    need_weight: bool,
    partial_dx: bool,
    *options,
) -> tuple[Tensor, Tensor]:
    dweight = weight.new_empty(weight.shape) if need_weight else None
    loss, ids = vocab.Loss(*options), target.reshape(-1)
    how = {"add": False, "partial_dx": partial_dx, "loss": loss}
    dx = vocab_slices.gradients(dloss, x, weight, ids, statistics, need_x, dweight, **how)
    return tuple(x.new_empty(0) if t is None else t for t in (dx, dweight))


def _gradients_of_parameter(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    statistics: Tensor,
    slot: Tensor,
    need_x: bool,
    partial_dx: bool,
    *options,
) -> Tensor:
    """dx; the weight's gradient is added to the main_grad of slot's parameter."""
    total, add = _sum_of(slot)
    loss, ids = vocab.Loss(*options), target.reshape(-1)
    how = {"add": add, "partial_dx": partial_dx, "loss": loss}
    dx = vocab_slices.gradients(dloss, x, weight, ids, statistics, need_x, total, **how)
    if total is not None:
        torch.autograd.graph.increment_version(total)
    return x.new_empty(0) if dx is None else dx


def _add_to_parameter(dweight: Tensor, slot: Tensor) -> None:
    total, add = _sum_of(slot)
    if total is not None:
        total.add_(dweight) if add else total.copy_(dweight)


def _sum_of(slot: Tensor) -> tuple[Tensor | None, bool]:
    """(main_grad of slot's parameter, whether to add to it); None where this backward does not accumulate."""
    parameter = main_grad._owner(slot)
    if parameter is None or parameter.main_grad.shape != parameter.shape:
        raise RuntimeError(
            f"{_OP}: expected a weight that attach_main_grad saw in this process and this shape; attach again"
        )
    if not main_grad._accumulates(parameter):
        return None, False
    return parameter.main_grad, main_grad._begin(slot, parameter.main_grad)


def _fake(x, weight, target, slot, grad_scale, partial_dx, *options):
    return _fake_saved(x, weight, target, *options)[0]


def _fake_saved(x, weight, target, *options):
    wide = torch.promote_types(x.dtype, torch.float32)
    loss = x.new_empty(target.shape if options[-1] == "none" else (), dtype=wide)
    return loss, x.new_empty(3, target.numel(), dtype=wide)


def _fake_with_gradients(x, weight, target, grad_scale, need_x, need_weight, wide, partial_dx, *options):
    loss = _fake_saved(x, weight, target, *options)[0]
    dtype = loss.dtype if wide and need_weight else None
    return loss, x.new_empty(x.shape if need_x else 0), x.new_empty(weight.shape if need_weight else 0, dtype=dtype)


def _fake_gradients(dloss, x, weight, target, statistics, need_x, need_weight, partial_dx, *options):
    return x.new_empty(x.shape if need_x else 0), weight.new_empty(weight.shape if need_weight else 0)


def _fake_gradients_of_parameter(dloss, x, weight, target, statistics, slot, need_x, partial_dx, *options):
    return x.new_empty(x.shape if need_x else 0)


_SHARDING = "its vocabulary is cut by `group`"
_SAVED = "Tensor dloss, Tensor x, Tensor weight, Tensor target, Tensor statistics"
_linear_cross_entropy = register(
    f"{_OP}(Tensor x, Tensor weight, Tensor target, Tensor? slot, float? grad_scale, bool partial_dx, {vocab.SCHEMA}) "
    "-> Tensor",
    _forward,
    _fake,
    function=_LinearCrossEntropy,
    autocast=lowest,
    sharding=_SHARDING,
)
_saved = register(
    f"{_OP}_saved(Tensor x, Tensor weight, Tensor target, {vocab.SCHEMA}) -> (Tensor, Tensor)",
    _forward_saved,
    _fake_saved,
    sharding=_SHARDING,
)
_with_gradients = register(
    f"{_OP}_with_gradients(Tensor x, Tensor weight, Tensor target, float grad_scale, bool need_x, bool need_weight, "
    f"bool wide, bool partial_dx, {vocab.SCHEMA}) -> (Tensor, Tensor, Tensor)",
    _forward_with_gradients,
    _fake_with_gradients,
    sharding=_SHARDING,
)
_backward = register(
    f"{_OP}_backward({_SAVED}, bool need_x, bool need_weight, bool partial_dx, {vocab.SCHEMA}) -> (Tensor, Tensor)",
    _gradients,
    _fake_gradients,
    sharding=_SHARDING,
)
_backward_of_parameter = register(
    f"{_OP}_backward_of_parameter({_SAVED}, Tensor slot, bool need_x, bool partial_dx, {vocab.SCHEMA}) -> Tensor",
    _gradients_of_parameter,
    _fake_gradients_of_parameter,
    sharding=_SHARDING,
)
_add_to_main_grad = register(
    "add_to_main_grad(Tensor dweight, Tensor slot) -> ()",
    _add_to_parameter,
    lambda dweight, slot: None,
    sharding=_SHARDING,
)
# Eliminated otherwise, where nobody asks for dx: see main_grad.py.
_register_effectful_op(_backward_of_parameter, _EffectType.ORDERED)
_register_effectful_op(_add_to_main_grad, _EffectType.ORDERED)
