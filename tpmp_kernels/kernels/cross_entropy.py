"""The two passes of a loss over logits: the statistics of each row, and the gradient from them.

Statistics are four numbers a row: peak = max z, others = sum exp(z - peak) but for the target, the target's logit (0
where it is not among these columns) and, if asked for, the shortfall sum(peak - z). Both kernels take any piece of
columns, the ids from `first` on, and cap the logits to cap tanh(z / cap) where there is a cap. A program owns whole
rows: no atomics, the same bits on every run. What is computed from the statistics is in ops/vocab.py; the same two
passes over logits that are never stored are in linear_cross_entropy.py.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

STATISTICS_BLOCK, GRADIENT_BLOCK = (4, 1024), (4, 1024)
WARPS = 8  # of 4, the statistics of capped logits whose rows are adjacent in memory spill
# What stands for the peak of no logits: of -inf, nothing could be subtracted.
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit(do_not_specialize=["m", "first"])
def statistics_kernel(
    z, target, found,
    m, n, first,
    z_stride_m, z_stride_n,
    SOFTCAP: tl.constexpr,
    SHORTFALL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    place = tl.load(target + rows, mask=rows < m, other=0) - tl.cast(first, tl.int64)
    peak, others, target_logit, shortfall = of_no_columns(BLOCK_M)
    for start in range(0, n, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N).to(tl.int64)
        mask = (rows < m)[:, None] & (cols < n)[None, :]
        offsets = rows[:, None] * z_stride_m + cols[None, :] * z_stride_n
        logits = tl.load(z + offsets, mask=mask, other=0.0).to(tl.float32)
        is_target = mask & (cols[None, :] == place[:, None])
        peak, others, target_logit, shortfall = with_columns(
            peak, others, target_logit, shortfall, start, logits, mask, is_target, True, SOFTCAP, SHORTFALL
        )
    put_statistics(found, peak, others, target_logit, shortfall, rows, m)


@triton.jit
def of_no_columns(ROWS: tl.constexpr):
    """(peak, others, target's logit, shortfall) before the first column."""
    nothing = tl.zeros((ROWS,), tl.float32)
    return tl.full((ROWS,), LOWEST, tl.float32), nothing, nothing, nothing


@triton.jit
def with_columns(
    peak, others, target_logit, shortfall, seen, logits, mask, is_target, any_target,
    SOFTCAP: tl.constexpr, SHORTFALL: tl.constexpr,
):  # fmt: skip
    """The statistics of `seen` columns of each row, and of those in the mask of logits [rows, columns], uncapped.

    Where it is known that not any_target is among these, nothing looks for one.
    """
    if SOFTCAP is not None:
        logits, _ = _capped(logits, SOFTCAP)
    logits = tl.where(mask, logits, -float("inf"))
    higher = tl.maximum(peak, tl.max(logits, axis=1))
    if SHORTFALL:
        # Before the first column there is no peak that the others could have risen from.
        risen = tl.where(seen > 0, higher - peak, 0.0)
        shortfall += seen * risen + tl.sum(tl.where(mask, higher[:, None] - logits, 0.0), axis=1)
    if any_target:
        target_logit += tl.sum(tl.where(is_target, logits, 0.0), axis=1)
        logits = tl.where(is_target, -float("inf"), logits)
    others = others * tl.exp(peak - higher) + tl.sum(tl.exp(logits - higher[:, None]), axis=1)
    return higher, others, target_logit, shortfall


@triton.jit
def put_statistics(found, peak, others, target_logit, shortfall, rows, m):
    """Into found [4, m]."""
    rows_of = tl.cast(m, tl.int64)
    tl.store(found + rows, peak, mask=rows < m)
    tl.store(found + rows_of + rows, others, mask=rows < m)
    tl.store(found + 2 * rows_of + rows, target_logit, mask=rows < m)
    tl.store(found + 3 * rows_of + rows, shortfall, mask=rows < m)


@triton.jit(do_not_specialize=["m", "first"])
def gradient_kernel(
    z, out, target, peak, scale, target_scale, truth, shift,
    m, n, first,
    z_stride_m, z_stride_n, out_stride_m, out_stride_n,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < m)[:, None] & (cols < n)[None, :]
    place = tl.load(target + rows, mask=rows < m, other=0) - tl.cast(first, tl.int64)
    offsets = rows[:, None] * z_stride_m + cols[None, :] * z_stride_n
    logits = tl.load(z + offsets, mask=mask, other=0.0).to(tl.float32)
    is_target = cols[None, :] == place[:, None]
    d = gradient_of(logits, is_target, True, peak, scale, target_scale, truth, shift, rows, m, SOFTCAP)
    places = out + rows[:, None] * out_stride_m + cols[None, :] * out_stride_n
    tl.store(places, d.to(out.dtype.element_ty), mask=mask)


@triton.jit
def gradient_of(
    logits, is_target, any_target, peak, scale, target_scale, truth, shift, rows, m, SOFTCAP: tl.constexpr
):  # fmt: skip
    """d of logits [rows, columns], uncapped, in fp32, from the numbers of each row; any_target as in with_columns."""
    if SOFTCAP is not None:
        logits, slope = _capped(logits, SOFTCAP)
    d = tl.exp(logits - _of_rows(peak, rows, m))
    if any_target:
        d *= tl.where(is_target, _of_rows(target_scale, rows, m), _of_rows(scale, rows, m))
        d -= tl.where(is_target, _of_rows(truth, rows, m), 0.0)
    else:
        d *= _of_rows(scale, rows, m)
    if shift is not None:
        d -= _of_rows(shift, rows, m)
    if SOFTCAP is not None:
        d *= slope
    return d


@triton.jit
def _of_rows(numbers, rows, m):
    return tl.load(numbers + rows, mask=rows < m, other=0.0)[:, None]


@triton.jit
def _capped(z, SOFTCAP: tl.constexpr):
    """cap tanh(z / cap) and its derivative, for fp32 z.

    With e = exp(-2 |u|): tanh |u| = (1 - e) / (1 + e) and tanh' = 4 e / (1 + e)^2. Near 0 the first would cancel; there
    the series is exact to fp32.
    """
    u = z / SOFTCAP
    square = u * u
    e = tl.exp(-2.0 * tl.abs(u))
    ratio = (1.0 - e) / (1.0 + e)
    series = u * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    tanh = tl.where(square < 0.0225, series, tl.where(u < 0.0, -ratio, ratio))
    return SOFTCAP * tanh, 4.0 * e / ((1.0 + e) * (1.0 + e))


def statistics(z: Tensor, target: Tensor, first: int, softcap: float | None, *, shortfall: bool) -> Tensor:
    """[4, M] in fp32: peak, others, target's logit and the shortfall, 0 if it is not asked for, of each row.

    z [M, N], the logits of the ids first .. first + N - 1, fp32, fp16 or bf16, any strides; target [M] int64.
    """
    found = torch.empty(4, z.shape[0], dtype=torch.float32, device=z.device)
    if z.shape[0] > 0:
        named = statistics_arguments(z, target.contiguous(), found, first, softcap, shortfall)
        _launch(statistics_kernel, named, (triton.cdiv(named["m"], named["BLOCK_M"]),))
    return found


def gradient(
    z: Tensor,
    out: Tensor,
    target: Tensor,
    first: int,
    peak: Tensor,
    scale: Tensor,
    target_scale: Tensor,
    truth: Tensor,
    shift: Tensor | None,
    *,
    softcap: float | None,
) -> None:
    """out = (scale exp(z - peak) - shift) cap'(z), of the target (target_scale exp(z - peak) - truth - shift) cap'(z).

    Rounded once. z, target, first as in `statistics`; out [M, N] of any dtype and strides, z itself allowed; peak,
    scale, target_scale, truth and shift [M], fp32 and contiguous.
    """
    if z.numel() > 0:
        named = gradient_arguments(z, out, target.contiguous(), first, peak, scale, target_scale, truth, shift, softcap)
        grid = (triton.cdiv(named["m"], named["BLOCK_M"]), triton.cdiv(named["n"], named["BLOCK_N"]))
        _launch(gradient_kernel, named, grid)


def statistics_arguments(
    z: Tensor, target: Tensor, found: Tensor, first: int, softcap: float | None, shortfall: bool
) -> dict[str, Any]:
    """Every argument of `statistics_kernel` by name, as a launch passes them and as aot.compile takes them."""
    return _common(z, target, first, softcap, STATISTICS_BLOCK) | {"found": found, "SHORTFALL": shortfall}


def gradient_arguments(
    z: Tensor,
    out: Tensor,
    target: Tensor,
    first: int,
    peak: Tensor,
    scale: Tensor,
    target_scale: Tensor,
    truth: Tensor,
    shift: Tensor | None,
    softcap: float | None,
) -> dict[str, Any]:
    """Every argument of `gradient_kernel` by name."""
    return _common(z, target, first, softcap, GRADIENT_BLOCK) | {
        "out": out, "peak": peak, "scale": scale, "target_scale": target_scale, "truth": truth, "shift": shift,
        "out_stride_m": out.stride(0), "out_stride_n": out.stride(1),
    }  # fmt: skip


def _common(z: Tensor, target: Tensor, first: int, softcap: float | None, block: tuple[int, int]) -> dict[str, Any]:
    return {
        "z": z, "target": target, "m": z.shape[0], "n": z.shape[1], "first": first,
        "z_stride_m": z.stride(0), "z_stride_n": z.stride(1), "SOFTCAP": softcap,
        "BLOCK_M": block[0], "BLOCK_N": block[1],
    }  # fmt: skip


def _launch(kernel: Callable, named: dict[str, Any], grid: tuple[int, ...]) -> None:
    with torch.cuda.device_of(named["z"]):
        kernel[grid](**named, num_warps=WARPS, enable_fp_fusion=True)
