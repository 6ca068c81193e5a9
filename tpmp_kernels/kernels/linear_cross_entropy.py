"""The two passes of cross_entropy.py in the epilogue of a GEMM: the logits X @ W^T of a tile never leave the chip.

Forward, a tile stores four statistics of each of its rows, and a second kernel merges the tiles of a row in order.
Backward, the logits are made again, and d of each is stored instead of them, in the dtype of the products that follow.
Statistics take 16 bytes for every block_n logits of a token. No atomics: the same bits on every run.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpmp_kernels.kernels import gemm, tiles
from tpmp_kernels.kernels.cross_entropy import LOWEST, gradient_of, of_no_columns, put_statistics, with_columns
from tpmp_kernels.kernels.gemm import grouped, halves, own_tiles, product, put

# Rows, and column blocks of each at a time, of a program of combine_kernel.
COMBINE_BLOCK = (64, 16)
# Rows of d begin at multiples of so many elements, so that those who store and load them can do it 16 bytes at a time
# and by descriptors, whatever the number of classes.
PITCH = 16


@triton.jit(do_not_specialize=["m", "first"])
def logits_statistics_kernel(
    x, weight, target, parts,
    m, n, k, first,
    x_stride_m, x_stride_k, weight_stride_n, weight_stride_k,
    SOFTCAP: tl.constexpr,
    SHORTFALL: tl.constexpr,
    X_ROWS_ADJACENT: tl.constexpr,
    WEIGHT_ROWS_ADJACENT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PERSISTENT: tl.constexpr,
    FLATTEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """parts [column blocks, 4, m]: the statistics of each row of X @ W^T, of BLOCK_N columns each."""
    begin, end, step = own_tiles(tl.cdiv(m, BLOCK_M) * tl.cdiv(n, BLOCK_N), PERSISTENT)
    for index in tl.range(begin, end, step, flatten=FLATTEN):
        row_block, col_block = grouped(index, m, n, BLOCK_M, BLOCK_N, GROUP_M)
        first_row, first_col = row_block * BLOCK_M, col_block * BLOCK_N
        acc = product(
            x, weight, first_row, first_col, 0, k, m, n, k,
            x_stride_m, x_stride_k, weight_stride_n, weight_stride_k,
            X_ROWS_ADJACENT, WEIGHT_ROWS_ADJACENT, DESCRIPTORS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        rows = first_row + tl.arange(0, BLOCK_M)
        place, any_target = target_columns(target, rows, m, n, first, first_col, BLOCK_N)
        peak, others, target_logit, shortfall = of_no_columns(BLOCK_M)
        peak, others, target_logit, shortfall = take_in(
            acc, place, any_target, first_col, first_col, n, peak, others, target_logit, shortfall,
            SOFTCAP, SHORTFALL, BLOCK_M, BLOCK_N, PART,
        )  # fmt: skip
        own = parts + col_block.to(tl.int64) * 4 * m
        put_statistics(own, peak, others, target_logit, shortfall, rows, m)


@triton.jit
def target_columns(target, rows, m, n, first, first_col, BLOCK_N: tl.constexpr):
    """(the column of each row's target, in 32 bits, or -1 where it is none of n, whether any is in the block).

    Most blocks have none: a branch around what looks for one is the faster way, and keeps a comparison for each
    logit out of the registers, which would spill.
    """
    place = tl.load(target + rows, mask=rows < m, other=0) - tl.cast(first, tl.int64)
    place = tl.where((place >= 0) & (place < n), place, -1).to(tl.int32)
    inside = (place >= first_col) & (place < first_col + BLOCK_N)
    return place, tl.max(inside.to(tl.int32), axis=0) > 0


@triton.jit
def take_in(
    acc, place, any_target, first_col, block_col, n, peak, others, target_logit, shortfall,
    SOFTCAP: tl.constexpr, SHORTFALL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """The statistics of the columns from block_col on, and of acc's from first_col on, PART of them at a time."""
    if BLOCK_N > PART:
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        peak, others, target_logit, shortfall = take_in(
            left, place, any_target, first_col, block_col, n, peak, others, target_logit, shortfall,
            SOFTCAP, SHORTFALL, BLOCK_M, BLOCK_N // 2, PART,
        )  # fmt: skip
        peak, others, target_logit, shortfall = take_in(
            right, place, any_target, first_col + BLOCK_N // 2, block_col, n, peak, others, target_logit, shortfall,
            SOFTCAP, SHORTFALL, BLOCK_M, BLOCK_N // 2, PART,
        )  # fmt: skip
    else:
        cols = first_col + tl.arange(0, BLOCK_N)[None, :]
        peak, others, target_logit, shortfall = with_columns(
            peak, others, target_logit, shortfall, first_col - block_col, acc, cols < n, cols == place[:, None],
            any_target, SOFTCAP, SHORTFALL,
        )  # fmt: skip
    return peak, others, target_logit, shortfall


@triton.jit(do_not_specialize=["m", "n"])
def combine_kernel(
    parts, found, m, n,
    WIDTH: tl.constexpr, SHORTFALL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """found [4, m]: of all n columns, from parts [cdiv(n, WIDTH), 4, m] of WIDTH columns each but for the last."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_of, blocks = tl.cast(m, tl.int64), tl.cdiv(n, WIDTH)
    peak, others, target_logit, shortfall = of_no_columns(BLOCK_M)
    for start in range(0, blocks, BLOCK_N):
        block = start + tl.arange(0, BLOCK_N)
        mask = (rows < m)[:, None] & (block < blocks)[None, :]
        part = parts + block.to(tl.int64)[None, :] * 4 * rows_of + rows[:, None]
        peaks = tl.load(part, mask=mask, other=LOWEST)
        higher = tl.maximum(peak, tl.max(peaks, axis=1))
        behind = higher[:, None] - peaks
        rescaled = tl.load(part + rows_of, mask=mask, other=0.0) * tl.exp(-behind)
        others = others * tl.exp(peak - higher) + tl.sum(rescaled, axis=1)
        target_logit += tl.sum(tl.load(part + 2 * rows_of, mask=mask, other=0.0), axis=1)
        if SHORTFALL:
            # As in with_columns: before the first column, and in no column, nothing rises.
            shortfall += start * WIDTH * tl.where(start > 0, higher - peak, 0.0)
            own = tl.load(part + 3 * rows_of, mask=mask, other=0.0) + tl.minimum(n - block * WIDTH, WIDTH) * behind
            shortfall += tl.sum(tl.where(mask, own, 0.0), axis=1)
        peak = higher
    put_statistics(found, peak, others, target_logit, shortfall, rows, m)


@triton.jit(do_not_specialize=["m", "first"])
def logits_gradient_kernel(
    x, weight, d, target, peak, scale, target_scale, truth, shift,
    m, n, k, first, d_columns,
    x_stride_m, x_stride_k, weight_stride_n, weight_stride_k,
    SOFTCAP: tl.constexpr,
    X_ROWS_ADJACENT: tl.constexpr,
    WEIGHT_ROWS_ADJACENT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    STORE_DESCRIPTORS: tl.constexpr,
    PERSISTENT: tl.constexpr,
    FLATTEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    begin, end, step = own_tiles(tl.cdiv(m, BLOCK_M) * tl.cdiv(n, BLOCK_N), PERSISTENT)
    for index in tl.range(begin, end, step, flatten=FLATTEN):
        row_block, col_block = grouped(index, m, n, BLOCK_M, BLOCK_N, GROUP_M)
        first_row, first_col = row_block * BLOCK_M, col_block * BLOCK_N
        acc = product(
            x, weight, first_row, first_col, 0, k, m, n, k,
            x_stride_m, x_stride_k, weight_stride_n, weight_stride_k,
            X_ROWS_ADJACENT, WEIGHT_ROWS_ADJACENT, DESCRIPTORS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        rows = first_row + tl.arange(0, BLOCK_M)
        place, any_target = target_columns(target, rows, m, n, first, first_col, BLOCK_N)
        put_gradient(
            acc, d, place, any_target, peak, scale, target_scale, truth, shift, m, d_columns, first_row, first_col,
            SOFTCAP, STORE_DESCRIPTORS, BLOCK_M, BLOCK_N, PART,
        )  # fmt: skip


@triton.jit
def put_gradient(
    acc, d, place, any_target, peak, scale, target_scale, truth, shift, m, d_columns, first_row, first_col,
    SOFTCAP: tl.constexpr, STORE_DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """d of the logits in acc, PART columns at a time, rounded once and stored; past n any numbers."""
    if BLOCK_N > PART:
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        put_gradient(
            left, d, place, any_target, peak, scale, target_scale, truth, shift, m, d_columns, first_row, first_col,
            SOFTCAP, STORE_DESCRIPTORS, BLOCK_M, BLOCK_N // 2, PART,
        )  # fmt: skip
        put_gradient(
            right, d, place, any_target, peak, scale, target_scale, truth, shift, m, d_columns, first_row,
            first_col + BLOCK_N // 2, SOFTCAP, STORE_DESCRIPTORS, BLOCK_M, BLOCK_N // 2, PART,
        )  # fmt: skip
    else:
        rows = first_row + tl.arange(0, BLOCK_M)
        is_target = first_col + tl.arange(0, BLOCK_N)[None, :] == place[:, None]
        value = gradient_of(acc, is_target, any_target, peak, scale, target_scale, truth, shift, rows, m, SOFTCAP)
        put(d, value, first_row, first_col, m, d_columns, STORE_DESCRIPTORS)


def statistics(
    x: Tensor, weight: Tensor, target: Tensor, first: int, softcap: float | None, *, shortfall: bool
) -> Tensor:
    """cross_entropy.statistics of the logits x @ weight^T of the ids first .. first + N - 1: [4, M] in fp32.

    x [M, K], weight [N, K] of one dtype (bf16, fp16, fp32), any strides; target [M] int64. The logits are fp32.
    """
    (m, _), n = x.shape, weight.shape[0]
    found = torch.empty(4, m, dtype=torch.float32, device=x.device)
    if m == 0 or n == 0:
        found.zero_()[0] = LOWEST.value
        return found
    tile = gemm.own_tile("logits", x, weight, epilogue=epilogue(softcap, shortfall))
    parts = found.new_empty(triton.cdiv(n, tile.block_n), 4, m)
    named = statistics_arguments(x, weight, target.contiguous(), parts, first, softcap, shortfall, tile)
    gemm.launch(logits_statistics_kernel, named, tile, x.device)
    with gemm.on(x.device):
        named = combine_arguments(parts, found, n, shortfall, tile)
        combine_kernel[(triton.cdiv(m, named["BLOCK_M"]),)](**named, num_warps=4, enable_fp_fusion=True)
    return found


def gradient(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    first: int,
    peak: Tensor,
    scale: Tensor,
    target_scale: Tensor,
    truth: Tensor,
    shift: Tensor | None,
    *,
    softcap: float | None,
) -> Tensor:
    """cross_entropy.gradient of the logits x @ weight^T: d [M, N] in x's dtype, rounded once, its rows PITCH apart.

    x, weight, target, first as in `statistics`; peak, scale, target_scale, truth and shift [M], fp32 and contiguous.
    """
    n = weight.shape[0]
    d = x.new_empty(x.shape[0], triton.cdiv(n, PITCH) * PITCH)
    if d.numel() > 0:
        tile = gemm.own_tile("logits_d", x, weight, epilogue=epilogue(softcap, shift is not None))
        named = gradient_arguments(
            x, weight, d, target.contiguous(), first, peak, scale, target_scale, truth, shift, softcap, tile
        )
        gemm.launch(logits_gradient_kernel, named, tile, x.device)
    return d[:, :n]


def epilogue(softcap: float | None, smoothed: bool) -> tiles.Epilogue:
    """As the tables name it: the shortfall in a forward, the shift in a backward, are a residual."""
    return tiles.Epilogue(None if softcap is None else "softcap", residual=smoothed)


def statistics_arguments(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    parts: Tensor,
    first: int,
    softcap: float | None,
    shortfall: bool,
    tile: tiles.Tile,
) -> dict[str, Any]:
    """Every argument of `logits_statistics_kernel` by name, as a launch passes them and as aot.compile takes them."""
    return gemm.operands(x, weight, tile) | {
        "target": target, "parts": parts, "first": first,
        "SOFTCAP": softcap, "SHORTFALL": shortfall, "PART": tile.part,
    }  # fmt: skip


def combine_arguments(parts: Tensor, found: Tensor, n: int, shortfall: bool, tile: tiles.Tile) -> dict[str, Any]:
    """Every argument of `combine_kernel` by name."""
    return {
        "parts": parts, "found": found, "m": found.shape[1], "n": n, "WIDTH": tile.block_n, "SHORTFALL": shortfall,
        "BLOCK_M": COMBINE_BLOCK[0], "BLOCK_N": COMBINE_BLOCK[1],
    }  # fmt: skip


def gradient_arguments(
    x: Tensor,
    weight: Tensor,
    d: Tensor,
    target: Tensor,
    first: int,
    peak: Tensor,
    scale: Tensor,
    target_scale: Tensor,
    truth: Tensor,
    shift: Tensor | None,
    softcap: float | None,
    tile: tiles.Tile,
) -> dict[str, Any]:
    """Every argument of `logits_gradient_kernel` by name; d [M, N or a few columns more], contiguous."""
    return gemm.operands(x, weight, tile) | gemm.results(tile, d=d) | {
        "d_columns": d.shape[1], "target": target, "first": first, "peak": peak, "scale": scale,
        "target_scale": target_scale, "truth": truth, "shift": shift, "SOFTCAP": softcap,
    }  # fmt: skip
