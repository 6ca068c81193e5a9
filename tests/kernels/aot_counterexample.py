"""A kernel that does what ours must not: it works on A between load and dot. The ahead-of-time check must see it."""

import triton
import triton.language as tl


@triton.jit
def cast_before_dot(x, w, y, k):
    rows, inner = tl.arange(0, 128), tl.arange(0, 64)
    acc = tl.zeros((128, 64), dtype=tl.float32)
    for start in range(0, k, 64):
        a = tl.load(x + rows[:, None] * k + (start + inner)[None, :])
        b = tl.load(w + inner[None, :] * k + (start + inner)[:, None])
        acc = tl.dot((a.to(tl.float32) * 2.0).to(tl.bfloat16), b, acc)
    tl.store(y + rows[:, None] * 64 + inner[None, :], acc.to(tl.bfloat16))
