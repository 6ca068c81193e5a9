"""The ops that people import: GEMMs of a transformer layer fused with their neighbours, at home in torch.

Each has a torch.library schema, a fake kernel, its own gradient, an autocast rule and three backends (triton, cpu,
reference), and the name and signature of its unfused definition in `tpmp_kernels.reference`.
"""

from tpmp_kernels.ops.backend import use_backend
from tpmp_kernels.ops.cross_entropy import cross_entropy
from tpmp_kernels.ops.explain import Explanation, explain
from tpmp_kernels.ops.gated_linear import gated_linear
from tpmp_kernels.ops.glu import glu
from tpmp_kernels.ops.grad_norm import clip_grads_, grad_norm
from tpmp_kernels.ops.layer_norm import layer_norm
from tpmp_kernels.ops.linear import linear
from tpmp_kernels.ops.linear_cross_entropy import linear_cross_entropy
from tpmp_kernels.ops.main_grad import attach_main_grad
from tpmp_kernels.ops.mlp import gated_mlp, mlp
from tpmp_kernels.ops.rms_norm import rms_norm
from tpmp_kernels.ops.rope import Llama3Scaling, rope, rope_table
from tpmp_kernels.ops.split import Later, dgrad, split_backward, tap, wgrad

__all__ = [
    "Explanation",
    "Later",
    "Llama3Scaling",
    "attach_main_grad",
    "clip_grads_",
    "cross_entropy",
    "dgrad",
    "explain",
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
    "split_backward",
    "tap",
    "use_backend",
    "wgrad",
]
