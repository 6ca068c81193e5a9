"""ops.gated_linear: act(x @ w_gate^T) * (x @ w_up^T), SwiGLU and GeGLU, differentiable, two stock weights.

    backward  dup = dy * act(gate), dgate = dy * up * act'(gate)          one op
              dgrad  dx [..., K] = dgate @ w_gate + dup @ w_up            wgrad  dgate^T @ x, dup^T @ x

On CUDA the two products are two launches of kernels.linear, and the gate's activation sits in an epilogue.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tpmp_kernels import reference
from tpmp_kernels.ops import backend, checks, onednn
from tpmp_kernels.ops._register import below_autograd, lowest, register
from tpmp_kernels.ops.linear import activation_grad, as_rows, gemm


def gated_linear(x: Tensor, w_gate: Tensor, w_up: Tensor, *, activation: str = "silu") -> Tensor:
    """act(x @ w_gate^T) * (x @ w_up^T).

    x [..., K], w_gate and w_up [N, K] -> [..., N], in x's dtype. activation: silu (SwiGLU), gelu or gelu_tanh
    (GeGLU). Shazeer, "GLU Variants Improve Transformer", 2020. Raises ValueError for shapes, devices and names,
    TypeError for dtypes.
    """
    checks.weight("gated_linear", "w_gate", w_gate, x)
    checks.shape("gated_linear", "w_up", w_up, w_gate.shape)
    checks.together("gated_linear", x, w_gate=w_gate, w_up=w_up)
    checks.activation("gated_linear", activation, reference.GATES)
    if backend.choose(x) == "reference":
        return reference.gated_linear(x, w_gate, w_up, activation=activation)
    return _gated_linear(x, w_gate, w_up, activation)


def _forward(x: Tensor, w_gate: Tensor, w_up: Tensor, activation: str) -> Tensor:
    rows = as_rows(x)
    if backend.choose(x) == "triton":
        from tpmp_kernels.kernels.linear import linear

        y = linear(rows, w_gate, activation=activation)[0].mul_(linear(rows, w_up)[0])
    elif onednn.serves(rows, w_gate) and onednn.serves(rows, w_up):
        gate = onednn.linear(rows, w_gate, None, activation)
        y = onednn.linear_with(rows, w_up, None, gate, "mul")
    else:
        y = reference.activate(gemm(rows, w_gate, None), activation).mul_(gemm(rows, w_up, None))
    return y.view(*x.shape[:-1], w_gate.shape[0])


def _forward_with_preact(x: Tensor, w_gate: Tensor, w_up: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """(y, gate, up), gate before its activation."""
    rows, out = as_rows(x), (*x.shape[:-1], w_gate.shape[0])
    if backend.choose(x) == "triton":
        from tpmp_kernels.kernels.linear import linear

        y, gate = linear(rows, w_gate, activation=activation, store_preact=True)
        up, _ = linear(rows, w_up)
    else:
        gate, up = gemm(rows, w_gate, None), gemm(rows, w_up, None)
        y = reference.activate(gate, activation)
    return y.mul_(up).view(out), gate.view(out), up.view(out)


def _dz(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    dgate = activation_grad(dy, gate, activation).mul_(up)
    return dgate, reference.activate(gate, activation).mul_(dy)


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w_gate, w_up, activation):
        with below_autograd():
            y, gate, up = _gated_linear_with_preact(x, w_gate, w_up, activation)
        ctx.save_for_backward(x, w_gate, w_up, gate, up)
        ctx.activation = activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, w_gate, w_up, gate, up = ctx.saved_tensors
        dgate, dup = (as_rows(d) for d in _gated_linear_dz(dy, gate, up, ctx.activation))
        rows = as_rows(x)
        need_x, need_gate, need_up, _ = ctx.needs_input_grad
        dx = torch.mm(dgate, w_gate).addmm_(dup, w_up).view(x.shape) if need_x else None
        return (
            dx,
            torch.mm(dgate.t(), rows) if need_gate else None,
            torch.mm(dup.t(), rows) if need_up else None,
            None,
        )


def _fake(x, w_gate, w_up, activation):
    return x.new_empty(*x.shape[:-1], w_gate.shape[0])


def _fake_with_preact(x, w_gate, w_up, activation):
    return tuple(_fake(x, w_gate, w_up, activation) for _ in range(3))


def _fake_dz(dy, gate, up, activation):
    return dy.new_empty(dy.shape), dy.new_empty(dy.shape)


_gated_linear = register(
    "gated_linear(Tensor x, Tensor w_gate, Tensor w_up, str activation) -> Tensor",
    _forward,
    _fake,
    function=_GatedLinear,
    autocast=lowest,
)
_gated_linear_with_preact = register(
    "gated_linear_with_preact(Tensor x, Tensor w_gate, Tensor w_up, str activation) -> (Tensor, Tensor, Tensor)",
    _forward_with_preact,
    _fake_with_preact,
)
_gated_linear_dz = register(
    "gated_linear_dz(Tensor dy, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)", _dz, _fake_dz
)
