"""A product added to an fp32 accumulator in the epilogue: read, add, write. The weight gradient dW += dZ^T @ X.

Without atomics, the same bits on every run. Where the result has too few tiles to fill the chip, K (of a weight
gradient the tokens) is split: each part writes its own product, and a second kernel adds them in order.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from tpmp_kernels.kernels import gemm, tiles
from tpmp_kernels.kernels.gemm import grouped, own_tiles, product
from tpmp_kernels.kernels.linear import finish

ADD_BLOCK = 1024


# Here the token count is k.
@triton.jit(do_not_specialize=["k", "depth"])
def wgrad_kernel(
    x, weight, out,
    m, n, k, splits, depth,
    x_stride_m, x_stride_k, weight_stride_n, weight_stride_k,
    ADD: tl.constexpr,
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
    """out [splits, m, n] = X @ W^T over `depth` elements of K each, or with ADD (one split) added to out."""
    tiles = tl.cdiv(m, BLOCK_M) * tl.cdiv(n, BLOCK_N)
    first, last, step = own_tiles(tiles * splits, PERSISTENT)
    for index in tl.range(first, last, step, flatten=FLATTEN):
        split = index // tiles
        row_block, col_block = grouped(index % tiles, m, n, BLOCK_M, BLOCK_N, GROUP_M)
        first_row, first_col = row_block * BLOCK_M, col_block * BLOCK_N
        acc = product(
            x, weight, first_row, first_col, split * depth, depth, m, n, k,
            x_stride_m, x_stride_k, weight_stride_n, weight_stride_k,
            X_ROWS_ADJACENT, WEIGHT_ROWS_ADJACENT, DESCRIPTORS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        own = out + split.to(tl.int64) * m * n
        finish(
            acc, None, own if ADD else None, own, None, m, n, n, 1, first_row, first_col,
            None, False, BLOCK_M, BLOCK_N, PART,
        )  # fmt: skip


@triton.jit(do_not_specialize=["splits"])
def add_up_kernel(parts, out, size, splits, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """out [size] = parts [splits, size] summed over the splits in order, or with ADD out += that."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    total = tl.load(parts + at, mask=mask, other=0.0)
    for split in range(1, splits):
        total += tl.load(parts + tl.cast(split, tl.int64) * size + at, mask=mask, other=0.0)
    if ADD:
        total += tl.load(out + at, mask=mask, other=0.0)
    tl.store(out + at, total, mask=mask)


def wgrad(dz: Tensor, x: Tensor, main_grad: Tensor, *, add: bool) -> None:
    """main_grad += dz^T @ x, or main_grad = dz^T @ x unless `add`.

    dz [M, N], x [M, K] of one dtype (bf16, fp16, fp32), any strides; main_grad [N, K] fp32, contiguous.
    """
    accumulate(dz.t(), x.t(), main_grad, add=add)


def accumulate(x: Tensor, weight: Tensor, out: Tensor, *, add: bool) -> None:
    """out += x @ weight^T, or out = x @ weight^T unless `add`.

    x [M, K], weight [N, K] of one dtype (bf16, fp16, fp32), any strides; out [M, N] fp32, contiguous.
    """
    if out.numel() == 0:
        return
    tile = gemm.choose("wgrad", x, weight, epilogue=tiles.Epilogue(residual=add))
    splits = tiles.splits(*out.shape, x.shape[1], tile, gemm.chip(x.device)[1])
    if splits == 1:
        gemm.launch(wgrad_kernel, arguments(x, weight, out, add, tile), tile, x.device)
        return
    parts = out.new_empty(splits, *out.shape)
    gemm.launch(wgrad_kernel, arguments(x, weight, parts, False, tile, splits), tile, x.device, splits=splits)
    with gemm.on(x.device):
        add_up_kernel[(triton.cdiv(out.numel(), ADD_BLOCK),)](parts, out, out.numel(), splits, add, ADD_BLOCK)


def arguments(x: Tensor, weight: Tensor, out: Tensor, add: bool, tile: tiles.Tile, splits: int = 1) -> dict[str, Any]:
    """Every argument of `wgrad_kernel` by name, as a launch passes them and as aot.compile takes them."""
    steps = triton.cdiv(x.shape[1], tile.block_k)
    return gemm.operands(x, weight, tile) | {
        "out": out, "ADD": add,
        "splits": splits, "depth": triton.cdiv(steps, splits) * tile.block_k,
        "PART": tile.part // 2 if out.shape[-1] % 4 == 0 else gemm.RAGGED_PART,
    }  # fmt: skip
