"""The weight gradient dW = dZ^T @ X, added to an fp32 accumulator in the epilogue: read, add, write.

The sum over tokens is one loop in one program, so the result is the same bits on every run.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from tpmp_kernels.kernels import gemm, tiles
from tpmp_kernels.kernels.gemm import grouped, product
from tpmp_kernels.kernels.linear import finish_in_parts


# Here the token count is k.
@triton.jit(do_not_specialize=["k"])
def wgrad_kernel(
    x, weight, main_grad,
    m, n, k,
    x_stride_m, x_stride_k, weight_stride_n, weight_stride_k,
    ADD: tl.constexpr,
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
        acc, None, main_grad if ADD else None, main_grad, None, m, n, n, 1, rows, col_block * BLOCK_N,
        None, BLOCK_M, BLOCK_N, PART,
    )  # fmt: skip


def wgrad(dz: Tensor, x: Tensor, main_grad: Tensor, *, add: bool) -> None:
    """main_grad += dz^T @ x, or main_grad = dz^T @ x unless `add`.

    dz [M, N], x [M, K] of one dtype (bf16, fp16, fp32), any strides; main_grad [N, K] fp32, contiguous.
    """
    if main_grad.numel() == 0:
        return
    tile = gemm.choose("wgrad", dz.t(), x.t(), tiles.Epilogue(residual=add))
    gemm.launch(wgrad_kernel, arguments(dz, x, main_grad, add, tile), tile)


def arguments(dz: Tensor, x: Tensor, main_grad: Tensor, add: bool, tile: tiles.Tile) -> dict[str, Any]:
    """Every argument of `wgrad_kernel` by name, as a launch passes them and as aot.compile takes them."""
    return gemm.operands(dz.t(), x.t(), tile) | {"main_grad": main_grad, "ADD": add}
