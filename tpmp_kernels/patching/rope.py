"""Attention whose forward calls a global `apply_rotary_pos_emb(q, k, cos, sin)`, as Hugging Face's decoders do.

The instance gets a copy of that forward, and of the functions it is wrapped in, for which the global is ours: the rest
of the module's globals are as they were when the model was patched.
"""

import functools
from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from tpmp_kernels import ops
from tpmp_kernels.patching.proof import Swap, difference, draw, told, twin

EXPECTS = "attention modules whose forward calls a global apply_rotary_pos_emb"
_GLOBAL = "apply_rotary_pos_emb"


def find(module: nn.Module, model: nn.Module) -> Swap | str | None:
    """The swap for this module, or why there is none, or None where its forward has no such call."""
    stock = type(module).forward
    theirs = _global_of(stock)
    if theirs is None:
        return None
    q, k, angle = draw(2, 3, 5, 8), draw(2, 1, 5, 8, seed=1), draw(2, 5, 4, seed=2).repeat(1, 1, 2)
    for positions in (angle, angle[:1]):
        both = (_at(function, positions.cos(), positions.sin()) for function in (theirs, _rotary(theirs)))
        why = difference(*both, q, k, by="ops.rope")
        if why is not None:
            return f"{_GLOBAL}: {why}"
    return _halves(model) or Swap("rope", _with_global(stock, _rotary(theirs)))


def _at(function: Callable, cos: Tensor, sin: Tensor) -> Callable:
    return lambda q, k: function(q, k, cos, sin)


def _halves(model: nn.Module) -> str | None:
    """Why the halves of cos and sin, of which ops.rope reads the first, may not be equal in this model."""
    tables = [module for module in model.modules() if "inv_freq" in module._buffers]
    if not tables:
        return "the model has no rotary embedding with an inv_freq, whose cos and sin could be looked at"
    for table in tables:
        x, positions = table.inv_freq.new_zeros(1, 3), torch.arange(3, device=table.inv_freq.device)[None]
        try:
            with torch.no_grad():
                parts = [t.chunk(2, -1) for t in type(table).forward(twin(table), x, positions)]
            equal = all(torch.equal(*halves) for halves in parts)
        except Exception as error:  # whatever a forward that we know nothing of may raise
            return f"{type(table).__name__}, tried on three positions, raised {told(error)}"
        if not equal:
            return f"the halves of {type(table).__name__}'s cos and sin differ"
    return None


def _rotary(stock: Callable) -> Callable:
    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any):
        """q [B, Hq, S, D], k [B, Hk, S, D], cos and sin [B or 1, S, D]; the stock one for anything else."""
        usual = q.dim() == 4 and cos.dim() == 3 and cos.shape[0] in (1, q.shape[0]) and cos.shape == sin.shape
        # ops.rope has no gradient for its table.
        learned = cos.requires_grad or sin.requires_grad
        if not usual or learned or cos.shape[-1] != q.shape[-1] or args or kwargs:
            return stock(q, k, cos, sin, *args, **kwargs)
        half = cos.shape[-1] // 2
        dtype = torch.promote_types(q.dtype, cos.dtype)
        table = torch.cat((cos[..., :half], sin[..., :half]), -1).to(torch.promote_types(dtype, torch.float32))
        places = None
        if cos.shape[0] > 1:
            places = torch.arange(cos.shape[0] * cos.shape[1], device=cos.device).view(cos.shape[:2])
        turned = ops.rope(q.to(dtype).transpose(1, 2), k.to(dtype).transpose(1, 2), table.flatten(0, 1), places)
        return tuple(t.transpose(1, 2) for t in turned)

    return apply_rotary_pos_emb


def _global_of(function: Any) -> Callable | None:
    """What the global is to the function, or to the one that it wraps and closes over."""
    inner = getattr(function, "__wrapped__", None)
    if inner is not None:
        return _global_of(inner) if any(_holds(cell, inner) for cell in function.__closure__ or ()) else None
    if isinstance(function, FunctionType) and _GLOBAL in function.__code__.co_names:
        return function.__globals__.get(_GLOBAL)
    return None


def _with_global(function: Callable, value: Callable) -> Callable:
    """A copy of the function for which the global is another."""
    inner, scope = getattr(function, "__wrapped__", None), function.__globals__
    if inner is None:
        scope = {**scope, _GLOBAL: value}
    cells = [
        CellType(_with_global(inner, value)) if _holds(cell, inner) else cell for cell in function.__closure__ or ()
    ]
    changed = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, tuple(cells))
    changed.__kwdefaults__ = function.__kwdefaults__
    return functools.update_wrapper(changed, function)


def _holds(cell: CellType, inner: Any) -> bool:
    try:
        return inner is not None and cell.cell_contents is inner
    except ValueError:  # an empty cell
        return False
