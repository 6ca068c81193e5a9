"""The norm of all gradients of a model, and clipping by it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def grad_norm(
    grads: Sequence[Tensor | None],
    *,
    group: Any = None,
    sharded: Sequence[int | None] | None = None,
    leaves: int | None = None,
) -> Tensor:
    """sqrt of the sum of all squares, fp64: shards are added over `group`, the others counted once; None is zero.

    `leaves`, which is about the order of the sum, changes nothing here.
    """
    given = [
        (g.double().square().sum(), dim)
        for g, dim in zip(grads, sharded or [None] * len(grads), strict=True)
        if g is not None
    ]
    zero = given[0][0].new_zeros(()) if given else torch.zeros((), dtype=torch.float64)
    whole = sum((square for square, dim in given if dim is None), zero)
    cut = sum((square for square, dim in given if dim is not None), zero).reshape(1)
    if group is not None:
        cut = group.all_gather(cut.new_empty(group.size), cut, tag="grad_norm")
    return (whole + cut.sum()).sqrt()


def clip_grads_(
    grads: Sequence[Tensor | None], norm: Tensor, max_norm: float, *, error_if_nonfinite: bool = False
) -> None:
    """Scale the gradients in place by min(1, max_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_ does."""
    if error_if_nonfinite and not norm.isfinite():
        raise ValueError(f"clip_grads_: the norm is {norm.item()}; look for the layer that made it")
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for grad in grads:
        if grad is not None:
            grad.mul_(scale.to(grad.device))
