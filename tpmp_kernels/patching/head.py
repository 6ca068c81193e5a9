"""A language model whose forward takes `labels`: its loss by ops.linear_cross_entropy, and no logits.

The stock forward runs, on a stand-in for the model that differs in two names: `lm_head` keeps the hidden states and
returns None, and `loss_function`, given that None, computes the loss from them. So slicing, auxiliary losses and the
form of the output stay the model's own; one that scales or caps its logits fails on None, when it is tried at first.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpmp_kernels import ops
from tpmp_kernels.patching.proof import Swap, difference, draw, is_linear, told, untouched

EXPECTS = "models with lm_head and loss_function whose forward takes labels"


def find(module: nn.Module, model: nn.Module) -> Swap | str | None:
    """The swap for this module, or why there is none, or None where it is no language model of this kind."""
    stock = type(module).forward
    if "lm_head" not in module._modules or "labels" not in inspect.signature(stock).parameters:
        return None
    if not is_linear(module.lm_head):
        return f"its lm_head, {module.lm_head}, is no torch.nn.Linear without bias"
    place = [*inspect.signature(stock).parameters].index("labels") - 1
    ours = Swap("linear_cross_entropy", _forward(stock, place))
    return _other_path(module, stock) or _other_loss(module) or ours


class _Standin:
    """The model, but for some of its attributes."""

    def __init__(self, model: nn.Module, instead: dict[str, Any]):
        self.__dict__.update(instead, _model=model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._model, name, value)


def _forward(stock: Callable, place: int) -> Callable:
    @functools.wraps(stock)
    def forward(self, *args, **kwargs):
        labels = args[place] if len(args) > place else kwargs.get("labels")
        if labels is None or not is_linear(self.lm_head) or not untouched(self.lm_head):
            return stock(self, *args, **kwargs)
        kept = []

        def loss(logits: None, labels: Tensor, vocab_size: int | None = None, **options) -> Tensor:
            return _loss(kept.pop(), self.lm_head.weight, labels, **options)

        return stock(_Standin(self, {"lm_head": kept.append, "loss_function": loss}), *args, **kwargs)

    return forward


def _loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **ignored: Any,
) -> Tensor:
    """Of each token's successor. hidden [..., S, D], weight [V, D], labels or shift_labels [..., S] -> a scalar."""
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    target = shift_labels.reshape(-1).to(hidden.device)
    reduction = "mean" if num_items_in_batch is None else "sum"
    rows = hidden.reshape(-1, hidden.shape[-1])
    loss = ops.linear_cross_entropy(rows, weight, target, ignore_index=ignore_index, reduction=reduction)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


# ---- proof


class _Output:
    """What the layers below the head might have returned: hidden states, and None for everything else."""

    def __init__(self, hidden: Tensor):
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, key: Any) -> Any:
        return self.last_hidden_state if key == 0 else ()


def _other_path(module: nn.Module, stock: Callable) -> str | None:
    """Why the logits are not just the head's, or the loss not just that of them."""
    hidden, ids, heads, losses = draw(2, 3, 4), torch.ones(2, 3, dtype=torch.int64, device="cpu"), [], []

    def loss(logits: Any, labels: Tensor, vocab_size: int | None = None, **options) -> Tensor:
        losses.append((logits, vocab_size))
        return hidden.new_zeros(())

    below = {name: lambda *args, **kwargs: _Output(hidden) for name in module._modules}
    try:
        stock(_Standin(module, {**below, "lm_head": heads.append, "loss_function": loss}), ids, labels=ids)
    except Exception as error:  # whatever a forward that we know nothing of may raise
        return f"its forward does more than lm_head and loss_function: without logits, {told(error)}"
    classes = module.lm_head.out_features
    if len(heads) != 1 or losses != [(None, classes)]:
        return f"its forward does not call lm_head and then loss_function, each once, for {classes} classes"
    return None


def _other_loss(module: nn.Module) -> str | None:
    """Why its loss_function is not the cross entropy of each token's successor."""
    logits, unit = draw(2, 5, 7), torch.eye(7, dtype=torch.float64, device="cpu")
    labels = torch.tensor([[3, 0, -100, 6, 1], [-100, 2, 2, 5, -100]], device="cpu")
    for options in ({}, {"num_items_in_batch": torch.tensor(3, device="cpu")}):
        why = difference(
            lambda z, options=options: module.loss_function(logits=z, labels=labels, vocab_size=7, **options),
            lambda z, options=options: _loss(z, unit, labels, **options),
            logits,
            by="ops.linear_cross_entropy",
        )
        if why is not None:
            return f"loss_function: {why}"
    return None
