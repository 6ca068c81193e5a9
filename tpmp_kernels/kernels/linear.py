"""One GEMM with its neighbours in the epilogue: Y = act(X @ W^T + bias) + residual, W [N, K], fp32 accumulation."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpmp_kernels.kernels import gemm, tiles
from tpmp_kernels.kernels.activations import activate
from tpmp_kernels.kernels.gemm import grouped, halves, product


# The token count is not specialised: divisibility of m helps no load, and each kind would be one more compilation.
@triton.jit(do_not_specialize=["m"])
def linear_kernel(
    x, weight, bias, residual, y, preact,
    m, n, k,
    x_stride_m, x_stride_k, weight_stride_n, weight_stride_k, residual_stride_m, residual_stride_n,
    ACTIVATION: tl.constexpr,
    X_ROWS_ADJACENT: tl.constexpr,
    WEIGHT_ROWS_ADJACENT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    row_block, col_block = grouped(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP_M)
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = product(
        x, weight, rows, col_block * BLOCK_N + tl.arange(0, BLOCK_N), m, n, k,
        x_stride_m, x_stride_k, weight_stride_n, weight_stride_k,
        X_ROWS_ADJACENT, WEIGHT_ROWS_ADJACENT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    finish_in_parts(
        acc, bias, residual, y, preact, m, n, residual_stride_m, residual_stride_n, rows, col_block * BLOCK_N,
        ACTIVATION, BLOCK_M, BLOCK_N, PART,
    )  # fmt: skip


@triton.jit
def finish_in_parts(
    acc, bias, residual, y, preact, m, n, residual_stride_m, residual_stride_n, rows, first_col,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    if BLOCK_N > PART:
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        finish_in_parts(
            left, bias, residual, y, preact, m, n, residual_stride_m, residual_stride_n, rows, first_col,
            ACTIVATION, BLOCK_M, BLOCK_N // 2, PART,
        )  # fmt: skip
        finish_in_parts(
            right, bias, residual, y, preact, m, n, residual_stride_m, residual_stride_n, rows,
            first_col + BLOCK_N // 2, ACTIVATION, BLOCK_M, BLOCK_N // 2, PART,
        )  # fmt: skip
    else:
        cols = first_col + tl.arange(0, BLOCK_N)
        _finish(acc, bias, residual, y, preact, m, n, residual_stride_m, residual_stride_n, rows, cols, ACTIVATION)


@triton.jit
def _finish(
    acc, bias, residual, y, preact, m, n, residual_stride_m, residual_stride_n, rows, cols, ACTIVATION: tl.constexpr
):
    """The epilogue in fp32 and its stores: bias, pre-activation, activation, residual, y."""
    mask = (rows < m)[:, None] & (cols < n)[None, :]
    rows = rows.to(tl.int64)[:, None]
    cols = cols.to(tl.int64)[None, :]
    if bias is not None:
        acc += tl.load(bias + cols, mask=cols < n, other=0.0).to(tl.float32)
    if preact is not None:
        tl.store(preact + rows * n + cols, acc.to(preact.dtype.element_ty), mask=mask)
    if y is not None:
        acc = activate(acc, ACTIVATION)
        if residual is not None:
            residual_tile = residual + rows * residual_stride_m + cols * residual_stride_n
            acc += tl.load(residual_tile, mask=mask, other=0.0).to(tl.float32)
        tl.store(y + rows * n + cols, acc.to(y.dtype.element_ty), mask=mask)


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
    y = x.new_empty(x.shape[0], weight.shape[0], dtype=out_dtype)
    z = torch.empty_like(y) if store_preact else None
    _run(x, weight, bias, residual, y, z, _epilogue(x, y, activation, bias, residual is not None, store_preact))
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
    z = x.new_empty(x.shape[0], weight.shape[0], dtype=out_dtype)
    _run(x, weight, bias, None, None, z, _epilogue(x, z, activation, bias, residual, True))
    return z


def _epilogue(
    x: Tensor, out: Tensor, activation: str | None, bias: Tensor | None, residual: bool, store_preact: bool
) -> tiles.Epilogue:
    return tiles.Epilogue(activation, bias is not None, residual, store_preact, wide=out.dtype != x.dtype)


def _run(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, y: Tensor | None, z: Tensor | None,
    epilogue: tiles.Epilogue,
) -> None:  # fmt: skip
    if x.shape[0] == 0 or weight.shape[0] == 0:
        return
    tile = gemm.choose("linear", x, weight, epilogue)
    gemm.launch(linear_kernel, arguments(x, weight, bias, residual, y, z, epilogue.activation, tile), tile)


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
    return gemm.operands(x, weight, tile) | {
        "bias": None if bias is None else bias.contiguous(),
        "residual": residual, "y": y, "preact": preact,
        "residual_stride_m": residual_strides[0], "residual_stride_n": residual_strides[1],
        "ACTIVATION": activation,
    }  # fmt: skip
