"""Sums of squares in fp64, in an order that depends on the number of elements alone: no atomics, no tuned block."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
# Partial sums of one row: two for each multiprocessor of an H100.
PARTIALS = 256


@triton.jit(do_not_specialize=["steps"])
def square_sum_kernel(x, partial, n, steps, BLOCK: tl.constexpr):
    """Program (i, j) of (p, rows) adds blocks i, i + p, i + 2p, ... of row j, `steps` of them, into partial[j, i]."""
    first, row, programs = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for step in range(0, steps):
        place = (step * programs + first).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + row * n + place, mask=place < n, other=0.0).to(tl.float32).to(tl.float64)
        total += value * value
    tl.store(partial + row * programs + first, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["programs"])
def partial_sum_kernel(partial, sums, programs, PARTIALS: tl.constexpr):
    """The sum of one row of partial [rows, programs], of at most PARTIALS."""
    row, inner = tl.program_id(0), tl.arange(0, PARTIALS)
    values = tl.load(partial + row * programs + inner, mask=inner < programs, other=0.0)
    tl.store(sums + row, tl.sum(values, axis=0))


def square_sums(x: Tensor) -> Tensor:
    """[R] fp64: the sum of squares of each row of x [R, N], contiguous; bf16, fp16 or fp32."""
    rows, n = x.shape
    programs = min(PARTIALS, triton.cdiv(n, BLOCK))
    if rows == 0 or n == 0:
        return x.new_zeros(rows, dtype=torch.float64)
    partial, sums = (x.new_empty(*shape, dtype=torch.float64) for shape in ((rows, programs), (rows,)))
    with torch.cuda.device_of(x):
        square_sum_kernel[(programs, rows)](**arguments(x, partial), num_warps=4, enable_fp_fusion=True)
        partial_sum_kernel[(rows,)](**partial_arguments(partial, sums), num_warps=4, enable_fp_fusion=True)
    return sums


def arguments(x: Tensor, partial: Tensor) -> dict[str, Any]:
    """Every argument of `square_sum_kernel` by name, as a launch passes them and as aot.compile takes them."""
    n = x.shape[1]
    return {"x": x, "partial": partial, "n": n, "steps": triton.cdiv(n, partial.shape[1] * BLOCK), "BLOCK": BLOCK}


def partial_arguments(partial: Tensor, sums: Tensor) -> dict[str, Any]:
    """The same of `partial_sum_kernel`."""
    return {"partial": partial, "sums": sums, "programs": partial.shape[1], "PARTIALS": PARTIALS}
