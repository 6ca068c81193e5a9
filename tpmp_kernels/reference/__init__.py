"""The unfused reference: every op of `tpmp_kernels.ops` under the same name and signature, in plain torch.

The oracle of tests, benchmarks and `tpmp verify`. Gradients are torch's own autograd. Nothing here is tuned: each
function is the definition, one torch call after the other.
"""

from tpmp_kernels.reference.activations import ACTIVATIONS, GATES, activate, activation_derivative
from tpmp_kernels.reference.linear import gated_linear, linear
from tpmp_kernels.reference.norms import rms_norm

__all__ = [
    "ACTIVATIONS",
    "GATES",
    "activate",
    "activation_derivative",
    "gated_linear",
    "linear",
    "rms_norm",
]
