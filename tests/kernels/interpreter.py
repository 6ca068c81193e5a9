"""Triton kernels on CPU tensors in Triton's interpreter: a registry of checks, and what they share.

The interpreter is chosen when triton is imported, so the checks run in a process of their own (interpreter_cases.py).
"""

import random
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from bounds import UNIT

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# The interpreter's cast to bf16 truncates where the GPU rounds to nearest: twice the round-off.
UNIT_HERE = {**UNIT, torch.bfloat16: 2.0**-7}
SIZES = (0, 1, 2, 3, 7, 16, 31, 64, 67, 97, 130)
CASES: dict[str, Callable[[], None]] = {}
SAMPLES: dict[str, int] = {}  # family of random cases -> how many of them always run
SLOW: set[str] = set()  # names of cases that run in full runs alone


def case(function: Callable[[], None]) -> Callable[[], None]:
    """One check, which always runs."""
    CASES[function.__name__] = function
    return function


def slow_case(function: Callable[[], None]) -> Callable[[], None]:
    """One check, in full runs."""
    SLOW.add(function.__name__)
    return case(function)


def each_dtype(name: str, check: Callable[[torch.dtype], None], *, always: Iterable[str] = DTYPES) -> None:
    """`check(dtype)` for each dtype, always, or for some in full runs alone."""
    for label, dtype in DTYPES.items():
        CASES[f"{name}-{label}"] = lambda d=dtype: check(d)
    SLOW.update(f"{name}-{label}" for label in DTYPES if label not in always)


def random_cases(family: str, check: Callable[[int, torch.dtype], None], *, sample: int) -> None:
    """`check(seed, dtype)` for 100 seeds of each dtype, of which `sample` always run and the others in full runs."""
    SAMPLES[family] = sample
    for label, dtype in DTYPES.items():
        for seed in range(100):
            CASES[f"{family}-{label}-{seed}"] = lambda s=seed, d=dtype: check(s, d)


def sampled() -> list[str]:
    """Names of the cases that always run."""
    always = [name for name in CASES if name.split("-")[0] not in SAMPLES and name not in SLOW]
    for family, count in SAMPLES.items():
        always += random.Random(family).sample([name for name in CASES if name.split("-")[0] == family], count)
    return always


def poisoned(rng: random.Random, values: torch.Tensor) -> torch.Tensor:
    """The same matrix inside a buffer of NaN, with a random layout: rows or columns adjacent, or every second one.

    In most cases adjacent ones begin at multiples of 16 bytes, as descriptors need them.
    """
    m, n = values.shape
    layout, whole = rng.choice(["rows", "columns"] * 2 + ["strided"]), rng.random() < 0.75
    if layout == "columns":
        m, n = n, m
    first, pitch = (8, -(-n // 8) * 8 + 16) if whole else (2, 2 * n + 5)
    buffer = torch.full((m + 3, pitch), torch.nan, dtype=values.dtype)
    view = buffer[1 : 1 + m, first : first + n]
    if layout == "strided":
        view = torch.full((m + 3, 2 * n + 5), torch.nan, dtype=values.dtype)[1 : 1 + m, 2 : 2 + 2 * n : 2]
    return (view.t() if layout == "columns" else view).copy_(values)


def poisoned_output(m: int, n: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A contiguous [m, n] of NaN inside a longer buffer of NaN, and that buffer."""
    buffer = torch.full((m * n + 64,), torch.nan, dtype=dtype)
    return buffer[32 : 32 + m * n].view(m, n), buffer


ALLOWED: list[np.ndarray] = []


@contextmanager
def only_within(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """No kernel may read or write an address that is not an element of one of these tensors."""
    for t in tensors:
        grids = np.meshgrid(*(np.arange(size) for size in t.shape), indexing="ij")
        offsets = sum(grid * stride for grid, stride in zip(grids, t.stride(), strict=True))
        ALLOWED.append((t.data_ptr() + offsets * t.element_size()).ravel())
    try:
        yield
    finally:
        ALLOWED.clear()


def with_gradients(y: torch.Tensor, inputs: list[torch.Tensor], upstream: torch.Tensor) -> list[torch.Tensor]:
    return [y.detach(), *torch.autograd.grad(y, inputs, upstream)]


def watch_accesses() -> None:
    """Check every address of every load and store against ALLOWED, while that is set."""
    from triton.runtime.interpreter import InterpreterBuilder

    def watched(original):
        def access(self, pointers, *rest, **named):
            mask = next(each.data for each in rest if each is not None and each.data.dtype == bool)
            used = np.broadcast_to(pointers.data, mask.shape)[mask].astype(np.int64)
            if ALLOWED and not np.isin(used, np.concatenate(ALLOWED)).all():
                raise AssertionError(f"{original.__name__} out of range")
            return original(self, pointers, *rest, **named)

        return access

    for name in ("create_masked_load", "create_masked_store"):
        setattr(InterpreterBuilder, name, watched(getattr(InterpreterBuilder, name)))


def multiply_bf16_rightly() -> None:
    """Upcast bf16 in the interpreter's dot, which would multiply the raw 16-bit patterns."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    original = InterpreterBuilder.create_dot

    def widened(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return original(self, widened(a), widened(b), d, input_precision, max_num_imprecise_acc)

    InterpreterBuilder.create_dot = create_dot


def run(names: list[str]) -> dict[str, str]:
    torch.set_num_threads(1)
    multiply_bf16_rightly()
    watch_accesses()
    results = {}
    for name in names:
        try:
            CASES[name]()
            results[name] = "ok"
        except Exception:
            results[name] = traceback.format_exc()
    return results
