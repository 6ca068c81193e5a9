"""What the GEMM kernels share: the loop over K, the order of the tiles, the choice of a tile and the launch.

Both operands of a dot come straight from memory. Any work between load and dot would feed WGMMA its A operand from
registers, which is slow and which several ptxas versions miscompile.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpmp_kernels.kernels import tiles

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@triton.jit
def product(
    x, weight, rows, cols, m, n, k,
    x_stride_m, x_stride_k, weight_stride_n, weight_stride_k,
    X_ROWS_ADJACENT: tl.constexpr, WEIGHT_ROWS_ADJACENT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The tile (rows, cols) of X @ W^T in fp32, by steps of BLOCK_K."""
    inner = tl.arange(0, BLOCK_K)
    x_tile = x + offsets(rows, m, x_stride_m, X_ROWS_ADJACENT)[:, None]
    x_tile += inner.to(tl.int64)[None, :] * x_stride_k
    weight_tile = weight + offsets(cols, n, weight_stride_n, WEIGHT_ROWS_ADJACENT)[None, :]
    weight_tile += inner.to(tl.int64)[:, None] * weight_stride_k
    x_step = tl.cast(x_stride_k, tl.int64) * BLOCK_K
    weight_step = tl.cast(weight_stride_k, tl.int64) * BLOCK_K

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        x_mask = within(inner[None, :], k - start, rows[:, None], m, X_ROWS_ADJACENT)
        weight_mask = within(inner[:, None], k - start, cols[None, :], n, WEIGHT_ROWS_ADJACENT)
        a = tl.load(x_tile, mask=x_mask, other=0.0)
        b = tl.load(weight_tile, mask=weight_mask, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        x_tile += x_step
        weight_tile += weight_step
    return acc


@triton.jit
def offsets(rows, limit, stride, ADJACENT: tl.constexpr):
    """Where rows of an operand begin. Rows past the end become row 0, so that the loop masks along K alone.

    Adjacent rows (a transposed operand) are left for `within` to mask: with row 0 among them, the compiler could not
    see that they lie side by side, and would load them one by one.
    """
    if not ADJACENT:
        rows = tl.where(rows < limit, rows, 0)
    return rows.to(tl.int64) * stride


@triton.jit
def within(inner, left, rows, limit, ADJACENT: tl.constexpr):
    """The mask of an operand's tile: along K, and along its rows where `offsets` left those past the end."""
    mask = inner < left
    if ADJACENT:
        mask = mask & (rows < limit)
    return mask


@triton.jit
def grouped(pid, row_blocks, col_blocks, GROUP_M: tl.constexpr):
    """Program -> (row block, column block): GROUP_M row blocks at a time, so that they share W's tiles in L2."""
    in_group = GROUP_M * col_blocks
    first = pid // in_group * GROUP_M
    height = tl.minimum(row_blocks - first, GROUP_M)
    return first + pid % in_group % height, pid % in_group // height


@triton.jit
def halves(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of a [BLOCK_M, BLOCK_N] accumulator.

    Every epilogue works on PART columns at a time: a whole 128 x 256 accumulator beside its operands spills registers,
    and where rows of the result are not aligned to 16 bytes each element takes an address of its own.
    """
    return tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


def operands(x: Tensor, weight: Tensor, tile: tiles.Tile) -> dict[str, Any]:
    """The arguments of X [M, K] @ W^T, W [N, K], that every kernel takes by these names."""
    return {
        "x": x, "weight": weight,
        "m": x.shape[0], "n": weight.shape[0], "k": x.shape[1],
        "x_stride_m": x.stride(0), "x_stride_k": x.stride(1),
        "weight_stride_n": weight.stride(0), "weight_stride_k": weight.stride(1),
        "X_ROWS_ADJACENT": rows_adjacent(x), "WEIGHT_ROWS_ADJACENT": rows_adjacent(weight),
        "PRECISION": "ieee" if x.dtype is torch.float32 else "tf32",
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP_M": tile.group_m,
        "PART": 64 if weight.shape[0] * x.element_size() % 16 == 0 else 8,
    }  # fmt: skip


def rows_adjacent(operand: Tensor) -> bool:
    return operand.stride(0) == 1 and operand.stride(1) != 1


def choose(operation: str, x: Tensor, weight: Tensor, epilogue: tiles.Epilogue) -> tiles.Tile:
    """The tile for X [M, K] @ W^T on x's device. TypeError for a dtype that no kernel takes."""
    if x.dtype not in DTYPES:
        raise TypeError(f"kernels.{operation}: dtype must be bf16, fp16 or fp32, got {x.dtype}; use ops.{operation}")
    (m, k), n = x.shape, weight.shape[0]
    return tiles.tile(
        operation, m, n, k, DTYPES[x.dtype], **_device(x.device), epilogue=epilogue, triton_version=triton.__version__
    )


def launch(kernel: Callable, named: dict[str, Any], tile: tiles.Tile) -> None:
    """Run one program for each tile of the result on the current stream of x's device."""
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
