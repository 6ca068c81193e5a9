"""Activations inside Triton kernels: act(z) and act'(z) in fp32, chosen at compile time by name.

The names are those of `tpmp_kernels.reference.ACTIVATIONS`. tanh comes as a logistic function, 1 + tanh(u) =
2 sigmoid(2u): tl has no tanh, and libdevice's runs neither in the interpreter nor on AMD.
"""

import triton
import triton.language as tl


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """act(z) for fp32 z; ACTIVATION None is the identity."""
    if ACTIVATION == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        z = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif ACTIVATION == "silu":
        z = z * tl.sigmoid(z)
    elif ACTIVATION == "relu":
        z = tl.where(z < 0.0, 0.0, z)
    elif ACTIVATION == "relu2":
        z = tl.where(z < 0.0, 0.0, z * z)
    return z


@triton.jit
def derivative(z, ACTIVATION: tl.constexpr):
    """act'(z) for fp32 z; 0 where a rectifier has its corner, as in torch."""
    if ACTIVATION == "gelu":
        slope = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACTIVATION == "gelu_tanh":
        s, complement = _logistic(1.5957691216057308 * (z + 0.044715 * z * z * z))
        slope = s + z * s * complement * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    elif ACTIVATION == "silu":
        s, complement = _logistic(z)
        slope = s * (1.0 + z * complement)
    elif ACTIVATION == "relu":
        slope = tl.where(z > 0.0, 1.0, 0.0)
    else:
        slope = tl.where(z > 0.0, 2.0 * z, 0.0)
    return slope


@triton.jit
def _logistic(u):
    """sigmoid(u) and 1 - sigmoid(u), both to full relative precision.

    Subtracting from 1 leaves an absolute error of one unit, which the derivative multiplies by z (1 + 0.13 z^2): 20
    units at z = 4. One exponential serves both, and its argument is never positive, so it cannot overflow.
    """
    e = tl.exp(-tl.abs(u))
    large = 1.0 / (1.0 + e)
    small = e * large
    return tl.where(u < 0.0, small, large), tl.where(u < 0.0, large, small)
