"""The pointwise part of a linear's backward in one pass: dZ = dY * act'(z), and the bias gradient beside it.

Each program also sums its rows in fp32; the partial sums of all row blocks are added by one torch.sum, so that the
bias gradient is the same bits on every run, which atomics would not give.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpmp_kernels.kernels.activations import derivative

BLOCK_M, BLOCK_N, WARPS = 64, 128, 8


@triton.jit(do_not_specialize=["m"])
def activation_grad_kernel(
    dy, preact, dz, partial,
    m, n,
    dy_stride_m, dy_stride_n,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    row_block = tl.program_id(1)
    rows = row_block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < m)[:, None] & (cols < n)[None, :]
    place = rows[:, None] * n + cols[None, :]
    upstream = dy + rows[:, None] * dy_stride_m + cols[None, :] * dy_stride_n
    z = tl.load(preact + place, mask=mask, other=0.0).to(tl.float32)
    # 0 outside the mask, so that rows past the end add nothing to the sums.
    grad = tl.load(upstream, mask=mask, other=0.0).to(tl.float32) * derivative(z, ACTIVATION)
    tl.store(dz + place, grad.to(dz.dtype.element_ty), mask=mask)
    if partial is not None:
        tl.store(partial + row_block.to(tl.int64) * n + cols, tl.sum(grad, axis=0), mask=cols < n)


def activation_grad(
    dy: Tensor, preact: Tensor, activation: str, *, bias: bool, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None]:
    """(dz, dbias): dy * act'(preact), and its sum over rows if `bias`, else None.

    dy [M, N] of any strides, preact [M, N] contiguous (bf16, fp16, fp32). Returns new contiguous tensors of `dtype`,
    dy's by default.
    """
    m, n = dy.shape
    dz = dy.new_empty(m, n, dtype=dtype)
    partial = dy.new_empty(triton.cdiv(m, BLOCK_M), n, dtype=torch.float32) if bias else None
    if m > 0 and n > 0:
        grid = (triton.cdiv(n, BLOCK_N), triton.cdiv(m, BLOCK_M))
        with torch.cuda.device_of(dy):
            named = arguments(dy, preact, dz, partial, activation)
            activation_grad_kernel[grid](**named, num_warps=WARPS, enable_fp_fusion=True)
    return dz, None if partial is None else partial.sum(0).to(dz.dtype)


def arguments(dy: Tensor, preact: Tensor, dz: Tensor, partial: Tensor | None, activation: str) -> dict:
    """Every argument of `activation_grad_kernel` by name, as a launch passes them and as aot.compile takes them."""
    return {
        "dy": dy, "preact": preact, "dz": dz, "partial": partial,
        "m": dy.shape[0], "n": dy.shape[1], "dy_stride_m": dy.stride(0), "dy_stride_n": dy.stride(1),
        "ACTIVATION": activation, "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N,
    }  # fmt: skip
