"""Feed-forward layers, of Llama (gate_proj, up_proj, down_proj, act_fn) and of GPT-2 (c_fc, act, c_proj, dropout)."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tpmp_kernels import ops, reference
from tpmp_kernels.patching.proof import Swap, difference, draw, is_linear, one_argument, twin, untouched

EXPECTS = "modules with gate_proj, up_proj, down_proj and act_fn, or with c_fc, act, c_proj and dropout"
_K, _F, _N = 5, 7, 6


class _Kind(NamedTuple):
    by: str
    fused: Callable[[nn.Module, Tensor, str], Tensor]
    act: str
    activations: Iterable[str]
    fits: Callable[[nn.Module], bool]
    layers: dict[str, dict[str, tuple[int, ...]]]  # the shapes of their parameters in the proof


def find(module: nn.Module, model: nn.Module) -> Swap | str | None:
    """The swap for this module, or why there is none, or None where it is no feed-forward layer of these kinds."""
    kind = next((kind for kind in _KINDS if module._modules.keys() >= kind.layers.keys()), None)
    if kind is None:
        return None
    for name in kind.layers:
        if not kind.fits(module._modules[name]):
            return f"its {name}, {module._modules[name]}, is no layer that ops.{kind.by} takes"
    activation = _activation(getattr(module, kind.act, None), kind.activations)
    if activation is None:
        return f"its {kind.act} is none of {', '.join(kind.activations)}"
    layer = type(module._modules[next(iter(kind.layers))])
    stock = type(module).forward
    ours = _forward(stock, kind, layer, activation)
    shapes = [shape for parameters in kind.layers.values() for shape in parameters.values()]
    why = difference(
        lambda x, *values: stock(_small(module, kind, values), x),
        lambda x, *values: ours(_small(module, kind, values), x),
        *(draw(*shape, seed=i) for i, shape in enumerate([(2, 3, _K), *shapes])),
        by=f"ops.{kind.by}",
    )
    return why or Swap(kind.by, ours)


def _activation(act: Any, known: Iterable[str]) -> str | None:
    """The name of an activation, which is what it computes."""
    z = torch.cat([torch.linspace(end, -end, 50, dtype=torch.float64, device="cpu") for end in (-8, 200)])
    act = twin(act) if isinstance(act, nn.Module) else act
    return next((name for name in known if difference(act, reference.ACTIVATIONS[name], z, by=name) is None), None)


def _small(module: nn.Module, kind: _Kind, values: Iterable[Tensor]) -> nn.Module:
    """Its twin with these parameters, and instead of dropout something that is seen where it stands."""
    values = iter(values)
    small = {"dropout": nn.Tanh()} if "dropout" in module._modules else {}
    for name, parameters in kind.layers.items():
        given = {parameter: next(values) for parameter in parameters}
        small[name] = twin(module._modules[name], given, nf=given["weight"].shape[1])
    return twin(module, modules=small)


def _forward(stock: Callable, kind: _Kind, layer: type[nn.Module], activation: str) -> Callable:
    fused, act, names = kind.fused, kind.act, (*kind.layers,)

    def usable(self, x: Tensor) -> bool:
        layers = [getattr(self, name) for name in names]
        return all(type(each) is layer for each in layers) and untouched(*layers, getattr(self, act))

    return one_argument(stock, lambda self, x: fused(self, x, activation), usable)


def _gated(self, x: Tensor, activation: str) -> Tensor:
    weights = self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight
    return ops.gated_mlp(x, *weights, activation=activation)


def _plain(self, x: Tensor, activation: str) -> Tensor:
    up, down = self.c_fc, self.c_proj
    y = ops.mlp(x, up.weight.t(), down.weight.t(), up.bias, down.bias, activation=activation)
    return self.dropout(y)


def _is_conv1d(layer: nn.Module) -> bool:
    """Hugging Face's: a linear of nf outputs whose weight is [in, out]."""
    return hasattr(layer, "nf") and layer._parameters.keys() == {"weight", "bias"} and layer.bias is not None


_KINDS = (
    _Kind(
        "gated_mlp", _gated, "act_fn", reference.GATES, is_linear,
        {"gate_proj": {"weight": (_F, _K)}, "up_proj": {"weight": (_F, _K)}, "down_proj": {"weight": (_N, _F)}},
    ),
    _Kind(
        "mlp", _plain, "act", (*reference.ACTIVATIONS,), _is_conv1d,
        {"c_fc": {"weight": (_K, _F), "bias": (_F,)}, "c_proj": {"weight": (_F, _N), "bias": (_N,)}},
    ),
)  # fmt: skip
