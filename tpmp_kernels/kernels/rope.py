"""Rotary embedding of queries and keys in one pass: a program turns all heads of a few tokens by one load of angles."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of one half of a head x heads x tokens that a program holds at a time; heads at most.
_TILE, _HEADS = 1024, 8


@triton.jit(do_not_specialize=["batch", "sequence", "positions"])
def rope_kernel(
    q, k, table, position_ids, q_out, k_out,
    batch, sequence, positions, q_heads, k_heads,
    q_stride_b, q_stride_s, q_stride_h, q_stride_d, k_stride_b, k_stride_s, k_stride_h, k_stride_d,
    position_stride_b, position_stride_s,
    INVERSE: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    b, s = token // sequence, token % sequence
    is_token = b < batch
    if position_ids is None:
        position = s
    else:
        position = tl.load(position_ids + b * position_stride_b + s * position_stride_s, mask=is_token, other=0)
    pair = tl.arange(0, BLOCK_D)
    known = (is_token & (position >= 0) & (position < positions))[:, None] & (pair < HALF)[None, :]
    angle = table + position[:, None] * (2 * HALF) + pair[None, :]
    # A position that the table does not have gives NaN, which no one takes for a result.
    cos = tl.load(angle, mask=known, other=float("nan"))[:, None, :]
    sin = tl.load(angle + HALF, mask=known, other=float("nan"))[:, None, :]
    if INVERSE:
        sin = -sin
    q_row = q + b * q_stride_b + s * q_stride_s
    k_row = k + b * k_stride_b + s * k_stride_s
    _turn(
        q_row, q_out, token, is_token, cos, sin, q_heads, q_stride_h, q_stride_d, HALF, REST, BLOCK_H, BLOCK_D, BLOCK_R
    )
    _turn(
        k_row, k_out, token, is_token, cos, sin, k_heads, k_stride_h, k_stride_d, HALF, REST, BLOCK_H, BLOCK_D, BLOCK_R
    )


@triton.jit
def _turn(
    row, out, token, is_token, cos, sin, heads, stride_h, stride_d,
    HALF: tl.constexpr, REST: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """All heads of the tokens at `row`, BLOCK_H at a time, into `out`, which is contiguous."""
    pair = tl.arange(0, BLOCK_D).to(tl.int64)[None, None, :]
    last = tl.arange(0, BLOCK_R).to(tl.int64)[None, None, :]
    for first in range(0, heads, BLOCK_H):
        head = first + tl.arange(0, BLOCK_H).to(tl.int64)
        is_head = is_token[:, None, None] & (head < heads)[None, :, None]
        source = row[:, None, None] + head[None, :, None] * stride_h
        target = out + (token[:, None, None] * heads + head[None, :, None]) * (2 * HALF + REST)
        mask = is_head & (pair < HALF)
        left = tl.load(source + pair * stride_d, mask=mask, other=0.0).to(tl.float32)
        right = tl.load(source + (pair + HALF) * stride_d, mask=mask, other=0.0).to(tl.float32)
        tl.store(target + pair, (left * cos - right * sin).to(out.dtype.element_ty), mask=mask)
        tl.store(target + pair + HALF, (right * cos + left * sin).to(out.dtype.element_ty), mask=mask)
        if REST > 0:
            mask = is_head & (last < REST)
            kept = tl.load(source + (last + 2 * HALF) * stride_d, mask=mask, other=0.0)
            tl.store(target + last + 2 * HALF, kept, mask=mask)


def rope(
    q: Tensor, k: Tensor, table: Tensor, position_ids: Tensor | None, *, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """q [B, S, Hq, D] and k [B, S, Hk, D] turned by the rows of `table` [P, R] (fp32), the last D - R dims kept.

    Any strides; bf16, fp16 or fp32. `inverse` turns back. Returns new contiguous tensors; NaN where position_ids names
    a row that the table does not have.
    """
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    named = arguments(q, k, table, position_ids, q_out, k_out, inverse=inverse)
    tokens = q.shape[0] * q.shape[1]
    if tokens > 0:
        with torch.cuda.device_of(q):
            rope_kernel[(triton.cdiv(tokens, named["BLOCK_T"]),)](**named, num_warps=4, enable_fp_fusion=True)
    return q_out, k_out


def arguments(
    q: Tensor,
    k: Tensor,
    table: Tensor,
    position_ids: Tensor | None,
    q_out: Tensor,
    k_out: Tensor,
    *,
    inverse: bool,
) -> dict[str, Any]:
    """Every argument of `rope_kernel` by name, as a launch passes them and as aot.compile takes them."""
    (batch, sequence, q_heads, size), k_heads = q.shape, k.shape[2]
    half, rest = table.shape[1] // 2, size - table.shape[1]
    block_d = max(16, triton.next_power_of_2(half))
    block_h = min(_HEADS, triton.next_power_of_2(max(q_heads, 1)))
    position_strides = (0, 0) if position_ids is None else position_ids.expand(batch, sequence).stride()
    return {
        "q": q, "k": k, "table": table.contiguous(), "position_ids": position_ids, "q_out": q_out, "k_out": k_out,
        "batch": batch, "sequence": sequence, "positions": table.shape[0], "q_heads": q_heads, "k_heads": k_heads,
        **{f"q_stride_{d}": stride for d, stride in zip("bshd", q.stride(), strict=True)},
        **{f"k_stride_{d}": stride for d, stride in zip("bshd", k.stride(), strict=True)},
        "position_stride_b": position_strides[0], "position_stride_s": position_strides[1],
        "INVERSE": inverse, "HALF": half, "REST": rest,
        "BLOCK_T": max(1, min(16, _TILE // (block_h * block_d))), "BLOCK_H": block_h, "BLOCK_D": block_d,
        "BLOCK_R": triton.next_power_of_2(max(rest, 1)),
    }  # fmt: skip
