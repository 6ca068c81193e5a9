"""The same linears by the library's GEMM, for where `dispatch` chooses it: cuBLASLt through torch, the rest behind it.

Results are those of unfused torch: what comes out of the product is rounded before the next pass reads it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tpmp_kernels import reference
from tpmp_kernels.kernels.dispatch import LIBRARY_ACTIVATIONS


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None, store_preact: bool
) -> tuple[Tensor, Tensor | None]:
    """As kernels.linear.linear: (act(x @ weight^T + bias) + residual, z if `store_preact`)."""
    if residual is None and bias is not None and not store_preact and activation in LIBRARY_ACTIVATIONS:
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=activation == "gelu_tanh"), None
    z = F.linear(x, weight, bias)
    y = reference.activate(z, activation)
    if residual is not None:
        y = y + residual
    elif y is z and store_preact:
        y = z.clone()
    return y, z if store_preact else None


def gated_linear(
    x: Tensor, w_gate: Tensor, w_up: Tensor, activation: str, store_preact: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As kernels.gated_linear.gated_linear: two products and one pass."""
    from tpmp_kernels.kernels.glu import glu

    gate, up = F.linear(x, w_gate), F.linear(x, w_up)
    y = glu(gate, up, activation)
    return (y, gate, up) if store_preact else (y, None, None)
