"""One GEMM with its neighbours in the epilogue: Y = act(X @ W^T + bias) + residual, W [N, K], fp32 accumulation.

Both operands of the dot come straight from memory. Any work between load and dot would feed WGMMA its A operand
from registers, which is slow and which several ptxas versions miscompile.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpmp_kernels.kernels import tiles
from tpmp_kernels.kernels.activations import activate

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


# The token count is not specialised: divisibility of m helps no load, and each kind would be one more compilation.
@triton.jit(do_not_specialize=["m"])
def linear_kernel(
    x, weight, bias, residual, y, preact,
    m, n, k,
    x_stride_m, x_stride_k, weight_stride_n, weight_stride_k, residual_stride_m, residual_stride_n,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    row_block, col_block = _grouped(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP_M)
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = col_block * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    # Rows and columns past the end read row and column 0 and are never stored: the loop masks along K alone.
    x_rows = tl.where(rows < m, rows, 0).to(tl.int64)
    weight_rows = tl.where(cols < n, cols, 0).to(tl.int64)
    x_tile = x + x_rows[:, None] * x_stride_m + inner.to(tl.int64)[None, :] * x_stride_k
    weight_tile = weight + weight_rows[None, :] * weight_stride_n + inner.to(tl.int64)[:, None] * weight_stride_k
    x_step = tl.cast(x_stride_k, tl.int64) * BLOCK_K
    weight_step = tl.cast(weight_stride_k, tl.int64) * BLOCK_K

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        a = tl.load(x_tile, mask=inner[None, :] < k - start, other=0.0)
        b = tl.load(weight_tile, mask=inner[:, None] < k - start, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        x_tile += x_step
        weight_tile += weight_step

    _finish_in_parts(
        acc, bias, residual, y, preact, m, n, residual_stride_m, residual_stride_n, rows, col_block * BLOCK_N,
        ACTIVATION, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def _finish_in_parts(
    acc, bias, residual, y, preact, m, n, residual_stride_m, residual_stride_n, rows, first_col,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The epilogue on 64 columns at a time: a whole 128 x 256 accumulator beside its operands spills registers."""
    if BLOCK_N > 64:
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        _finish_in_parts(
            left, bias, residual, y, preact, m, n, residual_stride_m, residual_stride_n, rows, first_col,
            ACTIVATION, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip
        _finish_in_parts(
            right, bias, residual, y, preact, m, n, residual_stride_m, residual_stride_n, rows,
            first_col + BLOCK_N // 2, ACTIVATION, BLOCK_M, BLOCK_N // 2,
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
    acc = activate(acc, ACTIVATION)
    if residual is not None:
        residual_tile = residual + rows * residual_stride_m + cols * residual_stride_n
        acc += tl.load(residual_tile, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + rows * n + cols, acc.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _grouped(pid, row_blocks, col_blocks, GROUP_M: tl.constexpr):
    """Program -> (row block, column block): GROUP_M row blocks at a time, so that they share W's tiles in L2."""
    in_group = GROUP_M * col_blocks
    first = pid // in_group * GROUP_M
    height = tl.minimum(row_blocks - first, GROUP_M)
    return first + pid % in_group % height, pid % in_group // height


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    store_preact: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(act(x @ weight^T + bias) + residual, z) with z = x @ weight^T + bias if `store_preact`, else None.

    x [M, K], weight [N, K], bias [N], residual [M, N], of one dtype (bf16, fp16, fp32), any strides. Returns new
    contiguous tensors. fp32 is multiplied in IEEE arithmetic, not TF32.
    """
    (m, k), n = x.shape, weight.shape[0]
    if x.dtype not in DTYPES:
        raise TypeError(f"kernels.linear: dtype must be bf16, fp16 or fp32, got {x.dtype}; use ops.linear")
    y = x.new_empty(m, n)
    preact = x.new_empty(m, n) if store_preact else None
    if m == 0 or n == 0:
        return y, preact
    epilogue = tiles.Epilogue(activation, bias is not None, residual is not None, store_preact)
    tile = tiles.tile(
        m, n, k, DTYPES[x.dtype], **_device(x.device), epilogue=epilogue, triton_version=triton.__version__
    )
    launch(linear_kernel, arguments(x, weight, bias, residual, y, preact, activation, tile), tile)
    return y, preact


def arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    preact: Tensor | None,
    activation: str | None,
    tile: tiles.Tile,
) -> dict[str, Any]:
    """Every argument of `linear_kernel` by name, as a launch passes them and as aot.compile takes them."""
    residual_strides = (0, 0) if residual is None else residual.stride()
    return {
        "x": x, "weight": weight, "bias": None if bias is None else bias.contiguous(),
        "residual": residual, "y": y, "preact": preact,
        "m": x.shape[0], "n": weight.shape[0], "k": x.shape[1],
        "x_stride_m": x.stride(0), "x_stride_k": x.stride(1),
        "weight_stride_n": weight.stride(0), "weight_stride_k": weight.stride(1),
        "residual_stride_m": residual_strides[0], "residual_stride_n": residual_strides[1],
        "ACTIVATION": activation,
        "PRECISION": "ieee" if x.dtype is torch.float32 else "tf32",
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP_M": tile.group_m,
    }  # fmt: skip


def launch(kernel: Callable, named: dict[str, Any], tile: tiles.Tile) -> None:
    """Run one program for each tile of Y on the current stream of x's device."""
    programs = triton.cdiv(named["m"], tile.block_m) * triton.cdiv(named["n"], tile.block_n)
    with torch.cuda.device_of(named["x"]):
        kernel[(programs,)](**named, num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True)


@lru_cache
def _device(device: torch.device) -> dict[str, int]:
    """Architecture and multiprocessor count; a CPU tensor (Triton's interpreter) counts as one H100."""
    if device.type != "cuda":
        return {"arch": 90, "sms": 132}
    properties = torch.cuda.get_device_properties(device)
    return {"arch": properties.major * 10 + properties.minor, "sms": properties.multi_processor_count}
