"""Kernels that signal what is not there yet. The ahead-of-time check must see it."""

import triton
import triton.language as tl


@triton.jit
def without_barrier(out, counter):
    tl.store(out + tl.arange(0, 1024), 1.0)
    tl.atomic_add(counter, 1, sem="release", scope="sys")


@triton.jit
def before_the_store(out, counter):
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="sys")
    tl.store(out + tl.arange(0, 1024), 1.0)


@triton.jit
def within_the_device(out, counter):
    tl.store(out + tl.arange(0, 1024), 1.0)
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")


@triton.jit
def relaxed(out, counter):
    tl.store(out + tl.arange(0, 1024), 1.0)
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="relaxed", scope="sys")


@triton.jit
def by_descriptor(out, counter):
    out.store([0, 0], tl.full((16, 64), 1.0, tl.float32))
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="sys")
