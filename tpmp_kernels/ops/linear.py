"""ops.linear: one GEMM with bias, activation and residual in its epilogue, differentiable.

    forward   z = x @ weight^T + bias        y = act(z) + residual
    backward  dz = dy * act'(z), dbias = sum(dz)        one pass
              dgrad  dx [..., K] = dz @ weight          wgrad  dweight [N, K] = dz^T @ x

The derivative stands in a pass of its own: in front of dgrad's product it would feed the tensor cores from
registers. z is stored only when a gradient will need it, or made again by the same GEMM (save_preact=False).
"""

import torch
from torch import Tensor

from tpmp_kernels import reference
from tpmp_kernels.ops import backend, checks, onednn
from tpmp_kernels.ops._register import below_autograd, lowest, register
from tpmp_kernels.ops.main_grad import slot, weight_grad
from tpmp_kernels.ops.plain import activate_, activation_grad, as_rows, gemm, mm, wide_gemm, widens
from tpmp_kernels.ops.sharding import cut

ACTIVATIONS = (None, *reference.ACTIVATIONS)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    save_preact: bool = True,
    tap: Tensor | None = None,
) -> Tensor:
    """act(x @ weight^T + bias) + residual as one fused GEMM.

    x [..., K], weight [N, K], bias [N], residual [..., N] -> [..., N], in x's dtype or, for half precision, in
    out_dtype=torch.float32: the accumulator itself, with nothing rounded to x's dtype on the way; the residual may then
    be fp32 too. Any strides. activation: gelu (erf), gelu_tanh, silu, relu, relu2 (relu squared) or None. The residual
    comes after the activation.

    save_preact=False keeps x @ weight^T + bias for backward no longer than forward, and makes it again: the same
    gradients for less memory and one more GEMM. tap, from ops.tap, leaves weight and bias without gradient and takes
    dZ for its own. A weight with a `main_grad` (see ops.attach_main_grad) has its gradient added there. Raises
    ValueError for shapes, devices and names, TypeError for dtypes.
    """
    checks.weight("linear", "weight", weight, x)
    checks.together("linear", x, weight=weight, bias=bias, residual=None if out_dtype else residual, tap=tap)
    checks.activation("linear", activation, ACTIVATIONS)
    if bias is not None:
        checks.shape("linear", "bias", bias, weight.shape[:1])
    for name, full in (("residual", residual), ("tap", tap)):
        if full is not None:
            checks.shape("linear", name, full, (*x.shape[:-1], weight.shape[0]))
    if out_dtype is not None:
        _check_out_dtype(x, residual, out_dtype)
    if backend.choose(x) == "reference":
        return reference.linear(x, weight, bias, activation=activation, residual=residual, out_dtype=out_dtype, tap=tap)
    if residual is not None and out_dtype is not None and torch.is_autocast_enabled(x.device.type):
        # Autocast would narrow an fp32 residual.
        y = _linear(x, weight, bias, None, tap, slot(weight), activation, out_dtype, save_preact)
        return y + residual
    return _linear(x, weight, bias, residual, tap, slot(weight), activation, out_dtype, save_preact)


def _check_out_dtype(x: Tensor, residual: Tensor | None, out_dtype: torch.dtype) -> None:
    device = x.device.type
    casting = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if casting else x.dtype
    if out_dtype not in (dtype, torch.promote_types(dtype, torch.float32)):
        raise TypeError(
            f"linear: out_dtype must be {dtype} as the product's inputs, or torch.float32 for half precision, got "
            f"{out_dtype}; cast the result"
        )
    if residual is not None and residual.device != x.device:
        raise ValueError(f"linear: residual is on {residual.device} but x is on {x.device}; move one of them")
    if residual is not None and not casting and residual.dtype not in (x.dtype, out_dtype):
        raise TypeError(
            f"linear: residual has dtype {residual.dtype} but x has {x.dtype} and the result {out_dtype}; cast it"
        )


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    tap: Tensor | None,
    slot: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype | None,
    save_preact: bool,
) -> Tensor:
    flat = None if residual is None else as_rows(residual)
    y = fused(as_rows(x), weight, bias, flat, activation, out_dtype)
    return y.view(*x.shape[:-1], weight.shape[0])


def fused(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The fused linear of matrices, on the backend that serves x: x [M, K], residual [M, N] -> [M, N], new."""
    if backend.choose(x) == "triton":
        from tpmp_kernels.kernels import linear as kernel

        return kernel.linear(x, weight, bias, residual, activation, out_dtype=out_dtype)[0]
    x, weight, bias, residual = _as(out_dtype, x, weight, bias, residual)
    if widens(x, weight.t()):
        y = activate_(wide_gemm(x, weight, bias), activation)
        return (y if residual is None else y.add_(residual)).to(x.dtype)
    if (activation is None and residual is None) or not onednn.serves(x, weight, activation):
        y = activate_(gemm(x, weight, bias), activation)
    elif activation is None:
        return onednn.linear_with(x, weight, bias, residual, "add")
    else:
        y = onednn.linear(x, weight, bias, activation)
    return y if residual is None else y.add_(residual)


def _as(dtype: torch.dtype | None, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The CPU has no half-precision GEMM with an fp32 result: its operands are widened first."""
    return tensors if dtype is None else tuple(None if t is None else t.to(dtype) for t in tensors)


def fused_with_preact(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, z) of matrices, both in out_dtype. On the CPU z is rounded to it before the activation, as in torch."""
    if backend.choose(x) == "triton":
        from tpmp_kernels.kernels import linear as kernel

        return kernel.linear(x, weight, bias, residual, activation, out_dtype=out_dtype, store_preact=True)
    x, weight, bias, residual = _as(out_dtype, x, weight, bias, residual)
    z = gemm(x, weight, bias)
    y = reference.activate(z, activation)
    return y if residual is None else y.add_(residual), z


def _forward_with_preact(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    out = (*x.shape[:-1], weight.shape[0])
    flat = None if residual is None else as_rows(residual)
    y, z = fused_with_preact(as_rows(x), weight, bias, flat, activation, out_dtype)
    return y.view(out), z.view(out)


def _preact(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: bool, out_dtype: torch.dtype | None
) -> Tensor:
    """z, the same bits as `_forward_with_preact` would have given with such a residual and activation."""
    rows = as_rows(x)
    if backend.choose(x) == "triton":
        from tpmp_kernels.kernels import linear as kernel

        z = kernel.preact(rows, weight, bias, activation=activation, residual=residual, out_dtype=out_dtype)
    else:
        z = gemm(*_as(out_dtype, rows, weight, bias))
    return z.view(*x.shape[:-1], weight.shape[0])


def _dz(dy: Tensor, z: Tensor, activation: str, dtype: torch.dtype | None, bias: bool) -> tuple[Tensor, Tensor]:
    """(dz, dbias) in dtype, dy's by default; dbias is empty unless `bias`."""
    if backend.choose(z) == "triton":
        from tpmp_kernels.kernels import activation_grad as kernel

        dz, dbias = kernel.activation_grad(as_rows(dy), as_rows(z), activation, bias=bias, dtype=dtype)
    else:
        dz = activation_grad(dy, z, activation).to(dtype or dy.dtype)
        dbias = as_rows(dz).sum(0) if bias else None
    return dz.view(z.shape), dz.new_empty(0) if dbias is None else dbias


def _dbias(dz: Tensor) -> Tensor:
    """The sum of dz [M, N] over rows. An op, so that a compiler cannot give it another order of summation."""
    return dz.sum(0)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, tap, slot, activation, out_dtype, save_preact):
        need_x, need_weight, need_bias, need_residual, need_tap, *_ = ctx.needs_input_grad
        if tap is not None:
            need_weight = need_bias = False
        need_z = activation is not None and (need_x or need_weight or need_bias or need_tap)
        z = None
        with below_autograd():
            if need_z and save_preact:
                y, z = _linear_with_preact(x, weight, bias, residual, activation, out_dtype)
            else:
                y = _linear(x, weight, bias, residual, None, None, activation, out_dtype, True)
        again = need_z and not save_preact
        ctx.save_for_backward(
            x if need_weight or again else None, weight if need_x or again else None, bias if again else None, z
        )
        ctx.need = need_x, need_weight, need_bias, need_residual, need_tap
        ctx.slot, ctx.activation, ctx.out_dtype, ctx.dtype = slot, activation, out_dtype, x.dtype
        ctx.residual_dtype = None if residual is None else residual.dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, z = ctx.saved_tensors
        need_x, need_weight, need_bias, need_residual, need_tap = ctx.need
        dx = dweight = dbias = dtap = None
        if need_x or need_weight or need_bias or need_tap:
            rows = as_rows(dy)
            if ctx.activation is None:
                dz = rows.to(ctx.dtype)
                dbias = linear_dbias(dz) if need_bias else None
            else:
                if z is None:
                    has_residual = ctx.residual_dtype is not None
                    z = linear_preact(x, weight, bias, ctx.activation, has_residual, ctx.out_dtype)
                dz, dbias = _linear_dz(rows, as_rows(z), ctx.activation, ctx.dtype, need_bias)
            dx = mm(dz, weight).view(*dy.shape[:-1], weight.shape[1]) if need_x else None
            dweight = weight_grad(dz, as_rows(x), ctx.slot) if need_weight else None
            dtap = dz.view(dy.shape) if need_tap else None
        dresidual = dy.to(ctx.residual_dtype) if need_residual else None
        return dx, dweight, dbias if need_bias else None, dresidual, dtap, None, None, None, None


def _fake(x, weight, bias, residual, tap, slot, activation, out_dtype, save_preact):
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=out_dtype)


def _fake_with_preact(x, weight, bias, residual, activation, out_dtype):
    return tuple(x.new_empty(*x.shape[:-1], weight.shape[0], dtype=out_dtype) for _ in range(2))


def _fake_preact(x, weight, bias, activation, residual, out_dtype):
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=out_dtype)


def _fake_dz(dy, z, activation, dtype, bias):
    return dy.new_empty(z.shape, dtype=dtype), dy.new_empty(z.shape[-1] if bias else 0, dtype=dtype)


def _letters(x, weight, bias, residual, tap, slot, activation, out_dtype, save_preact):
    """K is a plain sum where nothing stands behind the product."""
    return "*nk" if activation is None and bias is None and residual is None and tap is None else "*n"


_linear = register(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? tap, Tensor? slot, str? activation,"
    " ScalarType? out_dtype, bool save_preact) -> Tensor",
    _forward,
    _fake,
    function=_Linear,
    autocast=lowest,
    sharding=cut("*k, nk, n, *n, *n, - -> *n", _letters),
)
_linear_with_preact = register(
    "linear_with_preact(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str activation,"
    " ScalarType? out_dtype) -> (Tensor, Tensor)",
    _forward_with_preact,
    _fake_with_preact,
    sharding=cut("*k, nk, n, *n -> *n, *n", "*n"),
)
linear_preact = register(
    "linear_preact(Tensor x, Tensor weight, Tensor? bias, str activation, bool residual, ScalarType? out_dtype)"
    " -> Tensor",
    _preact,
    _fake_preact,
    sharding=cut("*k, nk, n -> *n", "*n"),
)
_linear_dz = register(
    "linear_dz(Tensor dy, Tensor z, str activation, ScalarType? dtype, bool bias) -> (Tensor, Tensor)",
    _dz,
    _fake_dz,
    sharding=cut("*n, *n -> *n, n", "*n"),
)
linear_dbias = register(
    "linear_dbias(Tensor dz) -> Tensor", _dbias, lambda dz: dz.new_empty(dz.shape[-1]), sharding=cut("*n -> n", "*n")
)
