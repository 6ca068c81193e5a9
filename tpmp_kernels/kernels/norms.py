"""RMS norm and layer norm over the last dimension, with the residual addition in front, and their gradients.

A row that fits one block stays in registers: x is read once, and each gradient once. A wider row is read again, out of
the cache, for each of its sums. Statistics are fp32; the variance is taken about the mean, since mean(h^2) - mean(h)^2
loses every digit where the mean is large. The gradients of weight and bias are one fp32 partial sum for each program,
added by one torch.sum: how many there are depends on the shape alone.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# The widest row kept in registers. The gradient holds four arrays where the norm holds one.
WIDEST, WIDEST_GRADIENT = 16384, 8192
# Partial sums of the gradients of weight and bias: about two for each multiprocessor of an H100, few beside the rows.
_PARTIALS = 256


@dataclass(frozen=True)
class Block:
    """One program works on `rows` x `columns` at a time; `whole`: the columns are the whole row."""

    rows: int
    columns: int
    whole: bool
    num_warps: int


def block(n: int, widest: int) -> Block:
    """The block for rows of n elements, where one of `widest` elements still fits the registers.

    Rows that are not aligned to 16 bytes are loaded element by element, whose addresses take registers too.
    """
    ragged = n % 8 != 0
    if n > (widest // 2 if ragged else widest):
        return Block(4 if ragged else 16, 512, False, 8)
    columns = max(16, triton.next_power_of_2(n))
    elements = 1024 if ragged else 4096
    return Block(max(1, min(64, elements // columns)), columns, True, min(16, max(4, columns // 512)))


@triton.jit(do_not_specialize=["m"])
def norm_kernel(
    x, residual, weight, bias, normed, h, mean, rstd,
    m, n,
    x_stride_m, x_stride_n, residual_stride_m, residual_stride_n,
    EPS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inner = tl.arange(0, BLOCK_N).to(tl.int64)
    dtype: tl.constexpr = normed.dtype.element_ty
    count = tl.cast(n, tl.float32)
    center = tl.zeros((BLOCK_M,), dtype=tl.float32)
    squares = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if WHOLE:
        tile, mask = _stream(
            x, residual, rows, inner, m, n, x_stride_m, x_stride_n, residual_stride_m, residual_stride_n, dtype
        )
        if mean is not None:
            center = tl.div_rn(tl.sum(tile, axis=1), count)
        squares = _squares(tile, center, mask)
    else:
        if mean is not None:
            for start in range(0, n, BLOCK_N):
                tile, _ = _stream(
                    x, residual, rows, start + inner, m, n,
                    x_stride_m, x_stride_n, residual_stride_m, residual_stride_n, dtype,
                )  # fmt: skip
                center += tl.sum(tile, axis=1)
            center = tl.div_rn(center, count)
        for start in range(0, n, BLOCK_N):
            tile, mask = _stream(
                x, residual, rows, start + inner, m, n,
                x_stride_m, x_stride_n, residual_stride_m, residual_stride_n, dtype,
            )  # fmt: skip
            squares += _squares(tile, center, mask)
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, count) + EPS))

    if mean is not None:
        tl.store(mean + rows, center, mask=rows < m)
    tl.store(rstd + rows, scale, mask=rows < m)
    if WHOLE:
        _store_normed(tile, center, scale, weight, bias, normed, h, rows, inner, n, mask)
    else:
        for start in range(0, n, BLOCK_N):
            tile, mask = _stream(
                x, residual, rows, start + inner, m, n,
                x_stride_m, x_stride_n, residual_stride_m, residual_stride_n, dtype,
            )  # fmt: skip
            _store_normed(tile, center, scale, weight, bias, normed, h, rows, start + inner, n, mask)


@triton.jit
def _stream(
    x, residual, rows, cols, m, n, x_stride_m, x_stride_n, residual_stride_m, residual_stride_n, dtype: tl.constexpr
):
    """(h, mask): h = x + residual in fp32, rounded first to the dtype in which the next layer sees it; 0 outside."""
    mask = (rows < m)[:, None] & (cols < n)[None, :]
    tile = _load(x, rows, cols, x_stride_m, x_stride_n, mask)
    if residual is not None:
        tile += _load(residual, rows, cols, residual_stride_m, residual_stride_n, mask)
        tile = tile.to(dtype).to(tl.float32)
    return tile, mask


@triton.jit
def _load(x, rows, cols, stride_m, stride_n, mask):
    return tl.load(x + rows[:, None] * stride_m + cols[None, :] * stride_n, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _squares(tile, center, mask):
    deviation = tl.where(mask, tile - center[:, None], 0.0)
    return tl.sum(deviation * deviation, axis=1)


@triton.jit
def _store_normed(tile, center, scale, weight, bias, normed, h, rows, cols, n, mask):
    place = rows[:, None] * n + cols[None, :]
    if h is not None:
        tl.store(h + place, tile.to(h.dtype.element_ty), mask=mask)
    y = (tile - center[:, None]) * scale[:, None]
    y *= tl.load(weight + cols, mask=cols < n, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        y += tl.load(bias + cols, mask=cols < n, other=0.0).to(tl.float32)[None, :]
    tl.store(normed + place, y.to(normed.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["m", "row_blocks"])
def norm_backward_kernel(
    dnormed, dh, h, weight, mean, rstd, dx, dweight, dbias,
    m, n, row_blocks,
    dnormed_stride_m, dnormed_stride_n, dh_stride_m, dh_stride_n, h_stride_m, h_stride_n,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Whole rows: `row_blocks` blocks of rows add up to one partial sum of dweight and dbias. Wider ones: one block."""
    program = tl.program_id(0).to(tl.int64)
    inner = tl.arange(0, BLOCK_N).to(tl.int64)
    count = tl.cast(n, tl.float32)
    if WHOLE:
        weight_sum = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        bias_sum = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        scale = tl.load(weight + inner, mask=inner < n, other=0.0).to(tl.float32)[None, :]
        for index in range(0, row_blocks):
            rows = (program * row_blocks + index) * BLOCK_M + tl.arange(0, BLOCK_M)
            upstream, unit, factor, mask = _upstream_and_unit(
                dnormed, h, mean, rstd, rows, inner, m, n, dnormed_stride_m, dnormed_stride_n, h_stride_m, h_stride_n
            )
            scaled = upstream * scale
            along = tl.div_rn(tl.sum(scaled * unit, axis=1), count)
            level = tl.zeros((BLOCK_M,), dtype=tl.float32)
            if mean is not None:
                level = tl.div_rn(tl.sum(scaled, axis=1), count)
            _store_dx(scaled, unit, factor, along, level, dh, dx, rows, inner, n, dh_stride_m, dh_stride_n, mask)
            weight_sum += upstream * unit
            bias_sum += upstream
        _store_partial(weight_sum, dweight, program, inner, n)
        _store_partial(bias_sum, dbias, program, inner, n)
    else:
        rows = program * BLOCK_M + tl.arange(0, BLOCK_M)
        along = tl.zeros((BLOCK_M,), dtype=tl.float32)
        level = tl.zeros((BLOCK_M,), dtype=tl.float32)
        for start in range(0, n, BLOCK_N):
            cols = start + inner
            upstream, unit, _, _ = _upstream_and_unit(
                dnormed, h, mean, rstd, rows, cols, m, n, dnormed_stride_m, dnormed_stride_n, h_stride_m, h_stride_n
            )
            scaled = upstream * tl.load(weight + cols, mask=cols < n, other=0.0).to(tl.float32)[None, :]
            along += tl.sum(scaled * unit, axis=1)
            if mean is not None:
                level += tl.sum(scaled, axis=1)
        along, level = tl.div_rn(along, count), tl.div_rn(level, count)
        for start in range(0, n, BLOCK_N):
            cols = start + inner
            upstream, unit, factor, mask = _upstream_and_unit(
                dnormed, h, mean, rstd, rows, cols, m, n, dnormed_stride_m, dnormed_stride_n, h_stride_m, h_stride_n
            )
            scaled = upstream * tl.load(weight + cols, mask=cols < n, other=0.0).to(tl.float32)[None, :]
            _store_dx(scaled, unit, factor, along, level, dh, dx, rows, cols, n, dh_stride_m, dh_stride_n, mask)
            _store_partial(upstream * unit, dweight, program, cols, n)
            _store_partial(upstream, dbias, program, cols, n)


@triton.jit
def _upstream_and_unit(
    dnormed, h, mean, rstd, rows, cols, m, n, dnormed_stride_m, dnormed_stride_n, h_stride_m, h_stride_n
):
    """(dnormed, (h - mean) * rstd, rstd, mask), in fp32 and 0 outside the mask, so that sums need no mask."""
    mask = (rows < m)[:, None] & (cols < n)[None, :]
    factor = tl.load(rstd + rows, mask=rows < m, other=0.0)
    unit = _load(h, rows, cols, h_stride_m, h_stride_n, mask)
    if mean is not None:
        unit = tl.where(mask, unit - tl.load(mean + rows, mask=rows < m, other=0.0)[:, None], 0.0)
    upstream = _load(dnormed, rows, cols, dnormed_stride_m, dnormed_stride_n, mask)
    return upstream, unit * factor[:, None], factor, mask


@triton.jit
def _store_dx(scaled, unit, factor, along, level, dh, dx, rows, cols, n, dh_stride_m, dh_stride_n, mask):
    grad = (scaled - level[:, None] - unit * along[:, None]) * factor[:, None]
    if dh is not None:
        grad += _load(dh, rows, cols, dh_stride_m, dh_stride_n, mask)
    tl.store(dx + rows[:, None] * n + cols[None, :], grad.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def _store_partial(tile, partial, program, cols, n):
    if partial is not None:
        tl.store(partial + program * n + cols, tl.sum(tile, axis=0), mask=cols < n)


def norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float, *, centered: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """(normed, h, mean, rstd): (h - mean) * rstd * weight + bias with h = x + residual.

    x and residual [M, N] of any strides, weight and bias [N], of one dtype (bf16, fp16, fp32). h [M, N] is None where
    there is no residual, mean [M] (fp32) unless `centered`, which is the layer norm; rstd [M] is fp32.
    """
    m, n = x.shape
    normed, rstd = x.new_empty(m, n), x.new_empty(m, dtype=torch.float32)
    h = None if residual is None else x.new_empty(m, n)
    mean = x.new_empty(m, dtype=torch.float32) if centered else None
    if m > 0 and n > 0:
        shape = block(n, WIDEST)
        named = arguments(x, residual, weight, bias, normed, h, mean, rstd, eps, shape)
        launch(norm_kernel, named, triton.cdiv(m, shape.rows), shape)
    return normed, h, mean, rstd


def arguments(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    normed: Tensor,
    h: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    eps: float,
    shape: Block,
) -> dict[str, Any]:
    """Every argument of `norm_kernel` by name, as a launch passes them and as aot.compile takes them."""
    residual_strides = (0, 0) if residual is None else residual.stride()
    return {
        "x": x, "residual": residual,
        "weight": weight.contiguous(), "bias": None if bias is None else bias.contiguous(),
        "normed": normed, "h": h, "mean": mean, "rstd": rstd, "m": x.shape[0], "n": x.shape[1],
        "x_stride_m": x.stride(0), "x_stride_n": x.stride(1),
        "residual_stride_m": residual_strides[0], "residual_stride_n": residual_strides[1],
        "EPS": eps, **_constants(shape),
    }  # fmt: skip


def norm_backward(
    dnormed: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    *,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias), dx with dh added, the last two None where not needed. dnormed, dh, h [M, N]."""
    m, n = h.shape
    shape = block(n, WIDEST_GRADIENT)
    blocks = triton.cdiv(m, shape.rows)
    row_blocks = max(1, triton.cdiv(blocks, _PARTIALS)) if shape.whole else 1
    programs = triton.cdiv(blocks, row_blocks)
    dx = h.new_empty(m, n)
    dweight = h.new_empty(programs, n, dtype=torch.float32) if need_weight else None
    dbias = h.new_empty(programs, n, dtype=torch.float32) if need_bias else None
    if m > 0 and n > 0:
        named = backward_arguments(dnormed, dh, h, weight, mean, rstd, dx, dweight, dbias, row_blocks, shape)
        launch(norm_backward_kernel, named, programs, shape)
    sums = (None if partial is None else partial.sum(0).to(weight.dtype) for partial in (dweight, dbias))
    return dx, *sums


def backward_arguments(
    dnormed: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    dx: Tensor,
    dweight: Tensor | None,
    dbias: Tensor | None,
    row_blocks: int,
    shape: Block,
) -> dict[str, Any]:
    """Every argument of `norm_backward_kernel` by name, dweight and dbias being partial sums [programs, N]."""
    dh_strides = (0, 0) if dh is None else dh.stride()
    return {
        "dnormed": dnormed, "dh": dh, "h": h, "weight": weight.contiguous(),
        "mean": None if mean is None else mean.contiguous(), "rstd": rstd.contiguous(),
        "dx": dx, "dweight": dweight, "dbias": dbias, "m": h.shape[0], "n": h.shape[1], "row_blocks": row_blocks,
        "dnormed_stride_m": dnormed.stride(0), "dnormed_stride_n": dnormed.stride(1),
        "dh_stride_m": dh_strides[0], "dh_stride_n": dh_strides[1],
        "h_stride_m": h.stride(0), "h_stride_n": h.stride(1),
        **_constants(shape),
    }  # fmt: skip


def _constants(shape: Block) -> dict[str, Any]:
    return {"WHOLE": shape.whole, "BLOCK_M": shape.rows, "BLOCK_N": shape.columns}


def launch(kernel: Any, named: dict[str, Any], programs: int, shape: Block) -> None:
    """Run `programs` programs on the current stream of the device of h (or x)."""
    with torch.cuda.device_of(named["rstd"]):
        kernel[(programs,)](**named, num_warps=shape.num_warps, enable_fp_fusion=True)
