"""act(gate) * up and both its gradients, each in one pass over memory."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpmp_kernels.kernels.activations import activate, derivative

BLOCK_M, BLOCK_N = 16, 128


@triton.jit(do_not_specialize=["m"])
def glu_kernel(
    gate, up, dy, y, dgate, dup,
    m, n,
    gate_stride_m, gate_stride_n, up_stride_m, up_stride_n, dy_stride_m, dy_stride_n,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y without dy; dgate and dup with it."""
    rows = (tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    cols = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    mask = (rows < m) & (cols < n)
    place = rows * n + cols
    z = tl.load(gate + rows * gate_stride_m + cols * gate_stride_n, mask=mask, other=0.0).to(tl.float32)
    factor = tl.load(up + rows * up_stride_m + cols * up_stride_n, mask=mask, other=0.0).to(tl.float32)
    if dy is None:
        tl.store(y + place, (activate(z, ACTIVATION) * factor).to(y.dtype.element_ty), mask=mask)
    else:
        upstream = tl.load(dy + rows * dy_stride_m + cols * dy_stride_n, mask=mask, other=0.0).to(tl.float32)
        grad = upstream * factor * derivative(z, ACTIVATION)
        tl.store(dgate + place, grad.to(dgate.dtype.element_ty), mask=mask)
        tl.store(dup + place, (upstream * activate(z, ACTIVATION)).to(dup.dtype.element_ty), mask=mask)


def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up. gate and up [M, N] of any strides, of one dtype (bf16, fp16, fp32); a new contiguous tensor."""
    y = gate.new_empty(gate.shape)
    _launch(gate, arguments(gate, up, None, y, None, None, activation))
    return y


def glu_backward(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """(dgate, dup): dy * up * act'(gate) and dy * act(gate), all [M, N]; dy of any strides too."""
    dgate, dup = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    _launch(gate, arguments(gate, up, dy, None, dgate, dup, activation))
    return dgate, dup


def _launch(gate: Tensor, named: dict[str, Any]) -> None:
    m, n = gate.shape
    if m > 0 and n > 0:
        with torch.cuda.device_of(gate):
            glu_kernel[(triton.cdiv(n, BLOCK_N), triton.cdiv(m, BLOCK_M))](**named, num_warps=4, enable_fp_fusion=True)


def arguments(
    gate: Tensor,
    up: Tensor,
    dy: Tensor | None,
    y: Tensor | None,
    dgate: Tensor | None,
    dup: Tensor | None,
    activation: str,
) -> dict[str, Any]:
    """Every argument of `glu_kernel` by name, as a launch passes them and as aot.compile takes them."""
    dy_strides = (0, 0) if dy is None else dy.stride()
    return {
        "gate": gate, "up": up, "dy": dy, "y": y, "dgate": dgate, "dup": dup, "m": gate.shape[0], "n": gate.shape[1],
        "gate_stride_m": gate.stride(0), "gate_stride_n": gate.stride(1),
        "up_stride_m": up.stride(0), "up_stride_n": up.stride(1),
        "dy_stride_m": dy_strides[0], "dy_stride_n": dy_strides[1],
        "ACTIVATION": activation, "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N,
    }  # fmt: skip
