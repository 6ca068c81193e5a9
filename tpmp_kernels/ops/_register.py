"""How an op enters torch: one schema, one implementation, one fake kernel, one autograd.Function, one autocast rule.

    _op = register("name(Tensor x, ...) -> Tensor", implementation, fake, function=_Function, autocast=lowest)

The autograd.Function sits at dispatch key Autograd and its forward calls ops again below autograd. Two reasons: a
call crosses the dispatcher's Python boundary as few times as possible (torch.library.custom_op costs about twice as
much), and `opcheck` with gradients holds only when the registered op itself is differentiable. The public wrapper
around `_op` checks its arguments and does nothing else.

Implementations and fake kernels return freshly allocated contiguous tensors, and never write into an argument.
"""

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from tpmp_kernels.ops import _gradients as gradients
from tpmp_kernels.ops import sharding as rules
from tpmp_kernels.ops._gradients import below_autograd

__all__ = ["below_autograd", "lowest", "register", "widest"]

NAMESPACE = "tpmp_kernels"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_DEVICES = ("CPU", "CUDA")
_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)

# The rule of each op that has one.
AUTOCAST: dict[Any, Callable[[str, list[Tensor]], torch.dtype]] = {}


def register(
    schema: str,
    implementation: Callable,
    fake: Callable,
    *,
    function: type[torch.autograd.Function] | None = None,
    autocast: Callable[[str, list[Tensor]], torch.dtype] | None = None,
    autocast_keeps: tuple[int, ...] = (),
    sharding: rules.Rule | str | None = None,
) -> Any:
    """Define an op and return it, callable with positional arguments. Schemas have no defaults.

    `implementation` serves CPU and CUDA and chooses its backend itself. `autocast(device_type, tensors)` names the
    dtype to which floating inputs are cast while autocast is on: `lowest` or `widest`; those at the positions
    `autocast_keeps` keep theirs. `sharding` says how DTensor may cut the op (see sharding.cut), or as a string why it
    takes none. Without `function` the op is an inner one, called below autograd alone.
    """
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    for device in _DEVICES:
        _LIBRARY.impl(name, implementation, device)
    _LIBRARY.impl(name, gradients.batched(name), "FuncTorchBatched")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    autograd = gradients.differentiable(name, op, function) if function else gradients.undifferentiable(name, op)
    _LIBRARY.impl(name, autograd, "Autograd")
    if autocast is not None:
        AUTOCAST[op] = autocast
        for device in _DEVICES:
            _LIBRARY.impl(name, _cast(op, device.lower(), autocast, autocast_keeps), f"Autocast{device}")
    if sharding is not None:
        rules.add(op, sharding)
    return op


def lowest(device_type: str, tensors: list[Tensor]) -> torch.dtype:
    """Autocast's own dtype, as for F.linear: the rule of a GEMM."""
    return torch.get_autocast_dtype(device_type)


def widest(device_type: str, tensors: list[Tensor]) -> torch.dtype:
    """The widest dtype among the inputs: the rule of a norm, which must not narrow an fp32 residual stream."""
    return reduce(torch.promote_types, [t.dtype for t in tensors])


def _cast(
    op: Any, device_type: str, rule: Callable[[str, list[Tensor]], torch.dtype], keeps: tuple[int, ...]
) -> Callable:
    def eligible(position: int, arg: Any) -> bool:
        return (
            position not in keeps and isinstance(arg, Tensor) and arg.is_floating_point() and arg.dtype != torch.float64
        )

    def autocast(*args):
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
            tensors = [arg for i, arg in enumerate(args) if eligible(i, arg)]
            dtype = rule(device_type, tensors) if tensors else None
            return op(*(arg.to(dtype) if eligible(i, arg) else arg for i, arg in enumerate(args)))

    return autocast
