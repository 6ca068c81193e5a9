"""What the GEMM kernels share: the loop over K, the order of the tiles, the stores, the choice of a tile, the launch.

Each kernel is one persistent loop over the tiles of the result: `product`, then its own epilogue on a few columns at a
time. Operands come by TMA descriptors where their strides allow it, else by pointers; both straight from memory into
the dot. Any work between load and dot would feed WGMMA its A operand from registers, which is slow and which several
ptxas versions miscompile.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tpmp_kernels.kernels import dispatch, tiles
from tpmp_kernels.kernels.layout import aligned, rows_adjacent

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# Columns of an epilogue at a time where rows of the result are not aligned to 16 bytes: each element then takes an
# address of its own, and more of them would spill.
RAGGED_PART = 8


@triton.jit
def product(
    x, weight, first_row, first_col, first_k, depth, m, n, k,
    x_stride_m, x_stride_k, weight_stride_n, weight_stride_k,
    X_ROWS_ADJACENT: tl.constexpr, WEIGHT_ROWS_ADJACENT: tl.constexpr, DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The tile at (first_row, first_col) of X @ W^T in fp32, over `depth` elements of K from first_k on."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if DESCRIPTORS:
        for start in range(0, depth, BLOCK_K):
            a = described(x, first_row, first_k + start, X_ROWS_ADJACENT)
            b = described(weight, first_col, first_k + start, WEIGHT_ROWS_ADJACENT)
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    else:
        inner = first_k + tl.arange(0, BLOCK_K)
        rows, cols = first_row + tl.arange(0, BLOCK_M), first_col + tl.arange(0, BLOCK_N)
        x_tile = x + offsets(rows, m, x_stride_m, X_ROWS_ADJACENT)[:, None]
        x_tile += inner.to(tl.int64)[None, :] * x_stride_k
        weight_tile = weight + offsets(cols, n, weight_stride_n, WEIGHT_ROWS_ADJACENT)[None, :]
        weight_tile += inner.to(tl.int64)[:, None] * weight_stride_k
        x_step = tl.cast(x_stride_k, tl.int64) * BLOCK_K
        weight_step = tl.cast(weight_stride_k, tl.int64) * BLOCK_K
        for start in range(0, depth, BLOCK_K):
            x_mask = within(inner[None, :], k - start, rows[:, None], m, X_ROWS_ADJACENT)
            weight_mask = within(inner[:, None], k - start, cols[None, :], n, WEIGHT_ROWS_ADJACENT)
            a = tl.load(x_tile, mask=x_mask, other=0.0)
            b = tl.load(weight_tile, mask=weight_mask, other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
            x_tile += x_step
            weight_tile += weight_step
    return acc


@triton.jit
def described(operand, first_row, first_k, ROWS_ADJACENT: tl.constexpr):
    """[rows, K] of an operand by its descriptor, which covers the memory as it lies; zero past the ends."""
    return operand.load([first_k, first_row]).T if ROWS_ADJACENT else operand.load([first_row, first_k])


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
def grouped(index, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Tile number -> (row block, column block): GROUP_M row blocks at a time, so that they share W's tiles in L2."""
    row_blocks = tl.cdiv(m, BLOCK_M)
    in_group = GROUP_M * tl.cdiv(n, BLOCK_N)
    first = index // in_group * GROUP_M
    height = tl.minimum(row_blocks - first, GROUP_M)
    return first + index % in_group % height, index % in_group // height


@triton.jit
def own_tiles(tiles, PERSISTENT: tl.constexpr):
    """(first, last, step) of the tiles that this program computes: every so many-th, or one, without a loop."""
    first = tl.program_id(0)
    return first, tiles if PERSISTENT else first + 1, tl.num_programs(0) if PERSISTENT else 1


@triton.jit
def halves(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of a [BLOCK_M, BLOCK_N] accumulator.

    Every epilogue works on PART columns at a time: a whole 128 x 256 accumulator beside its operands spills registers.
    """
    return tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def put(out, value, first_row, first_col, m, n, STORE_DESCRIPTORS: tl.constexpr):
    """Store a block of the contiguous result [m, n] at (first_row, first_col), rounded to its dtype; not past its ends.

    By a descriptor it leaves through shared memory while the program goes on.
    """
    if STORE_DESCRIPTORS:
        out.store([first_row, first_col], value.to(out.dtype))
    else:
        place, mask = positions(first_row, first_col, m, n, value.shape[0], value.shape[1])
        tl.store(out + place, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def positions(first_row, first_col, m, n, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(offsets, mask) of a block of a contiguous [m, n]."""
    rows = first_row + tl.arange(0, ROWS)[:, None]
    cols = first_col + tl.arange(0, COLS)[None, :]
    return rows.to(tl.int64) * n + cols.to(tl.int64), (rows < m) & (cols < n)


def operands(x: Tensor, weight: Tensor, tile: tiles.Tile) -> dict[str, Any]:
    """The arguments of X [M, K] @ W^T, W [N, K], that every kernel takes by these names."""
    return {
        "x": operand(x, tile.block_m, tile), "weight": operand(weight, tile.block_n, tile),
        "m": x.shape[0], "n": weight.shape[0], "k": x.shape[1],
        "x_stride_m": x.stride(0), "x_stride_k": x.stride(1),
        "weight_stride_n": weight.stride(0), "weight_stride_k": weight.stride(1),
        "X_ROWS_ADJACENT": rows_adjacent(x), "WEIGHT_ROWS_ADJACENT": rows_adjacent(weight),
        "DESCRIPTORS": tile.loads == "descriptors", "PERSISTENT": tile.persistent, "FLATTEN": tile.flatten,
        "PRECISION": "ieee" if x.dtype is torch.float32 else "tf32",
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP_M": tile.group_m,
    }  # fmt: skip


def operand(x: Tensor, block_rows: int, tile: tiles.Tile) -> Tensor | TensorDescriptor:
    """x [rows, K] as a kernel takes it: itself, or a descriptor of its memory."""
    if tile.loads != "descriptors":
        return x
    if rows_adjacent(x):
        return TensorDescriptor.from_tensor(x.t(), [tile.block_k, block_rows])
    return TensorDescriptor.from_tensor(x, [block_rows, tile.block_k])


def results(tile: tiles.Tile, **named: Tensor | None) -> dict[str, Any]:
    """Contiguous results [M, N] of one dtype as a kernel stores them, each by its name, and how many columns at a time.

    By descriptors where the tile has them and rows are aligned to 16 bytes.
    """
    outs = [each for each in named.values() if each is not None]
    descriptors = tile.loads == "descriptors" and not _ragged(*outs)
    columns = part(tile, *outs)
    block = [tile.block_m, min(columns, tile.block_n)]
    for name, each in named.items():
        if descriptors and each is not None:
            named[name] = TensorDescriptor.from_tensor(each, block)
    return {**named, "STORE_DESCRIPTORS": descriptors, "PART": columns}


def part(tile: tiles.Tile, *outs: Tensor) -> int:
    """How many columns of contiguous results an epilogue works on at a time: the same bytes in fp32, since a part
    passes through shared memory."""
    return RAGGED_PART if _ragged(*outs) else tile.part * 2 // outs[0].element_size()


def _ragged(*outs: Tensor) -> bool:
    """Whether rows of some contiguous result are not aligned to 16 bytes."""
    return any(each.shape[1] * each.element_size() % 16 != 0 or each.data_ptr() % 16 != 0 for each in outs)


def choose(operation: str, x: Tensor, *weights: Tensor, epilogue: tiles.Epilogue) -> tiles.Tile | None:
    """The tile for X [M, K] @ W^T on x's device, or None where torch's GEMM is the better choice: see dispatch.py."""
    if not x.is_cuda:
        return own_tile(operation, x, *weights, epilogue=epilogue)
    return dispatch.choose(operation, **_problem(operation, x, weights), epilogue=epilogue).tile


def own_tile(
    operation: str, x: Tensor, *weights: Tensor, epilogue: tiles.Epilogue, reserved_sms: int = 0
) -> tiles.Tile:
    """The tile of our kernel, whatever torch's GEMM might do. TypeError for a dtype that no kernel takes."""
    problem = _problem(operation, x, weights)
    problem["sms"] -= reserved_sms
    return tiles.tile(operation, **problem, epilogue=epilogue)


def _problem(operation: str, x: Tensor, weights: tuple[Tensor, ...]) -> dict[str, Any]:
    if x.dtype not in DTYPES:
        raise TypeError(f"kernels.{operation}: dtype must be bf16, fp16 or fp32, got {x.dtype}; use ops.{operation}")
    arch, sms = chip(x.device)
    return {
        "m": x.shape[0], "n": weights[0].shape[0], "k": x.shape[1], "dtype": DTYPES[x.dtype], "arch": arch, "sms": sms,
        "triton_version": triton.__version__, "aligned": all(map(aligned, (x, *weights))),
    }  # fmt: skip


def launch(
    kernel: Callable,
    named: dict[str, Any],
    tile: tiles.Tile,
    device: torch.device,
    *,
    splits: int = 1,
    reserved_sms: int = 0,
) -> None:
    """Run the tiles of the result on the current stream of the device, persistent or one program each.

    `reserved_sms`: multiprocessors that a persistent kernel leaves to what runs beside it.
    """
    programs = triton.cdiv(named["m"], tile.block_m) * triton.cdiv(named["n"], tile.block_n) * splits
    if tile.persistent:
        programs = min(programs, chip(device)[1] - reserved_sms)
    with on(device):
        kernel[(programs,)](**named, num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True)


def on(device: torch.device) -> torch.cuda.device:
    """The context that makes it the current device, if it is a GPU."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


@lru_cache
def chip(device: torch.device) -> tuple[str, int]:
    """Architecture and multiprocessor count; a CPU tensor (Triton's interpreter) counts as one H100."""
    if device.type != "cuda":
        return "sm90", 132
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0], properties.multi_processor_count
    return f"sm{properties.major}{properties.minor}", properties.multi_processor_count
