"""What a call of an op will run, product by product, and why.

print(ops.explain(ops.linear, x, weight, activation="gelu"))
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tpmp_kernels.kernels import dispatch, tiles
from tpmp_kernels.kernels.layout import aligned
from tpmp_kernels.ops import backend, onednn
from tpmp_kernels.ops.gated_linear import gated_linear
from tpmp_kernels.ops.linear import linear
from tpmp_kernels.ops.mlp import gated_mlp, mlp
from tpmp_kernels.ops.plain import widens

_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Explanation:
    """One entry for each product: the pass it belongs to, and a `dispatch.Choice` or, off the GPU, a sentence."""

    head: str
    products: tuple[tuple[str, dispatch.Choice | str], ...]

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.products)
        return "\n".join([self.head, *(f"  {name:<{width}}  {choice}" for name, choice in self.products)])


@dataclass(frozen=True)
class _Product:
    """X [m, k] @ W^T: an operation of the kernels with its epilogue, or None for a plain product of torch."""

    name: str
    operation: str | None
    m: int
    n: int
    k: int
    epilogue: tiles.Epilogue
    aligned: bool


def explain(
    op: Callable | str, *args: Any, training: bool = True, arch: str | None = None, sms: int = 132, **options: Any
) -> Explanation:
    """How `op(*args, **options)` will run: linear, gated_linear, mlp or gated_mlp, by name or as the function itself.

    `training`: with the pre-activations kept and the products of backward. `arch` ("sm90", "gfx942") and `sms` explain
    a chip that is not here; operands may then be on any device, also "meta". Raises ValueError for another op.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", str(op))
    if name not in _FORMS:
        raise ValueError(f"explain: expected one of {', '.join(_FORMS)}, got {name!r}; only these choose how they run")
    function, products_of = _FORMS[name]
    bound = inspect.signature(function).bind(*args, **options)
    bound.apply_defaults()
    call = bound.arguments
    x = call["x"]
    products = products_of(call, math.prod(x.shape[:-1]), training)
    if x.dtype not in _DTYPES or (arch is None and backend.choose(x) != "triton"):
        return _in_torch(name, x, call, products)
    arch, sms, version = _chip(x) if arch is None else (arch, sms, _triton_version())
    chosen = tuple((each.name, _chosen(each, x.dtype, arch, sms, version)) for each in products)
    return Explanation(f"{name} in {_DTYPES[x.dtype]} on {arch} ({sms} multiprocessors), Triton {version}", chosen)


def _chip(x: Tensor) -> tuple[str, int, str]:
    from tpmp_kernels.kernels import gemm

    return *gemm.chip(x.device), _triton_version()


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "3.9.0"
    return triton.__version__


def _chosen(each: _Product, dtype: torch.dtype, arch: str, sms: int, version: str) -> dispatch.Choice | str:
    if each.operation is None:
        return f"{each.m}x{each.n}x{each.k}: torch's GEMM; a plain product, nothing behind it"
    return dispatch.choose(
        each.operation, each.m, each.n, each.k, _DTYPES[dtype], arch=arch, sms=sms, epilogue=each.epilogue,
        triton_version=version, aligned=each.aligned,
    )  # fmt: skip


def _in_torch(name: str, x: Tensor, call: dict, products: list[_Product]) -> Explanation:
    chosen = backend.choose(x)
    lines = []
    for each in products:
        activation = each.epilogue.activation
        weight = call.get("weight", call.get("w_up"))
        if chosen == "reference":
            how = "unfused torch, as asked for"
        elif widens(x.reshape(-1, x.shape[-1]), weight.t()):
            how = "operands widened to fp32 for the product, since this CPU multiplies bf16 slower; the rest in place"
        elif each.operation is not None and activation is not None and onednn.serves(x, weight, activation):
            how = f"oneDNN's linear with {activation} in its epilogue"
        else:
            how = "torch's GEMM" + (", the rest in place behind it" if each.epilogue != tiles.Epilogue() else "")
        lines.append((each.name, f"{each.m}x{each.n}x{each.k}: {how}"))
    return Explanation(f"{name} in {str(x.dtype).removeprefix('torch.')} on {x.device.type}", tuple(lines))


def _dgrad(name: str, m: int, weight: Tensor) -> _Product:
    return _Product(name, None, m, weight.shape[1], weight.shape[0], tiles.Epilogue(), True)


def _wgrad(name: str, m: int, weight: Tensor, x_aligned: bool) -> _Product:
    """An op of its own where it adds to a main_grad, else a plain product."""
    operation = "wgrad" if getattr(weight, "main_grad", None) is not None else None
    return _Product(name, operation, *weight.shape, m, tiles.Epilogue(residual=True), x_aligned)


def _linear(call: dict, m: int, training: bool) -> list[_Product]:
    x, weight, activation = call["x"], call["weight"], call["activation"]
    keeps = training and activation is not None and call["save_preact"]
    wide = call["out_dtype"] not in (None, x.dtype)
    epilogue = tiles.Epilogue(activation, call["bias"] is not None, call["residual"] is not None, keeps, wide)
    both = _aligned(x, weight)
    forward = _Product("forward", "linear", m, *weight.shape, epilogue, both)
    return [forward, _dgrad("dgrad", m, weight), _wgrad("wgrad", m, weight, both)] if training else [forward]


def _gated_linear(call: dict, m: int, training: bool) -> list[_Product]:
    x, gate, up = call["x"], call["w_gate"], call["w_up"]
    epilogue = tiles.Epilogue(call["activation"], preact=training and call["save_preact"])
    all_three = _aligned(x, gate, up)
    forward = _Product("forward", "gated_linear", m, *gate.shape, epilogue, all_three)
    if not training:
        return [forward]
    return [forward, *_backward("gate", m, gate, all_three), *_backward("up", m, up, all_three)]


def _backward(name: str, m: int, weight: Tensor, x_aligned: bool) -> list[_Product]:
    return [_dgrad(f"{name} dgrad", m, weight), _wgrad(f"{name} wgrad", m, weight, x_aligned)]


def _mlp(call: dict, m: int, training: bool) -> list[_Product]:
    up, down = call["w_up"], call["w_down"]
    upward = {**call, "weight": up, "bias": call["b_up"], "residual": None, "out_dtype": None}
    first = _linear(upward, m, training)[0]
    dz = tiles.Epilogue(call["activation"], bias=call["b_up"] is not None, preact=True)
    return _pair(first, {"up": up}, down, call["b_down"] is not None, dz, m, training)


def _gated_mlp(call: dict, m: int, training: bool) -> list[_Product]:
    first = _gated_linear(call, m, training)[0]
    dz = tiles.Epilogue(call["activation"], residual=True, preact=True)
    return _pair(first, {"gate": call["w_gate"], "up": call["w_up"]}, call["w_down"], False, dz, m, training)


def _pair(
    first: _Product, ups: dict[str, Tensor], down: Tensor, bias: bool, dz: tiles.Epilogue, m: int, training: bool
) -> list[_Product]:
    n, f = down.shape
    fits = _aligned(down)
    products = [replace(first, name="up"), _Product("down", "linear", m, n, f, tiles.Epilogue(bias=bias), fits)]
    if training:
        products.append(_Product("down dgrad", "mlp_dz", m, f, n, dz, fits))
        products.append(_wgrad("down wgrad", m, down, fits))
        products += [each for name, up in ups.items() for each in _backward(name, m, up, fits)]
    return products


def _aligned(*operands: Tensor) -> bool:
    return all(aligned(each.reshape(-1, each.shape[-1]) if each.dim() != 2 else each) for each in operands)


_FORMS = {
    "linear": (linear, _linear),
    "gated_linear": (gated_linear, _gated_linear),
    "mlp": (mlp, _mlp),
    "gated_mlp": (gated_mlp, _gated_mlp),
}
