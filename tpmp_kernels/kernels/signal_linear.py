"""One persistent GEMM Y = X @ W^T that says how far it is: it counts, in device memory, the stored tiles of each chunk.

A chunk is a run of row blocks. Tiles go chunk after chunk, and each, once stored, adds one to its chunk's counter. A
second stream that waits for the count of a chunk (cuStreamWaitValue32, or `wait`) may reduce its rows while the GEMM
goes on:

    counters.zero_()                          on the compute stream; the other stream waits for an event behind it
    chunks = signal_linear(x, weight, out, counters, chunks=8)       on the compute stream, before any of the waits
    for i, (rows, count) in enumerate(chunks):                       on the other stream
        wait(counters, i, count)
        all_reduce(out[rows])

The rules of the signal, which tests/kernels/test_aot_signal.py checks in machine code: a plain store (one by descriptor
is still under way when the counter moves), then a barrier (one thread moves the counter, all of them have stored), then
an addition that releases to the whole system. No `flatten`: with it, these loads are not pipelined.
"""

from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpmp_kernels.kernels import gemm, tiles
from tpmp_kernels.kernels.gemm import grouped, own_tiles, product
from tpmp_kernels.kernels.linear import finish

# Written into a counter it ends every wait for it, now and later: more than any count, and so far from 2^31 that tiles
# which are still added turn no sign. cuStreamWaitValue32 compares the difference, cyclically; both ways agree here.
ABORT = 1 << 30


@triton.jit(do_not_specialize=["m", "height", "taller"])
def signal_linear_kernel(
    x, weight, out, counters,
    m, n, k, height, taller,
    x_stride_m, x_stride_k, weight_stride_n, weight_stride_k,
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
    first, last, step = own_tiles(tl.cdiv(m, BLOCK_M) * tl.cdiv(n, BLOCK_N), PERSISTENT)
    for index in tl.range(first, last, step, flatten=FLATTEN):
        chunk, row_block, col_block = chunked(index, m, n, height, taller, BLOCK_M, BLOCK_N, GROUP_M)
        first_row, first_col = row_block * BLOCK_M, col_block * BLOCK_N
        acc = product(
            x, weight, first_row, first_col, 0, k, m, n, k,
            x_stride_m, x_stride_k, weight_stride_n, weight_stride_k,
            X_ROWS_ADJACENT, WEIGHT_ROWS_ADJACENT, DESCRIPTORS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        finish(
            acc, None, None, out, None, m, n, 0, 0, first_row, first_col,
            None, False, BLOCK_M, BLOCK_N, PART,
        )  # fmt: skip
        tl.debug_barrier()
        tl.atomic_add(counters + chunk, 1, sem="release", scope="sys")


@triton.jit
def chunked(index, m, n, height, taller, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Tile number -> (chunk, row block, column block): chunk after chunk, and `grouped` within each.

    The first `taller` chunks have height + 1 row blocks, the others `height`: see `_heights`.
    """
    cols = tl.cdiv(n, BLOCK_N)
    row, split = index // cols, taller * (height + 1)
    tall = row < split
    own = tl.where(tall, height + 1, height)
    behind = (row - tl.where(tall, 0, split)) // own
    chunk, start = behind + tl.where(tall, 0, taller), behind * own + tl.where(tall, 0, split)
    row_block, col_block = grouped(index - start * cols, own * BLOCK_M, n, BLOCK_M, BLOCK_N, GROUP_M)
    return chunk, start + row_block, col_block


@triton.jit(do_not_specialize=["chunk", "count"])
def wait_kernel(counters, chunk, count):
    """Ends when the counter of the chunk is at `count` or beyond, and sees then what was stored before."""
    counter = counters + chunk
    while tl.atomic_add(counter, 0, sem="acquire", scope="sys") < count:
        pass


def signal_linear(
    x: Tensor, weight: Tensor, out: Tensor, counters: Tensor, *, chunks: int, reserved_sms: int = 0
) -> list[tuple[slice, int]]:
    """out = x @ weight^T on the current stream; returns for each chunk its rows and the count at which they are stored.

    x [M, K], weight [N, K] of one dtype (bf16, fp16, fp32), any strides; out [M, N], contiguous, of that dtype or fp32;
    counters int32, one for each chunk, zero. There are fewer chunks than asked where there are fewer row blocks, none
    of no rows. `reserved_sms` multiprocessors are left to what runs beside it. Bits as the kernel of `linear` computes
    them on the same block. ValueError for shapes and counts, TypeError for dtypes.
    """
    _check(x, weight, out, counters, chunks, reserved_sms)
    tile = signal_tile(x, weight, out.dtype, reserved_sms=reserved_sms)
    rows, counts = chunk_rows(len(x), chunks, tile), expected(*out.shape, chunks, tile)
    if len(rows) > counters.numel():
        raise ValueError(f"signal_linear: {len(rows)} chunks need as many counters, got {counters.numel()}")
    if out.numel() > 0:
        named = arguments(x, weight, out, counters, chunks, tile)
        gemm.launch(signal_linear_kernel, named, tile, x.device, reserved_sms=reserved_sms)
    return list(zip(rows, counts, strict=True))


def wait(counters: Tensor, chunk: int, count: int) -> None:
    """Hold the current stream until the chunk's counter is at `count`, or ABORT was written into it.

    One warp that polls, for where the driver's cuStreamWaitValue32 is missing. The GEMM that counts must have been
    launched before: a kernel that is loaded behind one that spins may have to wait for it.
    """
    with gemm.on(counters.device):
        wait_kernel[(1,)](counters, chunk, count, num_warps=1)


def signal_tile(
    x: Tensor, weight: Tensor, out_dtype: torch.dtype | None = None, *, reserved_sms: int = 0
) -> tiles.Tile:
    """The tile that `signal_linear` runs with: the plain GEMM's, persistent, so that tiles are begun in order."""
    epilogue = tiles.Epilogue(wide=out_dtype not in (None, x.dtype))
    tile = gemm.own_tile("linear", x, weight, epilogue=epilogue, reserved_sms=reserved_sms)
    return replace(tile, persistent=True, flatten=False)


def chunk_rows(m: int, chunks: int, tile: tiles.Tile) -> list[slice]:
    """The rows of each chunk of m: whole row blocks, so that no tile is in two chunks, and as many as can be.

    The last one, which has nothing to hide under, is among the smallest.
    """
    starts = [tile.block_m * start for start in accumulate(_heights(m, chunks, tile), initial=0)]
    return [slice(start, min(end, m)) for start, end in pairwise(starts)]


def expected(m: int, n: int, chunks: int, tile: tiles.Tile) -> list[int]:
    """What the counter of each chunk of a result [m, n] reaches: the tiles of the chunk."""
    return [height * triton.cdiv(n, tile.block_n) for height in _heights(m, chunks, tile)]


def _heights(m: int, chunks: int, tile: tiles.Tile) -> list[int]:
    """The row blocks of each chunk, as even as can be, the larger first."""
    height, taller, chunks = _cut(m, chunks, tile)
    return [height + (chunk < taller) for chunk in range(chunks)]


def _cut(m: int, chunks: int, tile: tiles.Tile) -> tuple[int, int, int]:
    """(row blocks of a chunk, how many chunks have one more, chunks): fewer than asked where row blocks are fewer."""
    row_blocks = triton.cdiv(m, tile.block_m)
    chunks = min(chunks, row_blocks)
    return (*divmod(row_blocks, max(chunks, 1)), chunks)


def arguments(
    x: Tensor, weight: Tensor, out: Tensor, counters: Tensor, chunks: int, tile: tiles.Tile
) -> dict[str, Any]:
    """Every argument of `signal_linear_kernel` by name, as a launch passes them and as aot.compile takes them."""
    height, taller, _ = _cut(x.shape[0], chunks, tile)
    return gemm.operands(x, weight, tile) | {
        "out": out, "PART": gemm.part(tile, out),
        "counters": counters, "height": height, "taller": taller,
    }  # fmt: skip


def _check(x: Tensor, weight: Tensor, out: Tensor, counters: Tensor, chunks: int, reserved_sms: int) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"signal_linear: expected x [M, K] and weight [N, K], got {list(x.shape)} and {list(weight.shape)}; "
            "flatten the tokens: x.flatten(0, -2)"
        )
    if out.shape != (len(x), len(weight)) or not out.is_contiguous():
        raise ValueError(
            f"signal_linear: out must be a contiguous {[len(x), len(weight)]}, got {list(out.shape)} with strides "
            f"{list(out.stride())}; pass x.new_empty({len(x)}, {len(weight)})"
        )
    if weight.dtype != x.dtype or out.dtype not in (x.dtype, torch.float32):
        raise TypeError(
            f"signal_linear: expected weight of x's {x.dtype} and out of that or float32, got {weight.dtype} and "
            f"{out.dtype}; cast them"
        )
    if counters.dtype is not torch.int32 or counters.dim() != 1 or not counters.is_contiguous():
        raise ValueError(
            f"signal_linear: counters must be a contiguous int32 vector, got {counters.dtype} {list(counters.shape)}; "
            "pass torch.zeros(chunks, dtype=torch.int32)"
        )
    sms = gemm.chip(x.device)[1]
    if chunks < 1 or not 0 <= reserved_sms < sms:
        raise ValueError(
            f"signal_linear: expected at least 1 chunk and 0 <= reserved_sms < {sms}, got {chunks} chunks and "
            f"reserved_sms={reserved_sms}"
        )
