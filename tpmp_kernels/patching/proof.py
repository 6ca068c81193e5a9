"""Is a forward of ours that of the module? Both are run on a twin of it in the small, and their gradients compared.

Sixteen features prove what a thousand would: a forward that knows no sizes but those of its parameters is the same
function of them at any size. fp64, since ours then has no rounding to speak of; the bound leaves room for a module that
goes through fp32 on the way, as Hugging Face's norms and losses do.
"""

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# A hundred times the rounding of fp32, a fiftieth of what tells gelu from its tanh form.
_TOLERANCE = 1e-5
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class Swap(NamedTuple):
    """A forward to bind to an instance, and the op that computes it."""

    by: str
    forward: Callable


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Normal fp64 numbers on the CPU, the same each time; the generators of the process stay where they are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def twin(
    module: nn.Module,
    parameters: Mapping[str, Tensor | None] | None = None,
    modules: Mapping | None = None,
    **attributes,
) -> nn.Module:
    """A shallow copy, and of its children, in eval mode and without hooks; but these parts of it are others."""
    other = copy.copy(module)
    own = {name: {} for name in _HOOKS} | {"training": False, "_buffers": dict(module._buffers)}
    own["_parameters"] = {**module._parameters, **(parameters or {})}
    children = {name: child if child is None else twin(child) for name, child in module._modules.items()}
    own["_modules"] = children | {**(modules or {})}
    vars(other).update(own, **attributes)
    return other


def untouched(*layers: Any) -> bool:
    """Whether calling them runs their classes' forward and nothing else: it may then be left out."""
    return not any(
        layer._forward_pre_hooks
        or layer._forward_hooks
        or layer._backward_pre_hooks
        or layer._backward_hooks
        or "forward" in layer.__dict__
        for layer in layers
        if isinstance(layer, nn.Module)
    )


def is_linear(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and layer.bias is None


def difference(stock: Callable, ours: Callable, *inputs: Tensor, by: str) -> str | None:
    """Why `ours`, which is `by`, may not stand for `stock`, both functions of `inputs`; None where it may."""
    try:
        theirs, own = (_values_and_gradients(function, inputs) for function in (stock, ours))
    except Exception as error:  # whatever a forward that we know nothing of may raise
        return f"its forward, tried on a small input, raised {told(error)}"
    close = (
        a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=_TOLERANCE, atol=_TOLERANCE)
        for a, b in zip(theirs, own, strict=True)
    )
    return None if all(close) else f"its forward has other values or gradients than {by}"


def told(error: Exception) -> str:
    """In one line, for a table."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _values_and_gradients(function: Callable, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [x.clone().requires_grad_() for x in inputs]
        outputs = function(*leaves)
        outputs = [outputs] if isinstance(outputs, Tensor) else [*outputs]
        # Weights that no two elements share: a plain sum would not see elements that change places.
        upstream = [draw(*y.shape, seed=1 + i).to(y.dtype) for i, y in enumerate(outputs)]
        return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, upstream)]


def one_argument(stock: Callable, fused: Callable, usable: Callable) -> Callable:
    """A forward with the signature of `stock`: fused(self, x) where usable(self, x), else the stock one."""

    @functools.wraps(stock)
    def forward(self, *args, **kwargs):
        if len(args) + len(kwargs) == 1:
            (x,) = (*args, *kwargs.values())
            if usable(self, x):
                return fused(self, x)
        return stock(self, *args, **kwargs)

    return forward
