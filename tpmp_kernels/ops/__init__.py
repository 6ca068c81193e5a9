"""The ops that people import: GEMMs of a transformer layer fused with their neighbours, at home in torch.

Each has a torch.library schema, a fake kernel, its own gradient, an autocast rule and three backends (triton, cpu,
reference), and the name and signature of its unfused definition in `tpmp_kernels.reference`.
"""

from tpmp_kernels.ops.backend import use_backend
from tpmp_kernels.ops.gated_linear import gated_linear
from tpmp_kernels.ops.linear import linear
from tpmp_kernels.ops.rms_norm import rms_norm

__all__ = ["gated_linear", "linear", "rms_norm", "use_backend"]
