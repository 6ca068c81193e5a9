"""The unfused reference: every op of `tpmp_kernels.ops` under the same name and signature, in plain torch.

The oracle of tests, benchmarks and `tpmp verify`. Gradients are torch's own autograd. Nothing here is tuned: each
function is the definition, one torch call after the other.
"""

from tpmp_kernels.reference.activations import ACTIVATIONS, GATES, activate, activation_derivative
from tpmp_kernels.reference.glu import glu
from tpmp_kernels.reference.grad_norm import clip_grads_, grad_norm
from tpmp_kernels.reference.linear import dgrad, gated_linear, gated_mlp, linear, mlp, wgrad
from tpmp_kernels.reference.losses import cross_entropy, linear_cross_entropy
from tpmp_kernels.reference.norms import layer_norm, rms_norm
from tpmp_kernels.reference.rope import Llama3Scaling, rope, rope_table

__all__ = [
    "ACTIVATIONS",
    "GATES",
    "Llama3Scaling",
    "activate",
    "activation_derivative",
    "clip_grads_",
    "cross_entropy",
    "dgrad",
    "gated_linear",
    "gated_mlp",
    "glu",
    "grad_norm",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "mlp",
    "rms_norm",
    "rope",
    "rope_table",
    "wgrad",
]
