"""Two GEMMs that share their X tiles, with the product in the epilogue: Y = act(X @ Wg^T) * (X @ Wu^T)."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpmp_kernels.kernels import gemm, library, tiles
from tpmp_kernels.kernels.activations import activate
from tpmp_kernels.kernels.gemm import described, grouped, halves, offsets, own_tiles, put, within


# The token count is not specialised, as in linear_kernel.
@triton.jit(do_not_specialize=["m"])
def gated_linear_kernel(
    x, weight, w_up, y, gate, up,
    m, n, k,
    x_stride_m, x_stride_k, weight_stride_n, weight_stride_k, w_up_stride_n, w_up_stride_k,
    ACTIVATION: tl.constexpr,
    X_ROWS_ADJACENT: tl.constexpr,
    WEIGHT_ROWS_ADJACENT: tl.constexpr,
    W_UP_ROWS_ADJACENT: tl.constexpr,
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
        gate_acc, up_acc = _products(
            x, weight, w_up, first_row, first_col, m, n, k,
            x_stride_m, x_stride_k, weight_stride_n, weight_stride_k, w_up_stride_n, w_up_stride_k,
            X_ROWS_ADJACENT, WEIGHT_ROWS_ADJACENT, W_UP_ROWS_ADJACENT, DESCRIPTORS, PRECISION,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        _finish(
            gate_acc, up_acc, y, gate, up, m, n, first_row, first_col,
            ACTIVATION, STORE_DESCRIPTORS, BLOCK_M, BLOCK_N, PART,
        )  # fmt: skip


@triton.jit
def _products(
    x, weight, w_up, first_row, first_col, m, n, k,
    x_stride_m, x_stride_k, weight_stride_n, weight_stride_k, w_up_stride_n, w_up_stride_k,
    X_ROWS_ADJACENT: tl.constexpr, WEIGHT_ROWS_ADJACENT: tl.constexpr, W_UP_ROWS_ADJACENT: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The tiles of X @ W_gate^T and X @ W_up^T in one loop over K: as gemm.product, with two weights."""
    gate_acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up_acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if DESCRIPTORS:
        for start in range(0, k, BLOCK_K):
            a = described(x, first_row, start, X_ROWS_ADJACENT)
            gate_block = described(weight, first_col, start, WEIGHT_ROWS_ADJACENT)
            up_block = described(w_up, first_col, start, W_UP_ROWS_ADJACENT)
            gate_acc = tl.dot(a, gate_block.T, gate_acc, input_precision=PRECISION)
            up_acc = tl.dot(a, up_block.T, up_acc, input_precision=PRECISION)
    else:
        inner = tl.arange(0, BLOCK_K)
        along = inner.to(tl.int64)
        rows, cols = first_row + tl.arange(0, BLOCK_M), first_col + tl.arange(0, BLOCK_N)
        x_tile = x + offsets(rows, m, x_stride_m, X_ROWS_ADJACENT)[:, None] + along[None, :] * x_stride_k
        gate_tile = weight + offsets(cols, n, weight_stride_n, WEIGHT_ROWS_ADJACENT)[None, :]
        gate_tile += along[:, None] * weight_stride_k
        up_tile = w_up + offsets(cols, n, w_up_stride_n, W_UP_ROWS_ADJACENT)[None, :] + along[:, None] * w_up_stride_k
        x_step = tl.cast(x_stride_k, tl.int64) * BLOCK_K
        gate_step = tl.cast(weight_stride_k, tl.int64) * BLOCK_K
        up_step = tl.cast(w_up_stride_k, tl.int64) * BLOCK_K
        for start in range(0, k, BLOCK_K):
            left = k - start
            a = tl.load(x_tile, mask=within(inner[None, :], left, rows[:, None], m, X_ROWS_ADJACENT), other=0.0)
            gate_mask = within(inner[:, None], left, cols[None, :], n, WEIGHT_ROWS_ADJACENT)
            up_mask = within(inner[:, None], left, cols[None, :], n, W_UP_ROWS_ADJACENT)
            gate_acc = tl.dot(a, tl.load(gate_tile, mask=gate_mask, other=0.0), gate_acc, input_precision=PRECISION)
            up_acc = tl.dot(a, tl.load(up_tile, mask=up_mask, other=0.0), up_acc, input_precision=PRECISION)
            x_tile += x_step
            gate_tile += gate_step
            up_tile += up_step
    return gate_acc, up_acc


@triton.jit
def _finish(
    gate_acc, up_acc, y, gate, up, m, n, first_row, first_col,
    ACTIVATION: tl.constexpr, STORE_DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """The epilogue in fp32 and its stores, PART columns at a time."""
    if BLOCK_N > PART:
        gate_left, gate_right = halves(gate_acc, BLOCK_M, BLOCK_N)
        up_left, up_right = halves(up_acc, BLOCK_M, BLOCK_N)
        _finish(
            gate_left, up_left, y, gate, up, m, n, first_row, first_col,
            ACTIVATION, STORE_DESCRIPTORS, BLOCK_M, BLOCK_N // 2, PART,
        )  # fmt: skip
        _finish(
            gate_right, up_right, y, gate, up, m, n, first_row, first_col + BLOCK_N // 2,
            ACTIVATION, STORE_DESCRIPTORS, BLOCK_M, BLOCK_N // 2, PART,
        )  # fmt: skip
    else:
        if gate is not None:
            put(gate, gate_acc, first_row, first_col, m, n, STORE_DESCRIPTORS)
            put(up, up_acc, first_row, first_col, m, n, STORE_DESCRIPTORS)
        if y is not None:
            put(y, activate(gate_acc, ACTIVATION) * up_acc, first_row, first_col, m, n, STORE_DESCRIPTORS)


def gated_linear(
    x: Tensor, w_gate: Tensor, w_up: Tensor, activation: str, *, store_preact: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(act(gate) * up, gate, up) with gate = x @ w_gate^T, up = x @ w_up^T; None for both unless `store_preact`.

    x [M, K], w_gate and w_up [N, K] of one dtype (bf16, fp16, fp32), any strides. Returns new contiguous tensors.
    """
    tile = gemm.choose("gated_linear", x, w_gate, w_up, epilogue=tiles.Epilogue(activation, preact=store_preact))
    if tile is None:
        return library.gated_linear(x, w_gate, w_up, activation, store_preact)
    y = x.new_empty(x.shape[0], w_gate.shape[0])
    gate, up = (torch.empty_like(y), torch.empty_like(y)) if store_preact else (None, None)
    _run(x, w_gate, w_up, y, gate, up, activation, tile)
    return y, gate, up


def preact(x: Tensor, w_gate: Tensor, w_up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """(gate, up) again, the same bits as `gated_linear` stored: on its tile."""
    tile = gemm.choose("gated_linear", x, w_gate, w_up, epilogue=tiles.Epilogue(activation, preact=True))
    if tile is None:
        return tuple(library.linear(x, weight, None, None, None, False)[0] for weight in (w_gate, w_up))
    gate, up = (x.new_empty(x.shape[0], w_gate.shape[0]) for _ in range(2))
    _run(x, w_gate, w_up, None, gate, up, activation, tile)
    return gate, up


def _run(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    up: Tensor | None,
    activation: str,
    tile: tiles.Tile,
) -> None:
    if x.shape[0] > 0 and w_gate.shape[0] > 0:
        gemm.launch(gated_linear_kernel, arguments(x, w_gate, w_up, y, gate, up, activation, tile), tile, x.device)


def arguments(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    up: Tensor | None,
    activation: str,
    tile: tiles.Tile,
) -> dict[str, Any]:
    """Every argument of `gated_linear_kernel` by name, as a launch passes them and as aot.compile takes them."""
    return gemm.operands(x, w_gate, tile) | gemm.results(tile, y=y, gate=gate, up=up) | {
        "w_up": gemm.operand(w_up, tile.block_n, tile),
        "w_up_stride_n": w_up.stride(0), "w_up_stride_k": w_up.stride(1),
        "W_UP_ROWS_ADJACENT": gemm.rows_adjacent(w_up),
        "ACTIVATION": activation,
    }  # fmt: skip
