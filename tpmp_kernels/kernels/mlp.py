"""The middle of an MLP's backward: the down layer's dgrad with the derivative of what stood before it in the epilogue.

    mlp        dH = dY @ W_down    dZ = dH * act'(Z)                                       H = act(Z)
    gated      dH = dY @ W_down    dGate = dH * Up * act'(Gate), dUp = dH * act(Gate)      H = act(Gate) * Up

dH is never stored. H is made again for the down layer's wgrad, while its pre-activations are at hand.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpmp_kernels.kernels import gemm, tiles
from tpmp_kernels.kernels.activations import activate, derivative
from tpmp_kernels.kernels.gemm import grouped, halves, own_tiles, positions, product, put


# The token count is not specialised, as in linear_kernel.
@triton.jit(do_not_specialize=["m"])
def mlp_dz_kernel(
    x, weight, preact, up, dz, dup, h, partial,
    m, n, k,
    x_stride_m, x_stride_k, weight_stride_n, weight_stride_k,
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
        sums = None if partial is None else partial + row_block.to(tl.int64) * n
        _finish(
            acc, preact, up, dz, dup, h, sums, m, n, first_row, first_col,
            ACTIVATION, STORE_DESCRIPTORS, BLOCK_M, BLOCK_N, PART,
        )  # fmt: skip


@triton.jit
def _finish(
    acc, preact, up, dz, dup, h, sums, m, n, first_row, first_col,
    ACTIVATION: tl.constexpr, STORE_DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """The epilogue in fp32, PART columns at a time: derivative, second factor, h, the sums over rows, stores."""
    if BLOCK_N > PART:
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        _finish(
            left, preact, up, dz, dup, h, sums, m, n, first_row, first_col,
            ACTIVATION, STORE_DESCRIPTORS, BLOCK_M, BLOCK_N // 2, PART,
        )  # fmt: skip
        _finish(
            right, preact, up, dz, dup, h, sums, m, n, first_row, first_col + BLOCK_N // 2,
            ACTIVATION, STORE_DESCRIPTORS, BLOCK_M, BLOCK_N // 2, PART,
        )  # fmt: skip
    else:
        place, mask = positions(first_row, first_col, m, n, BLOCK_M, BLOCK_N)
        z = tl.load(preact + place, mask=mask, other=0.0).to(tl.float32)
        grad = acc * derivative(z, ACTIVATION)
        if up is not None:
            factor = tl.load(up + place, mask=mask, other=0.0).to(tl.float32)
            active = activate(z, ACTIVATION)
            grad *= factor
            put(dup, acc * active, first_row, first_col, m, n, STORE_DESCRIPTORS)
            if h is not None:
                put(h, active * factor, first_row, first_col, m, n, STORE_DESCRIPTORS)
        elif h is not None:
            put(h, activate(z, ACTIVATION), first_row, first_col, m, n, STORE_DESCRIPTORS)
        put(dz, grad, first_row, first_col, m, n, STORE_DESCRIPTORS)
        if sums is not None:
            # Rows past the end may hold row 0's product, which must not count.
            cols = first_col + tl.arange(0, BLOCK_N)
            tl.store(sums + cols, tl.sum(tl.where(mask, grad, 0.0), axis=0), mask=cols < n)


def mlp_dz(
    dy: Tensor, w_down: Tensor, preact: Tensor, activation: str, *, bias: bool, need_h: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dz, h, dbias): (dy @ w_down) * act'(preact), act(preact) if `need_h`, and the sum of dz over rows if `bias`.

    dy [M, H] and w_down [H, F] of any strides, preact [M, F] contiguous, of one dtype (bf16, fp16, fp32). Returns new
    contiguous tensors of that dtype.
    """
    dz, _, h, partial = _run(dy, w_down, preact, None, activation, bias, need_h)
    return dz, h, None if partial is None else partial.sum(0).to(dy.dtype)


def gated_mlp_dz(
    dy: Tensor, w_down: Tensor, gate: Tensor, up: Tensor, activation: str, *, need_h: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dgate, dup, h) with dh = dy @ w_down: dh * up * act'(gate), dh * act(gate), and act(gate) * up if `need_h`.

    Shapes, strides and dtypes as for `mlp_dz`.
    """
    return _run(dy, w_down, gate, up, activation, False, need_h)[:3]


def _run(
    dy: Tensor, w_down: Tensor, preact: Tensor, up: Tensor | None, activation: str, bias: bool, need_h: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    dz = torch.empty_like(preact)
    dup = None if up is None else torch.empty_like(preact)
    h = torch.empty_like(preact) if need_h else None
    epilogue = tiles.Epilogue(activation, bias=bias, residual=up is not None, preact=need_h)
    tile = gemm.choose("mlp_dz", dy, w_down.t(), epilogue=epilogue)
    blocks = triton.cdiv(dy.shape[0], tile.block_m)
    partial = dy.new_empty(blocks, preact.shape[1], dtype=torch.float32) if bias else None
    if preact.numel() > 0:
        named = arguments(dy, w_down, preact, up, dz, dup, h, partial, activation, tile)
        gemm.launch(mlp_dz_kernel, named, tile, dy.device)
    return dz, dup, h, partial


def arguments(
    dy: Tensor,
    w_down: Tensor,
    preact: Tensor,
    up: Tensor | None,
    dz: Tensor,
    dup: Tensor | None,
    h: Tensor | None,
    partial: Tensor | None,
    activation: str,
    tile: tiles.Tile,
) -> dict[str, Any]:
    """Every argument of `mlp_dz_kernel` by name, as a launch passes them and as aot.compile takes them."""
    return gemm.operands(dy, w_down.t(), tile) | gemm.results(tile, dz=dz, dup=dup, h=h) | {
        "preact": preact, "up": up, "partial": partial, "ACTIVATION": activation,
    }  # fmt: skip
