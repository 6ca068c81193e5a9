"""Argument checks shared by the public ops: each raises one sentence with expected, got and remedy."""

from collections.abc import Iterable

import torch
from torch import Tensor


def activation(op: str, name: str | None, allowed: Iterable[str]) -> None:
    if name not in allowed:
        names = ", ".join(str(each) for each in allowed)
        raise ValueError(f"{op}: unknown activation {name!r}; expected one of {names}")


def weight(op: str, name: str, w: Tensor, x: Tensor) -> None:
    """w must be [N, K] for x [..., K]."""
    if x.dim() == 0 or w.dim() != 2 or w.shape[1] != x.shape[-1]:
        columns = x.shape[-1] if x.dim() else "K"
        raise ValueError(
            f"{op}: {name} has shape {list(w.shape)} but x has shape {list(x.shape)}; "
            f"pass a {name} of shape [N, {columns}]"
        )


def shape(op: str, name: str, tensor: Tensor, expected: Iterable[int]) -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{op}: {name} must have shape {list(expected)}, got {list(tensor.shape)}")


def together(op: str, x: Tensor, **others: Tensor | None) -> None:
    """Every tensor on x's device and, unless autocast will cast them, of x's floating dtype."""
    if not x.is_floating_point():
        raise TypeError(f"{op}: x must have a floating dtype, got {x.dtype}; cast it first")
    casting = torch.is_autocast_enabled(x.device.type)
    for name, tensor in others.items():
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device} but x is on {x.device}; move one of them")
        if tensor.dtype != x.dtype and not casting:
            raise TypeError(f"{op}: {name} has dtype {tensor.dtype} but x has {x.dtype}; cast one of them")
