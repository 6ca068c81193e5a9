"""ops.glu: act(gate) * up, the gate of SwiGLU and GeGLU where its two products are made elsewhere, differentiable.

backward  dgate = dy * up * act'(gate)      dup = dy * act(gate)          one pass, from gate and up
"""

import torch
from torch import Tensor

from tpmp_kernels import reference
from tpmp_kernels.ops import backend, checks
from tpmp_kernels.ops._register import below_autograd, register, widest
from tpmp_kernels.ops.plain import activation_grad, as_rows
from tpmp_kernels.ops.sharding import cut


def glu(gate: Tensor, up: Tensor, *, activation: str = "silu") -> Tensor:
    """act(gate) * up, elementwise.

    gate and up [..., N] -> [..., N], in their dtype. Any strides, so that the halves of one fused product will do.
    activation: silu (SwiGLU), gelu or gelu_tanh (GeGLU). Shazeer, "GLU Variants Improve Transformer", 2020. Raises
    ValueError for shapes, devices and names, TypeError for dtypes.
    """
    checks.tensors("glu", gate=gate)
    if gate.dim() == 0:
        raise ValueError("glu: gate must have at least one dimension, got a scalar; pass gate of shape [..., N]")
    checks.shape("glu", "up", up, gate.shape)
    checks.together("glu", gate, first="gate", up=up)
    checks.activation("glu", activation, reference.GATES)
    if backend.choose(gate) == "reference":
        return reference.glu(gate, up, activation=activation)
    return _glu(gate, up, activation)


def _forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    if backend.choose(gate) == "triton":
        from tpmp_kernels.kernels import glu as kernel

        return kernel.glu(as_rows(gate), as_rows(up), activation).view(gate.shape)
    return reference.activate(gate.contiguous(), activation).mul_(up)


def _backward(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """(dgate, dup)."""
    if backend.choose(gate) == "triton":
        from tpmp_kernels.kernels import glu as kernel

        dgate, dup = kernel.glu_backward(as_rows(dy), as_rows(gate), as_rows(up), activation)
        return dgate.view(gate.shape), dup.view(gate.shape)
    dy, gate = dy.contiguous(), gate.contiguous()
    return activation_grad(dy * up, gate, activation), reference.activate(gate, activation).mul_(dy)


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, activation):
        with below_autograd():
            y = _glu(gate, up, activation)
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return y

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        return *_glu_backward(dy, gate, up, ctx.activation), None


def _fake(gate, up, activation):
    return gate.new_empty(gate.shape)


def _fake_backward(dy, gate, up, activation):
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


_glu = register(
    "glu(Tensor gate, Tensor up, str activation) -> Tensor",
    _forward,
    _fake,
    function=_Glu,
    autocast=widest,
    sharding=cut("*n, *n -> *n", "*n"),
)
_glu_backward = register(
    "glu_backward(Tensor dy, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)",
    _backward,
    _fake_backward,
    sharding=cut("*n, *n, *n -> *n, *n", "*n"),
)
