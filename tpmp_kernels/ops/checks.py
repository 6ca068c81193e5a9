"""Argument checks shared by the public ops: each raises one sentence with expected, got and remedy."""

from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import Parameter

from tpmp_kernels.ops import sharding

_PLAIN = frozenset((Tensor, Parameter))
_FLOATING = frozenset((torch.float64, torch.float32, torch.float16, torch.bfloat16))


def activation(op: str, name: str | None, allowed: Iterable[str]) -> None:
    if not (name is None or isinstance(name, str)) or name not in allowed:
        names = ", ".join(str(each) for each in allowed)
        raise ValueError(f"{op}: unknown activation {name!r}; expected one of {names}")


def tensors(op: str, **given: Tensor) -> None:
    """Each a dense tensor, of any dtype. The other checks here see to that themselves."""
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            _refuse_other_type(op, name, tensor)
        if tensor.layout is not torch.strided:
            _refuse_layout(op, name, tensor)


def weight(op: str, name: str, w: Tensor, x: Tensor) -> None:
    """w must be [N, K] for x [..., K]."""
    try:
        fits = x.dim() > 0 and w.dim() == 2 and w.shape[1] == x.shape[-1]
    except AttributeError:
        fits = False
        tensors(op, **{"x": x, name: w})
    if not fits:
        columns = x.shape[-1] if x.dim() else "K"
        raise ValueError(
            f"{op}: {name} has shape {list(w.shape)} but x has shape {list(x.shape)}; "
            f"pass a {name} of shape [N, {columns}]"
        )


def shape(op: str, name: str, tensor: Tensor, expected: Iterable[int]) -> None:
    if not isinstance(tensor, Tensor):
        _refuse_other_type(op, name, tensor)
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{op}: {name} must have shape {list(expected)}, got {list(tensor.shape)}; reshape it")


def together(op: str, x: Tensor, /, *, first: str = "x", **others: Tensor | None) -> None:
    """Dense tensors on x's device and, unless autocast will cast them, of x's floating dtype; DTensors all or none.

    `first` is what the op calls x. None stands for an argument that was not given.
    """
    device, dtype = x.device, x.dtype
    if dtype not in _FLOATING or x.layout is not torch.strided:
        _refuse_kind(op, first, x)
    subclassed = type(x) not in _PLAIN
    for name, tensor in others.items():
        if type(tensor) not in _PLAIN:
            if tensor is None:
                continue
            if not isinstance(tensor, Tensor):
                _refuse_other_type(op, name, tensor)
            subclassed = True
        if tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device} but {first} is on {device}; move one of them")
        if tensor.dtype is not dtype and not _autocast_mixes(x, tensor):
            raise TypeError(f"{op}: {name} has dtype {tensor.dtype} but {first} has {dtype}; cast one of them")
        if tensor.layout is not torch.strided:
            _refuse_layout(op, name, tensor)
    if subclassed:
        sharding.meet(op, {first: x, **others})


def _autocast_mixes(*given: Tensor) -> bool:
    """Whether autocast is on and casts both; it leaves fp64 alone."""
    device = given[0].device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return on and all(t.dtype in _FLOATING and t.dtype is not torch.float64 for t in given)


def _refuse_other_type(op: str, name: str, value: Any) -> NoReturn:
    raise TypeError(f"{op}: {name} must be a Tensor, got {type(value).__name__}; convert it with torch.as_tensor")


def _refuse_kind(op: str, name: str, tensor: Tensor) -> NoReturn:
    if tensor.layout is not torch.strided:
        _refuse_layout(op, name, tensor)
    raise TypeError(f"{op}: {name} must be fp64, fp32, fp16 or bf16, got {tensor.dtype}; cast it first")


def _refuse_layout(op: str, name: str, tensor: Tensor) -> NoReturn:
    raise TypeError(f"{op}: {name} must be dense, got layout {tensor.layout}; pass {name}.to_dense()")


def norm(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    """x and residual [..., H], weight and bias [H]."""
    tensors(op, x=x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have at least one dimension, got a scalar; pass x of shape [..., H]")
    shape(op, "weight", weight, x.shape[-1:])
    if bias is not None:
        shape(op, "bias", bias, x.shape[-1:])
    if residual is not None:
        shape(op, "residual", residual, x.shape)
    together(op, x, weight=weight, bias=bias, residual=residual)
