"""ops.gated_linear: act(x @ w_gate^T) * (x @ w_up^T), SwiGLU and GeGLU, differentiable, two stock weights.

    forward   gate = x @ w_gate^T, up = x @ w_up^T        y = act(gate) * up        on CUDA one kernel
    backward  dup = dy * act(gate), dgate = dy * up * act'(gate)                    one pass
              dgrad  dx [..., K] = dgate @ w_gate + dup @ w_up
              wgrad  dgate^T @ x, dup^T @ x

gate and up are stored only when a gradient will need them, or made again by the same GEMMs (save_preact=False).
"""

import torch
from torch import Tensor

from tpmp_kernels import reference
from tpmp_kernels.ops import backend, checks, onednn
from tpmp_kernels.ops._register import below_autograd, lowest, register
from tpmp_kernels.ops.main_grad import slot, weight_grad
from tpmp_kernels.ops.plain import activate_, activation_grad, as_rows, gemm, sum_of_products, wide_gemm, widens
from tpmp_kernels.ops.sharding import cut


def gated_linear(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    *,
    activation: str = "silu",
    save_preact: bool = True,
    taps: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """act(x @ w_gate^T) * (x @ w_up^T).

    x [..., K], w_gate and w_up [N, K] -> [..., N], in x's dtype. activation: silu (SwiGLU), gelu or gelu_tanh
    (GeGLU). Shazeer, "GLU Variants Improve Transformer", 2020.

    save_preact=False makes both products again in backward instead of keeping them. taps, (tap_gate, tap_up) from
    ops.tap, leave the weights without gradient; theirs are those of the two products. A weight with a `main_grad` (see
    ops.attach_main_grad) has its gradient added there. Raises ValueError for shapes, devices and names, TypeError for
    dtypes.
    """
    tap_gate, tap_up = (None, None) if taps is None else taps
    checks.weight("gated_linear", "w_gate", w_gate, x)
    checks.shape("gated_linear", "w_up", w_up, w_gate.shape)
    checks.together("gated_linear", x, w_gate=w_gate, w_up=w_up, tap_gate=tap_gate, tap_up=tap_up)
    checks.activation("gated_linear", activation, reference.GATES)
    if taps is not None:
        for name, tap in (("tap_gate", tap_gate), ("tap_up", tap_up)):
            checks.shape("gated_linear", name, tap, (*x.shape[:-1], w_gate.shape[0]))
    if backend.choose(x) == "reference":
        return reference.gated_linear(x, w_gate, w_up, activation=activation, taps=taps)
    return _gated_linear(x, w_gate, w_up, tap_gate, tap_up, slot(w_gate), slot(w_up), activation, save_preact)


def _forward(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    tap_gate: Tensor | None,
    tap_up: Tensor | None,
    slot_gate: Tensor | None,
    slot_up: Tensor | None,
    activation: str,
    save_preact: bool,
) -> Tensor:
    return fused_gated(as_rows(x), w_gate, w_up, activation).view(*x.shape[:-1], w_gate.shape[0])


def fused_gated(x: Tensor, w_gate: Tensor, w_up: Tensor, activation: str) -> Tensor:
    """The gated linear of a matrix, on the backend that serves x: x [M, K] -> [M, N], new."""
    if backend.choose(x) == "triton":
        from tpmp_kernels.kernels import gated_linear as kernel

        return kernel.gated_linear(x, w_gate, w_up, activation)[0]
    if widens(x, w_gate.t()):
        wide = x.float()
        return activate_(wide_gemm(wide, w_gate), activation).mul_(wide_gemm(wide, w_up)).to(x.dtype)
    if onednn.serves(x, w_gate, activation) and onednn.serves(x, w_up, activation):
        gate = onednn.linear(x, w_gate, None, activation)
        return onednn.linear_with(x, w_up, None, gate, "mul")
    return activate_(gemm(x, w_gate), activation).mul_(gemm(x, w_up))


def fused_gated_with_preact(x: Tensor, w_gate: Tensor, w_up: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """(y, gate, up) of a matrix, gate before its activation."""
    if backend.choose(x) == "triton":
        from tpmp_kernels.kernels import gated_linear as kernel

        return kernel.gated_linear(x, w_gate, w_up, activation, store_preact=True)
    gate, up = gemm(x, w_gate), gemm(x, w_up)
    return reference.activate(gate, activation).mul_(up), gate, up


def _forward_with_preact(x: Tensor, w_gate: Tensor, w_up: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    out = (*x.shape[:-1], w_gate.shape[0])
    y, gate, up = fused_gated_with_preact(as_rows(x), w_gate, w_up, activation)
    return y.view(out), gate.view(out), up.view(out)


def _preact(x: Tensor, w_gate: Tensor, w_up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """(gate, up), the same bits as `_forward_with_preact` gives."""
    rows, out = as_rows(x), (*x.shape[:-1], w_gate.shape[0])
    if backend.choose(x) == "triton":
        from tpmp_kernels.kernels import gated_linear as kernel

        gate, up = kernel.preact(rows, w_gate, w_up, activation)
    else:
        gate, up = gemm(rows, w_gate), gemm(rows, w_up)
    return gate.view(out), up.view(out)


def _dz(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    if backend.choose(gate) == "triton":
        from tpmp_kernels.kernels.glu import glu_backward

        dgate, dup = glu_backward(as_rows(dy), as_rows(gate), as_rows(up), activation)
        return dgate.view(gate.shape), dup.view(gate.shape)
    return gated_grad(dy, gate, up, activation)


def gated_grad(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """(dgate, dup) outside Triton, in new contiguous tensors, rounded where unfused torch rounds."""
    dy = dy.contiguous()
    return activation_grad(dy * up, gate, activation), reference.activate(gate, activation).mul_(dy)


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w_gate, w_up, tap_gate, tap_up, slot_gate, slot_up, activation, save_preact):
        need_x, need_gate, need_up, *need_taps = ctx.needs_input_grad[:5]
        if tap_gate is not None:
            need_gate = need_up = False
        gate = up = None
        with below_autograd():
            if save_preact:
                y, gate, up = _gated_linear_with_preact(x, w_gate, w_up, activation)
            else:
                y = _gated_linear(x, w_gate, w_up, None, None, None, None, activation, True)
        keep_x, keep_weights = need_gate or need_up or not save_preact, need_x or not save_preact
        ctx.save_for_backward(
            x if keep_x else None, w_gate if keep_weights else None, w_up if keep_weights else None, gate, up
        )
        ctx.need = need_x, need_gate, need_up, any(need_taps)
        ctx.slots, ctx.activation = (slot_gate, slot_up), activation
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w_gate, w_up, gate, up = ctx.saved_tensors
        need_x, need_gate, need_up, need_taps = ctx.need
        if gate is None:
            gate, up = gated_linear_preact(x, w_gate, w_up, ctx.activation)
        dgate, dup = _gated_linear_dz(dy, gate, up, ctx.activation)
        taps = (dgate, dup) if need_taps else (None, None)
        dgate, dup = as_rows(dgate), as_rows(dup)
        dx = sum_of_products(dgate, w_gate, dup, w_up).view(*dy.shape[:-1], w_gate.shape[1]) if need_x else None
        return (
            dx,
            weight_grad(dgate, as_rows(x), ctx.slots[0]) if need_gate else None,
            weight_grad(dup, as_rows(x), ctx.slots[1]) if need_up else None,
            *taps,
            *(None,) * 4,
        )


def _fake(x, w_gate, w_up, tap_gate, tap_up, slot_gate, slot_up, activation, save_preact):
    return x.new_empty(*x.shape[:-1], w_gate.shape[0])


def _fakes(count):
    return lambda x, w_gate, w_up, activation: tuple(x.new_empty(*x.shape[:-1], w_gate.shape[0]) for _ in range(count))


def _fake_dz(dy, gate, up, activation):
    return dy.new_empty(dy.shape), dy.new_empty(dy.shape)


_gated_linear = register(
    "gated_linear(Tensor x, Tensor w_gate, Tensor w_up, Tensor? tap_gate, Tensor? tap_up, Tensor? slot_gate,"
    " Tensor? slot_up, str activation, bool save_preact) -> Tensor",
    _forward,
    _fake,
    function=_GatedLinear,
    autocast=lowest,
    sharding=cut("*k, nk, nk, *n, *n, -, - -> *n", "*n"),
)
_gated_linear_with_preact = register(
    "gated_linear_with_preact(Tensor x, Tensor w_gate, Tensor w_up, str activation) -> (Tensor, Tensor, Tensor)",
    _forward_with_preact,
    _fakes(3),
    sharding=cut("*k, nk, nk -> *n, *n, *n", "*n"),
)
gated_linear_preact = register(
    "gated_linear_preact(Tensor x, Tensor w_gate, Tensor w_up, str activation) -> (Tensor, Tensor)",
    _preact,
    _fakes(2),
    sharding=cut("*k, nk, nk -> *n, *n", "*n"),
)
_gated_linear_dz = register(
    "gated_linear_dz(Tensor dy, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)",
    _dz,
    _fake_dz,
    sharding=cut("*n, *n, *n -> *n, *n", "*n"),
)
