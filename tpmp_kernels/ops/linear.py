"""ops.linear: one GEMM with bias, activation and residual in its epilogue, differentiable.

    forward   z = x @ weight^T + bias        y = act(z) + residual
    backward  dz = dy * act'(z), dbias = sum(dz)        one pass
              dgrad  dx [..., K] = dz @ weight          wgrad  dweight [N, K] = dz^T @ x

The derivative stands in a pass of its own: in front of dgrad's product it would feed the tensor cores from
registers. z is stored only when a gradient will need it.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tpmp_kernels import reference
from tpmp_kernels.ops import backend, checks, onednn
from tpmp_kernels.ops._register import below_autograd, lowest, register

ACTIVATIONS = (None, *reference.ACTIVATIONS)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """act(x @ weight^T + bias) + residual as one fused GEMM.

    x [..., K], weight [N, K], bias [N], residual [..., N] -> [..., N], in x's dtype, accumulated in at least fp32.
    Any strides. activation: gelu (erf), gelu_tanh, silu, relu, relu2 (relu squared) or None. The residual comes
    after the activation. Raises ValueError for shapes, devices and names, TypeError for dtypes.
    """
    checks.weight("linear", "weight", weight, x)
    checks.together("linear", x, weight=weight, bias=bias, residual=residual)
    checks.activation("linear", activation, ACTIVATIONS)
    if bias is not None:
        checks.shape("linear", "bias", bias, weight.shape[:1])
    if residual is not None:
        checks.shape("linear", "residual", residual, (*x.shape[:-1], weight.shape[0]))
    if backend.choose(x) == "reference":
        return reference.linear(x, weight, bias, activation=activation, residual=residual)
    return _linear(x, weight, bias, residual, activation)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None) -> Tensor:
    rows = as_rows(x)
    flat = None if residual is None else as_rows(residual)
    if backend.choose(x) == "triton":
        from tpmp_kernels.kernels import linear as kernel

        y, _ = kernel.linear(rows, weight, bias, flat, activation)
    elif (activation is None and flat is None) or not onednn.serves(rows, weight):
        y = reference.activate(gemm(rows, weight, bias), activation)
        y = y if flat is None else y.add_(flat)
    elif activation is None:
        y = onednn.linear_with(rows, weight, bias, flat, "add")
    else:
        y = onednn.linear(rows, weight, bias, activation)
        y = y if flat is None else y.add_(flat)
    return y.view(*x.shape[:-1], weight.shape[0])


def _forward_with_preact(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """(y, z). On the CPU z is rounded to the dtype before the activation, as in unfused torch."""
    rows, out = as_rows(x), (*x.shape[:-1], weight.shape[0])
    flat = None if residual is None else as_rows(residual)
    if backend.choose(x) == "triton":
        from tpmp_kernels.kernels import linear as kernel

        y, z = kernel.linear(rows, weight, bias, flat, activation, store_preact=True)
    else:
        z = gemm(rows, weight, bias)
        y = reference.activate(z, activation)
        y = y if flat is None else y.add_(flat)
    return y.view(out), z.view(out)


def as_rows(x: Tensor) -> Tensor:
    """[..., K] -> [M, K]. The count is spelt out, since -1 is ambiguous where K is 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def gemm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight^T + bias outside Triton, nothing fused. x [M, K] -> [M, N].

    On the CPU torch picks the library by dtype (oneDNN for bf16); calling oneDNN's linear for fp32 too was as fast.
    """
    return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


def activation_grad(dy: Tensor, z: Tensor, activation: str) -> Tensor:
    """dy * act'(z) outside Triton, by torch's own fused derivatives, in a new contiguous tensor."""
    dy = dy.contiguous()
    if activation == "silu":
        return torch.ops.aten.silu_backward(dy, z)
    if activation == "relu":
        return torch.ops.aten.threshold_backward(dy, z, 0)
    if activation == "relu2":
        return torch.relu(z).mul_(2).mul_(dy)
    return torch.ops.aten.gelu_backward(dy, z, approximate="tanh" if activation == "gelu_tanh" else "none")


def _dz(dy: Tensor, z: Tensor, activation: str, bias: bool) -> tuple[Tensor, Tensor]:
    if backend.choose(z) == "triton":
        from tpmp_kernels.kernels import activation_grad as kernel

        dz, dbias = kernel.activation_grad(as_rows(dy), as_rows(z), activation, bias=bias)
    else:
        dz = activation_grad(dy, z, activation)
        dbias = as_rows(dz).sum(0) if bias else None
    return dz.view(z.shape), z.new_empty(0) if dbias is None else dbias


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, activation):
        z = None
        with below_autograd():
            if activation is None:
                y = _linear(x, weight, bias, residual, None)
            else:
                y, z = _linear_with_preact(x, weight, bias, residual, activation)
        ctx.save_for_backward(x, weight, z)
        ctx.activation = activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, z = ctx.saved_tensors
        need_x, need_weight, need_bias, need_residual, _ = ctx.needs_input_grad
        dx = dweight = dbias = None
        dz = as_rows(dy)
        if ctx.activation is not None and (need_x or need_weight or need_bias):
            dz, dbias = _linear_dz(dz, z.view(dz.shape), ctx.activation, need_bias)
        elif need_bias:
            dbias = dz.sum(0)
        if need_x:
            dx = torch.mm(dz, weight).view(x.shape)
        if need_weight:
            dweight = torch.mm(dz.t(), as_rows(x))
        return dx, dweight, dbias if need_bias else None, dy if need_residual else None, None


def _fake(x, weight, bias, residual, activation):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _fake_with_preact(x, weight, bias, residual, activation):
    return _fake(x, weight, bias, residual, activation), _fake(x, weight, bias, residual, activation)


def _fake_dz(dy, z, activation, bias):
    return dy.new_empty(z.shape), dy.new_empty(z.shape[-1] if bias else 0)


_linear = register(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str? activation) -> Tensor",
    _forward,
    _fake,
    function=_Linear,
    autocast=lowest,
)
_linear_with_preact = register(
    "linear_with_preact(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str activation) -> (Tensor, Tensor)",
    _forward_with_preact,
    _fake_with_preact,
)
_linear_dz = register("linear_dz(Tensor dy, Tensor z, str activation, bool bias) -> (Tensor, Tensor)", _dz, _fake_dz)
