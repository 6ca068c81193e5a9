"""ops.mlp and ops.gated_mlp: the two linears of a feed-forward layer as one op, which keeps no hidden activation.

    mlp         z = x @ w_up^T + b_up                        h = act(z)            y = h @ w_down^T + b_down
    gated_mlp   gate = x @ w_gate^T, up = x @ w_up^T         h = act(gate) * up    y = h @ w_down^T

For backward x and the pre-activations are kept, or x alone (save_preact=False). The down layer's dgrad carries the
derivative in its epilogue: from a tile of dy @ w_down and one of the pre-activations it writes dz (dgate, dup), h for
the down layer's wgrad, and the bias gradient's partial sums. Then come the plain dgrad and wgrad of the up layer.
"""

import torch
from torch import Tensor

from tpmp_kernels import reference
from tpmp_kernels.ops import backend, checks
from tpmp_kernels.ops._register import below_autograd, lowest, register
from tpmp_kernels.ops.gated_linear import (
    fused_gated,
    fused_gated_with_preact,
    gated_grad,
    gated_linear_preact,
)
from tpmp_kernels.ops.linear import fused, fused_with_preact, linear_dbias, linear_preact
from tpmp_kernels.ops.main_grad import slot, weight_grad
from tpmp_kernels.ops.plain import activation_grad, as_rows, mm, sum_of_products
from tpmp_kernels.ops.sharding import cut


def mlp(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    *,
    activation: str = "gelu",
    save_preact: bool = True,
) -> Tensor:
    """act(x @ w_up^T + b_up) @ w_down^T + b_down.

    x [..., K], w_up [F, K], b_up [F], w_down [N, F], b_down [N] -> [..., N], in x's dtype. activation: gelu (erf),
    gelu_tanh, silu, relu or relu2. save_preact=False makes x @ w_up^T + b_up again in backward instead of keeping it.
    A weight with a `main_grad` (see ops.attach_main_grad) has its gradient added there. Raises ValueError for shapes,
    devices and names, TypeError for dtypes.
    """
    checks.weight("mlp", "w_up", w_up, x)
    _check_down("mlp", w_down, w_up.shape[0])
    checks.together("mlp", x, w_up=w_up, w_down=w_down, b_up=b_up, b_down=b_down)
    checks.activation("mlp", activation, reference.ACTIVATIONS)
    for name, bias, weight in (("b_up", b_up, w_up), ("b_down", b_down, w_down)):
        if bias is not None:
            checks.shape("mlp", name, bias, weight.shape[:1])
    if backend.choose(x) == "reference":
        return reference.mlp(x, w_up, w_down, b_up, b_down, activation=activation)
    return _mlp(x, w_up, w_down, b_up, b_down, slot(w_up), slot(w_down), activation, save_preact)


def gated_mlp(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, *, activation: str = "silu", save_preact: bool = True
) -> Tensor:
    """(act(x @ w_gate^T) * (x @ w_up^T)) @ w_down^T.

    x [..., K], w_gate and w_up [F, K], w_down [N, F] -> [..., N], in x's dtype. activation: silu (SwiGLU), gelu or
    gelu_tanh (GeGLU). save_preact, `main_grad` and errors as in ops.mlp.
    """
    checks.weight("gated_mlp", "w_gate", w_gate, x)
    checks.shape("gated_mlp", "w_up", w_up, w_gate.shape)
    _check_down("gated_mlp", w_down, w_gate.shape[0])
    checks.together("gated_mlp", x, w_gate=w_gate, w_up=w_up, w_down=w_down)
    checks.activation("gated_mlp", activation, reference.GATES)
    if backend.choose(x) == "reference":
        return reference.gated_mlp(x, w_gate, w_up, w_down, activation=activation)
    return _gated_mlp(x, w_gate, w_up, w_down, slot(w_gate), slot(w_up), slot(w_down), activation, save_preact)


def _check_down(op: str, w_down: Tensor, hidden: int) -> None:
    checks.tensors(op, w_down=w_down)
    if w_down.dim() != 2 or w_down.shape[1] != hidden:
        raise ValueError(
            f"{op}: w_down must have shape [N, {hidden}] to follow w_up, got {list(w_down.shape)}; reshape it"
        )


def _forward(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_up: Tensor | None,
    b_down: Tensor | None,
    slot_up: Tensor | None,
    slot_down: Tensor | None,
    activation: str,
    save_preact: bool,
) -> Tensor:
    h = fused(as_rows(x), w_up, b_up, None, activation)
    return fused(h, w_down, b_down).view(*x.shape[:-1], w_down.shape[0])


def _forward_with_preact(
    x: Tensor, w_up: Tensor, w_down: Tensor, b_up: Tensor | None, b_down: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    h, z = fused_with_preact(as_rows(x), w_up, b_up, None, activation)
    y = fused(h, w_down, b_down)
    return y.view(*x.shape[:-1], w_down.shape[0]), z.view(*x.shape[:-1], w_up.shape[0])


def _dz(
    dy: Tensor, w_down: Tensor, z: Tensor, activation: str, bias: bool, need_h: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dz, h, dbias) of matrices; h and dbias are empty where not needed."""
    if backend.choose(dy) == "triton":
        from tpmp_kernels.kernels import mlp as kernel

        dz, h, dbias = kernel.mlp_dz(dy, w_down, z, activation, bias=bias, need_h=need_h)
    else:
        dz = activation_grad(mm(dy, w_down), z, activation)
        h = reference.activate(z, activation) if need_h else None
        dbias = dz.sum(0) if bias else None
    return dz, _or_empty(h, dz), _or_empty(dbias, dz)


def _or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if tensor is None else tensor


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w_up, w_down, b_up, b_down, slot_up, slot_down, activation, save_preact):
        need_x, need_up, need_down, need_b_up, _, *_ = ctx.needs_input_grad
        ctx.need_dz = need_x or need_up or need_b_up
        need_z = ctx.need_dz or need_down
        again = need_z and not save_preact
        z = None
        with below_autograd():
            if need_z and save_preact:
                y, z = _mlp_with_preact(x, w_up, w_down, b_up, b_down, activation)
            else:
                y = _mlp(x, w_up, w_down, b_up, b_down, None, None, activation, True)
        ctx.save_for_backward(
            x if need_up or again else None,
            w_up if need_x or again else None,
            w_down if ctx.need_dz else None,
            b_up if again else None,
            z,
        )
        ctx.slot_up, ctx.slot_down, ctx.activation = slot_up, slot_down, activation
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w_up, w_down, b_up, z = ctx.saved_tensors
        need_x, need_up, need_down, need_b_up, need_b_down, *_ = ctx.needs_input_grad
        rows = as_rows(dy)
        dx = d_up = d_down = db_up = None
        if z is None and (ctx.need_dz or need_down):
            z = linear_preact(x, w_up, b_up, ctx.activation, False, None)
        if ctx.need_dz:
            dz, h, db_up = _mlp_dz(rows, w_down, as_rows(z), ctx.activation, need_b_up, need_down)
            dx = mm(dz, w_up).view(*dy.shape[:-1], w_up.shape[1]) if need_x else None
            d_up = weight_grad(dz, as_rows(x), ctx.slot_up) if need_up else None
        elif need_down:
            h = reference.activate(as_rows(z), ctx.activation)
        d_down = weight_grad(rows, h, ctx.slot_down) if need_down else None
        db_down = linear_dbias(rows) if need_b_down else None
        return dx, d_up, d_down, db_up if need_b_up else None, db_down, None, None, None, None


def _gated_forward(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    slot_gate: Tensor | None,
    slot_up: Tensor | None,
    slot_down: Tensor | None,
    activation: str,
    save_preact: bool,
) -> Tensor:
    h = fused_gated(as_rows(x), w_gate, w_up, activation)
    return fused(h, w_down, None).view(*x.shape[:-1], w_down.shape[0])


def _gated_forward_with_preact(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    out = (*x.shape[:-1], w_gate.shape[0])
    h, gate, up = fused_gated_with_preact(as_rows(x), w_gate, w_up, activation)
    return fused(h, w_down, None).view(*x.shape[:-1], w_down.shape[0]), gate.view(out), up.view(out)


def _gated_dz(
    dy: Tensor, w_down: Tensor, gate: Tensor, up: Tensor, activation: str, need_h: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dgate, dup, h) of matrices; h is empty where not needed."""
    if backend.choose(dy) == "triton":
        from tpmp_kernels.kernels import mlp as kernel

        dgate, dup, h = kernel.gated_mlp_dz(dy, w_down, gate, up, activation, need_h=need_h)
    else:
        dgate, dup = gated_grad(mm(dy, w_down), gate, up, activation)
        h = reference.activate(gate, activation).mul_(up) if need_h else None
    return dgate, dup, _or_empty(h, dgate)


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w_gate, w_up, w_down, slot_gate, slot_up, slot_down, activation, save_preact):
        need_x, need_gate, need_up, *_ = ctx.needs_input_grad
        ctx.need_dz = need_x or need_gate or need_up
        gate = up = None
        with below_autograd():
            if save_preact:
                y, gate, up = _gated_mlp_with_preact(x, w_gate, w_up, w_down, activation)
            else:
                y = _gated_mlp(x, w_gate, w_up, w_down, None, None, None, activation, True)
        keep_weights = need_x or not save_preact
        ctx.save_for_backward(
            x if need_gate or need_up or not save_preact else None,
            w_gate if keep_weights else None,
            w_up if keep_weights else None,
            w_down if ctx.need_dz else None,
            gate,
            up,
        )
        ctx.slots, ctx.activation = (slot_gate, slot_up, slot_down), activation
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w_gate, w_up, w_down, gate, up = ctx.saved_tensors
        need_x, need_gate, need_up, need_down, *_ = ctx.needs_input_grad
        rows = as_rows(dy)
        dx = d_gate = d_up = None
        if gate is None:
            gate, up = gated_linear_preact(x, w_gate, w_up, ctx.activation)
        gate, up = as_rows(gate), as_rows(up)
        if ctx.need_dz:
            dgate, dup, h = _gated_mlp_dz(rows, w_down, gate, up, ctx.activation, need_down)
            dx = sum_of_products(dgate, w_gate, dup, w_up).view(*dy.shape[:-1], w_up.shape[1]) if need_x else None
            d_gate = weight_grad(dgate, as_rows(x), ctx.slots[0]) if need_gate else None
            d_up = weight_grad(dup, as_rows(x), ctx.slots[1]) if need_up else None
        else:
            h = reference.activate(gate, ctx.activation).mul_(up)
        d_down = weight_grad(rows, h, ctx.slots[2]) if need_down else None
        return dx, d_gate, d_up, d_down, *(None,) * 5


def _fake(x, w_up, w_down, b_up, b_down, slot_up, slot_down, activation, save_preact):
    return x.new_empty(*x.shape[:-1], w_down.shape[0])


def _fake_with_preact(x, w_up, w_down, b_up, b_down, activation):
    return tuple(x.new_empty(*x.shape[:-1], w.shape[0]) for w in (w_down, w_up))


def _fake_dz(dy, w_down, z, activation, bias, need_h):
    n = z.shape[1]
    return z.new_empty(z.shape), z.new_empty(z.shape if need_h else 0), z.new_empty(n if bias else 0)


def _fake_gated(x, w_gate, w_up, w_down, slot_gate, slot_up, slot_down, activation, save_preact):
    return x.new_empty(*x.shape[:-1], w_down.shape[0])


def _fake_gated_with_preact(x, w_gate, w_up, w_down, activation):
    return tuple(x.new_empty(*x.shape[:-1], w.shape[0]) for w in (w_down, w_gate, w_up))


def _fake_gated_dz(dy, w_down, gate, up, activation, need_h):
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape), gate.new_empty(gate.shape if need_h else 0)


_mlp = register(
    "mlp(Tensor x, Tensor w_up, Tensor w_down, Tensor? b_up, Tensor? b_down, Tensor? slot_up, Tensor? slot_down,"
    " str activation, bool save_preact) -> Tensor",
    _forward,
    _fake,
    function=_Mlp,
    autocast=lowest,
    # The hidden axis f is a plain sum, but a bias would be added once for each part of it.
    sharding=cut("*k, fk, nf, f, n, -, - -> *n", lambda *args: "*n" if args[4] is not None else "*nf"),
)
_mlp_with_preact = register(
    "mlp_with_preact(Tensor x, Tensor w_up, Tensor w_down, Tensor? b_up, Tensor? b_down, str activation)"
    " -> (Tensor, Tensor)",
    _forward_with_preact,
    _fake_with_preact,
    sharding=cut("*k, fk, nf, f, n -> *n, *f", lambda *args: "*" if args[4] is not None else "*f"),
)
_mlp_dz = register(
    "mlp_dz(Tensor dy, Tensor w_down, Tensor z, str activation, bool bias, bool need_h) -> (Tensor, Tensor, Tensor)",
    _dz,
    _fake_dz,
    sharding=lambda dy, w_down, z, activation, bias, need_h: cut(
        f"mn, nf, mf -> mf, {'mf' if need_h else '-'}, {'f' if bias else '-'}", "mf"
    )(dy, w_down, z, activation, bias, need_h),
)
_gated_mlp = register(
    "gated_mlp(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down, Tensor? slot_gate, Tensor? slot_up,"
    " Tensor? slot_down, str activation, bool save_preact) -> Tensor",
    _gated_forward,
    _fake_gated,
    function=_GatedMlp,
    autocast=lowest,
    sharding=cut("*k, fk, fk, nf, -, -, - -> *n", "*nf"),
)
_gated_mlp_with_preact = register(
    "gated_mlp_with_preact(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down, str activation)"
    " -> (Tensor, Tensor, Tensor)",
    _gated_forward_with_preact,
    _fake_gated_with_preact,
    sharding=cut("*k, fk, fk, nf -> *n, *f, *f", "*f"),
)
_gated_mlp_dz = register(
    "gated_mlp_dz(Tensor dy, Tensor w_down, Tensor gate, Tensor up, str activation, bool need_h)"
    " -> (Tensor, Tensor, Tensor)",
    _gated_dz,
    _fake_gated_dz,
    sharding=lambda dy, w_down, gate, up, activation, need_h: cut(
        f"mn, nf, mf, mf -> mf, mf, {'mf' if need_h else '-'}", "mf"
    )(dy, w_down, gate, up, activation, need_h),
)
