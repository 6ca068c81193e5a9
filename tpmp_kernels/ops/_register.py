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

NAMESPACE = "tpmp_kernels"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_DEVICES = ("CPU", "CUDA")
_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)

# The context in which a Function's forward calls ops: they go to the device's implementation (or, in a trace, into
# the graph) and record no gradient of their own.
below_autograd = torch._C._AutoDispatchBelowAutograd


def register(
    schema: str,
    implementation: Callable,
    fake: Callable,
    *,
    function: type[torch.autograd.Function] | None = None,
    autocast: Callable[[str, list[Tensor]], torch.dtype] | None = None,
) -> Any:
    """Define an op and return it, callable with positional arguments. Schemas have no defaults.

    `implementation` serves CPU and CUDA and chooses its backend itself. `autocast(device_type, tensors)` names the
    dtype to which floating inputs are cast while autocast is on: `lowest` or `widest`. Without `function` the op is
    an inner one, called below autograd alone.
    """
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    for device in _DEVICES:
        _LIBRARY.impl(name, implementation, device)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    if function is not None:
        _LIBRARY.impl(name, _differentiable(op, function), "Autograd")
    if autocast is not None:
        for device in _DEVICES:
            _LIBRARY.impl(name, _cast(op, device.lower(), autocast), f"Autocast{device}")
    return op


def lowest(device_type: str, tensors: list[Tensor]) -> torch.dtype:
    """Autocast's own dtype, as for F.linear: the rule of a GEMM."""
    return torch.get_autocast_dtype(device_type)


def widest(device_type: str, tensors: list[Tensor]) -> torch.dtype:
    """The widest dtype among the inputs: the rule of a norm, which must not narrow an fp32 residual stream."""
    return reduce(torch.promote_types, [t.dtype for t in tensors])


def _differentiable(op: Any, function: type[torch.autograd.Function]) -> Callable:
    def autograd(*args):
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            return function.apply(*args)
        with below_autograd():
            return op(*args)

    return autograd


def _cast(op: Any, device_type: str, rule: Callable[[str, list[Tensor]], torch.dtype]) -> Callable:
    def eligible(arg: Any) -> bool:
        return isinstance(arg, Tensor) and arg.is_floating_point() and arg.dtype != torch.float64

    def autocast(*args):
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
            tensors = [arg for arg in args if eligible(arg)]
            dtype = rule(device_type, tensors) if tensors else None
            return op(*(arg.to(dtype) if eligible(arg) else arg for arg in args))

    return autocast
