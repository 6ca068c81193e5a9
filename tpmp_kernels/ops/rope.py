"""ops.rope: rotary position embedding of queries and keys in one pass, differentiable.

    forward   (a, b) -> (a cos - b sin, b cos + a sin), a and b the halves of a head     backward  the same, sin negated

The gradient needs the table and the positions alone.
"""

import torch
from torch import Tensor

from tpmp_kernels import reference
from tpmp_kernels.ops import backend, checks, sharding
from tpmp_kernels.ops._register import below_autograd, register, widest
from tpmp_kernels.reference import Llama3Scaling


def rope_table(
    positions: int,
    dim: int,
    *,
    theta: float = 10000.0,
    scaling: Llama3Scaling | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """[P, D]: for positions 0..P-1, cos of position * theta^(-2i/D) in the first half of D, sin in the second.

    `scaling` stretches the long wavelengths (Llama 3.1). The angles are formed in fp64, since fp32 loses digits at
    large positions, and rounded once; a table for fp64 queries has dtype fp64. Raises ValueError for an odd D.
    """
    if positions < 0 or dim < 2 or dim % 2:
        raise ValueError(
            f"rope_table: positions must be at least 0, and dim even and at least 2, got {positions} and {dim}; "
            "pass the number of positions and of rotated dimensions of a head"
        )
    return reference.rope_table(positions, dim, theta=theta, scaling=scaling, dtype=dtype, device=device)


def rope(q: Tensor, k: Tensor, table: Tensor, position_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(q, k) turned by the angles of their positions, in Hugging Face Llama's convention: halves of a head are pairs.

    q [B, S, Hq, D] and k [B, S, Hk, D] of one dtype and any strides -> new contiguous tensors of their shapes. `table`
    [P, R], from `rope_table`, is fp32, or fp64 for fp64 q; where R < D, the last D - R dimensions are left alone.
    position_ids [B, S] or [S] (int64) choose its rows, by default 0..S-1. Computed in fp32 (fp64 for fp64), rounded
    once. Su et al., "RoFormer", 2021.

    Raises ValueError for shapes and devices, TypeError for dtypes. A position outside the table raises ValueError on
    the CPU; on CUDA, where asking would wait for the device, its token becomes NaN.
    """
    _check_shapes(q, k, table)
    checks.together("rope", q, first="q", k=k)
    _check_table(q, table)
    _check_positions(q, table, position_ids)
    sharding.meet("rope", {"q": q, "table": table, "position_ids": position_ids})
    if backend.choose(q) == "reference":
        return reference.rope(q, k, table, position_ids)
    return _rope(q, k, table, position_ids, False)


def _check_shapes(q: Tensor, k: Tensor, table: Tensor) -> None:
    checks.tensors("rope", q=q, k=k, table=table)
    if q.dim() != 4 or k.dim() != 4 or (q.shape[:2], q.shape[3]) != (k.shape[:2], k.shape[3]):
        raise ValueError(
            f"rope: q and k must have shapes [B, S, Hq, D] and [B, S, Hk, D], got {list(q.shape)} and {list(k.shape)}; "
            "move the heads behind the sequence with transpose(1, 2)"
        )
    rotated = table.shape[1] if table.dim() == 2 else 0
    if rotated < 2 or rotated % 2 or rotated > q.shape[3]:
        raise ValueError(
            f"rope: table must have shape [P, R] with R even and at most D = {q.shape[3]}, got {list(table.shape)}; "
            "make it with rope_table"
        )


def _check_table(q: Tensor, table: Tensor) -> None:
    if table.dtype != torch.float32 and (table.dtype, q.dtype) != (torch.float64, torch.float64):
        raise TypeError(
            f"rope: table must be float32, or float64 for float64 q, got {table.dtype} for {q.dtype}; "
            "pass dtype to rope_table"
        )
    if table.device != q.device:
        raise ValueError(f"rope: table is on {table.device} but q is on {q.device}; move one of them")


def _check_positions(q: Tensor, table: Tensor, position_ids: Tensor | None) -> None:
    batch, sequence = q.shape[:2]
    if position_ids is None:
        if sequence > table.shape[0]:
            raise ValueError(
                f"rope: table has {table.shape[0]} positions but the sequence has {sequence}; make it longer"
            )
        return
    checks.tensors("rope", position_ids=position_ids)
    if position_ids.dtype != torch.int64:
        raise TypeError(f"rope: position_ids must be int64, got {position_ids.dtype}; cast them")
    if position_ids.device != q.device:
        raise ValueError(f"rope: position_ids is on {position_ids.device} but q is on {q.device}; move one of them")
    if tuple(position_ids.shape) not in ((sequence,), (batch, sequence)):
        raise ValueError(
            f"rope: position_ids must have shape {[sequence]} or {[batch, sequence]}, got {list(position_ids.shape)}; "
            "pass one position for each token"
        )


def _forward(q: Tensor, k: Tensor, table: Tensor, position_ids: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
    if backend.choose(q) == "triton":
        from tpmp_kernels.kernels import rope as kernel

        return kernel.rope(q, k, table, position_ids, inverse=inverse)
    rows = table[: q.shape[1]] if position_ids is None else table[_known(position_ids, table.shape[0])]
    cos, sin = rows.unsqueeze(-2).chunk(2, dim=-1)
    return _turned(q, cos, sin, inverse), _turned(k, cos, sin, inverse)


def _known(position_ids: Tensor, positions: int) -> Tensor:
    """position_ids, which on the CPU are seen to lie inside the table; a negative one would count from its end."""
    if position_ids.is_cpu and position_ids.numel() > 0:
        least, most = (int(end) for end in position_ids.aminmax())
        if least < 0 or most >= positions:
            raise ValueError(
                f"rope: position_ids must lie in 0..{positions - 1}, the rows of the table, got {least}..{most}; "
                "make the table longer"
            )
    return position_ids


def _turned(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    half, wide = cos.shape[-1], torch.promote_types(x.dtype, torch.float32)
    source, turned = x.to(wide), x.new_empty(x.shape, dtype=wide)
    (a, b, rest), (a_turned, b_turned, kept) = (t.tensor_split((half, 2 * half), dim=-1) for t in (source, turned))
    sign = -1 if inverse else 1
    torch.mul(a, cos, out=a_turned).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=b_turned).addcmul_(a, sin, value=sign)
    kept.copy_(rest)
    return turned.to(x.dtype)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, table, position_ids, inverse):
        with below_autograd():
            q, k = _rope(q, k, table, position_ids, inverse)
        ctx.save_for_backward(table, position_ids)
        ctx.inverse = inverse
        return q, k

    @staticmethod
    def backward(ctx, dq, dk):
        table, position_ids = ctx.saved_tensors
        return *_rope(dq, dk, table, position_ids, not ctx.inverse), None, None, None


def _fake(q, k, table, position_ids, inverse):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _sharding(q, k, table, position_ids, inverse):
    """The batch and the heads may be cut, and the sequence where the positions of its tokens are given."""
    if position_ids is None:
        return sharding.cut("bshd, bshd, - -> bshd, bshd", "bh")(q, k, table, None, inverse)
    rows = "bs" if position_ids.ndim == 2 else "s"
    return sharding.cut(f"bshd, bshd, -, {rows} -> bshd, bshd", "bsh")(q, k, table, position_ids, inverse)


_rope = register(
    "rope(Tensor q, Tensor k, Tensor table, Tensor? position_ids, bool inverse) -> (Tensor, Tensor)",
    _forward,
    _fake,
    function=_Rope,
    autocast=widest,
    autocast_keeps=(2,),  # the table
    sharding=_sharding,
)
