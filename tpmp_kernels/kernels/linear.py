"""One GEMM with its neighbours in the epilogue: Y = act(X @ W^T + bias) + residual, W [N, K], fp32 accumulation."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpmp_kernels.kernels import gemm, library, tiles
from tpmp_kernels.kernels.activations import activate
from tpmp_kernels.kernels.gemm import grouped, halves, own_tiles, product, put


# The token count is not specialised: divisibility of m helps no load, and each kind would be one more compilation.
@triton.jit(do_not_specialize=["m"])
def linear_kernel(
    x, weight, bias, residual, y, preact,
    m, n, k,
    x_stride_m, x_stride_k, weight_stride_n, weight_stride_k, residual_stride_m, residual_stride_n,
    ACTIVATION: tl.constexpr,
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
    first, last, step = own_tiles(tl.cdiv(m, BLOCK_M) * tl.cdiv(n, BLOCK_N), PERSISTENT)
    for index in tl.range(first, last, step, flatten=FLATTEN):
        row_block, col_block = grouped(index, m, n, BLOCK_M, BLOCK_N, GROUP_M)
        first_row, first_col = row_block * BLOCK_M, col_block * BLOCK_N
        acc = product(
            x, weight, first_row, first_col, 0, k, m, n, k,
            x_stride_m, x_stride_k, weight_stride_n, weight_stride_k,
            X_ROWS_ADJACENT, WEIGHT_ROWS_ADJACENT, DESCRIPTORS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        finish(
            acc, bias, residual, y, preact, m, n, residual_stride_m, residual_stride_n, first_row, first_col,
            ACTIVATION, STORE_DESCRIPTORS, BLOCK_M, BLOCK_N, PART,
        )  # fmt: skip


@triton.jit
def finish(
    acc, bias, residual, y, preact, m, n, residual_stride_m, residual_stride_n, first_row, first_col,
    ACTIVATION: tl.constexpr, STORE_DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """The epilogue in fp32 and its stores, PART columns at a time: bias, pre-activation, activation, residual, y."""
    if BLOCK_N > PART:
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        finish(
            left, bias, residual, y, preact, m, n, residual_stride_m, residual_stride_n, first_row, first_col,
            ACTIVATION, STORE_DESCRIPTORS, BLOCK_M, BLOCK_N // 2, PART,
        )  # fmt: skip
        finish(
            right, bias, residual, y, preact, m, n, residual_stride_m, residual_stride_n, first_row,
            first_col + BLOCK_N // 2, ACTIVATION, STORE_DESCRIPTORS, BLOCK_M, BLOCK_N // 2, PART,
        )  # fmt: skip
    else:
        if bias is not None:
            cols = first_col + tl.arange(0, BLOCK_N)[None, :]
            acc += tl.load(bias + cols, mask=cols < n, other=0.0).to(tl.float32)
        if preact is not None:
            put(preact, acc, first_row, first_col, m, n, STORE_DESCRIPTORS)
        if y is not None:
            acc = activate(acc, ACTIVATION)
            if residual is not None:
                rows = first_row + tl.arange(0, BLOCK_M)[:, None]
                cols = first_col + tl.arange(0, BLOCK_N)[None, :]
                place = rows.to(tl.int64) * residual_stride_m + cols.to(tl.int64) * residual_stride_n
                mask = (rows < m) & (cols < n)
                acc += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
            put(y, acc, first_row, first_col, m, n, STORE_DESCRIPTORS)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    store_preact: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(act(x @ weight^T + bias) + residual, z) with z = x @ weight^T + bias if `store_preact`, else None.

    x [M, K], weight [N, K], bias [N] of one dtype (bf16, fp16, fp32), residual [M, N] of that dtype or of out_dtype,
    any strides. Returns new contiguous tensors of out_dtype (x's by default, or fp32). fp32 is multiplied in IEEE
    arithmetic, not TF32.
    """
    epilogue = _epilogue(x, out_dtype, activation, bias, residual is not None, store_preact)
    tile = gemm.choose("linear", x, weight, epilogue=epilogue)
    if tile is None:
        return library.linear(x, weight, bias, residual, activation, store_preact)
    y = x.new_empty(x.shape[0], weight.shape[0], dtype=out_dtype)
    z = torch.empty_like(y) if store_preact else None
    _run(x, weight, bias, residual, y, z, activation, tile)
    return y, z


def preact(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str,
    residual: bool,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """z = x @ weight^T + bias alone, the bits that `linear` stored with that activation and residual: on its tile."""
    tile = gemm.choose("linear", x, weight, epilogue=_epilogue(x, out_dtype, activation, bias, residual, True))
    if tile is None:
        return library.linear(x, weight, bias, None, None, False)[0]
    z = x.new_empty(x.shape[0], weight.shape[0], dtype=out_dtype)
    _run(x, weight, bias, None, None, z, activation, tile)
    return z


def _epilogue(
    x: Tensor,
    out_dtype: torch.dtype | None,
    activation: str | None,
    bias: Tensor | None,
    residual: bool,
    store_preact: bool,
) -> tiles.Epilogue:
    wide = out_dtype not in (None, x.dtype)
    return tiles.Epilogue(activation, bias is not None, residual, store_preact, wide)


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor | None,
    z: Tensor | None,
    activation: str | None,
    tile: tiles.Tile,
) -> None:
    if x.shape[0] > 0 and weight.shape[0] > 0:
        gemm.launch(linear_kernel, arguments(x, weight, bias, residual, y, z, activation, tile), tile, x.device)


def arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor | None,
    preact: Tensor | None,
    activation: str | None,
    tile: tiles.Tile,
) -> dict[str, Any]:
    """Every argument of `linear_kernel` by name, as a launch passes them and as aot.compile takes them."""
    residual_strides = (0, 0) if residual is None else residual.stride()
    return gemm.operands(x, weight, tile) | gemm.results(tile, y=y, preact=preact) | {
        "bias": None if bias is None else bias.contiguous(),
        "residual": residual,
        "residual_stride_m": residual_strides[0], "residual_stride_n": residual_strides[1],
        "ACTIVATION": activation,
    }  # fmt: skip
