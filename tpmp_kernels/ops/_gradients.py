"""An op at dispatch key Autograd: reverse mode, once; everything else is refused by name instead of being wrong.

forward mode        an op without tangents for its results would silently make constants of them
second derivatives  the same; torch's once_differentiable sees them only where the upstream gradient requires grad,
                    and of a gradient penalty on y.sum() it makes a constant
torch.func.vmap     torch would run the op once for each element of the batch
torch.func.grad     runs; nested, it is right where a backward is made of torch's own ops, else refused
"""

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import Function, forward_ad

_KEY, _KEYS = torch._C.DispatchKey, torch._C.DispatchKeySet
_BELOW = _KEYS(_KEY.AutogradFunctionality) | _KEYS(_KEY.AutogradOther) | _KEYS(_KEY.ADInplaceOrView)


def below_autograd() -> Any:
    """The context in which a Function's forward calls ops.

    They go to the device's implementation (or, in a trace, into the graph) and record no gradient of their own, nor
    that a result is a view of what the implementation made: autograd refuses to change a Function's view in place.
    """
    return torch._C._ExcludeDispatchKeyGuard(_BELOW)


# For what may write into an argument: that still counts as a change of it.
_unrecorded = torch._C._AutoDispatchBelowAutograd
_INSTEAD = 'use ops.use_backend("reference")'


def differentiable(name: str, op: Any, function: type[Function]) -> Callable:
    """The kernel of an op whose gradient is `function`."""
    function.backward = staticmethod(_once(name, inspect.unwrap(function.backward)))

    def autograd(*args):
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, args)
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            return _apply(function, *args)
        with below_autograd():
            return op(*args)

    return autograd


def undifferentiable(name: str, op: Any) -> Callable:
    """The kernel of an op that has no gradient: without one, torch would make its results constants and warn."""

    def autograd(*args):
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, args)
        with _unrecorded():
            results = op(*args)
        return _without_gradient(name, results, args) if torch.is_grad_enabled() else results

    return autograd


def batched(name: str) -> Callable:
    """The kernel of an op for torch.func.vmap."""

    def refuse(*args):
        raise NotImplementedError(
            f"{name}: expected no torch.func.vmap around it, since it has no batching rule; pass the batch as a "
            f"leading dimension of x, or {_INSTEAD}"
        )

    return refuse


def _refuse_tangents(name: str, args: tuple) -> None:
    if any(isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None for arg in args):
        raise NotImplementedError(
            f"{name}: expected no forward-mode tangents, since its gradient is reverse-mode alone; use torch.func.vjp, "
            f"or {_INSTEAD}"
        )


def _once(name: str, backward: Callable) -> Callable:
    def once(ctx, *upstream):
        ctx = _Kept(ctx)
        if not torch.is_grad_enabled():
            with _unrecorded():
                return backward(ctx, *upstream)
        return _without_gradient(name, backward(ctx, *upstream), (*ctx.saved_tensors, *upstream), always=True)

    return once


class _Kept:
    """A Function's ctx whose saved tensors are unpacked already.

    Activation checkpointing unpacks them once, and by running the forward again, which must not be below autograd.
    """

    def __init__(self, ctx: Any):
        self._ctx = ctx
        self.saved_tensors = ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def _without_gradient(name: str, results: Any, sources: tuple, *, always: bool = False) -> Any:
    """`results` as functions of the `sources` that require grad, with a gradient that is a refusal.

    `always`: even if none does, since a Function need not have saved the input on which its gradient depends.
    """
    roots = [t for t in sources if isinstance(t, Tensor) and t.requires_grad]
    if always and not torch._C._are_functorch_transforms_active():
        roots.append(torch.empty(0, requires_grad=True))
    if not roots:
        return results
    several = isinstance(results, tuple)
    refusing = _apply(_Refusal, name, len(results) if several else 1, *(results if several else (results,)), *roots)
    return refusing if several else refusing[0]


class _Refusal(Function):
    @staticmethod
    def forward(ctx, name, count, *tensors):
        ctx.name = name
        # torch.func records nothing below a detached tensor.
        fresh = Tensor.clone if torch._C._are_functorch_transforms_active() else Tensor.detach
        return tuple(None if t is None else fresh(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            f"{ctx.name}: expected to be differentiated once, since its backward has no gradient; {_INSTEAD}"
        )


def _apply(function: type[Function], *args) -> Any:
    if not torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    # torch.func.grad has already brought the call to one of its levels, where a Function may be an ordinary one.
    with enable_single_level_autograd_function():
        return super(Function, _at_one_level(function)).apply(*args)


@lru_cache
def _at_one_level(function: type[Function]) -> type[Function]:
    """`function` for one level of torch.func: the levels below go on recording inside its forward."""

    def forward(ctx, *args):
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return function.forward(ctx, *args)

    return type(function.__name__, (function,), {"forward": staticmethod(forward)})
