"""torch.nn.RMSNorm, torch.nn.LayerNorm, and root-mean-square norms of one's own with a weight and an epsilon."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tpmp_kernels import ops
from tpmp_kernels.patching.proof import Swap, difference, draw, one_argument, twin

EXPECTS = "torch.nn.RMSNorm, torch.nn.LayerNorm and modules of one weight with variance_epsilon or eps"
_H = 16


def find(module: nn.Module, model: nn.Module) -> Swap | str | None:
    """The swap for this module, or why there is none, or None where it is no norm of these kinds."""
    if not (isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or _has_weight_and_eps(module)):
        return None
    names = [name for name, parameter in module._parameters.items() if parameter is not None]
    if "weight" not in names or module.weight.dim() != 1:
        return "it has no weight of one dimension"
    by = "layer_norm" if isinstance(module, nn.LayerNorm) else "rms_norm"
    stock = type(module).forward
    ours = _forward(stock, by)

    def small(*values: Tensor) -> nn.Module:
        return twin(module, dict(zip(names, values, strict=True)), normalized_shape=(_H,))

    # Rows as small as sqrt(eps) show where eps stands.
    x = torch.stack([draw(3, _H), draw(3, _H, seed=1) * (_eps(module, torch.float64) or 1.0) ** 0.5])
    why = difference(
        lambda x, *values: stock(small(*values), x),
        lambda x, *values: ours(small(*values), x),
        *(x, *(draw(_H, seed=2 + i) for i in range(len(names)))),
        by=f"ops.{by}",
    )
    return why or Swap(by, ours)


def _has_weight_and_eps(module: nn.Module) -> bool:
    alone = module._parameters.keys() == {"weight"} and not module._modules and not module._buffers
    return alone and any(isinstance(getattr(module, name, None), float) for name in ("variance_epsilon", "eps"))


def _eps(module: nn.Module, dtype: torch.dtype) -> float:
    eps = getattr(module, "variance_epsilon", None)
    eps = getattr(module, "eps", None) if eps is None else eps
    # torch.nn.RMSNorm's default is the epsilon of the dtype that it computes in.
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps if eps is None else eps


def _forward(stock: Callable, by: str) -> Callable:
    def usable(self, x: Tensor) -> bool:
        """Of two dtypes the stock forward makes what its author chose; under autocast ours makes the wider."""
        return x.dtype is self.weight.dtype or torch.is_autocast_enabled(x.device.type)

    def fused(self, x: Tensor) -> Tensor:
        if by == "layer_norm":
            return ops.layer_norm(x, self.weight, self.bias, eps=self.eps)
        return ops.rms_norm(x, self.weight, eps=_eps(self, x.dtype))

    return one_argument(stock, fused, usable)
