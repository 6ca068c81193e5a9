"""Kernel checks in Triton's interpreter, on CPU tensors. Run as a program: the interpreter is chosen when triton is
imported, so it needs a process of its own.

    python interpreter_cases.py NAME...     prints {name: "ok" or what went wrong} as JSON
"""

import json
import os
import random
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from tpmp_kernels import ops, reference
from tpmp_kernels.kernels import tiles

sys.path.insert(0, str(Path(__file__).parent.parent))
from bounds import ACTIVATION_UNITS, UNIT, assert_no_worse_than_torch, assert_within, gamma, linear_bound

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# The interpreter's cast to bf16 truncates where the GPU rounds to nearest: twice the round-off.
UNIT_HERE = {**UNIT, torch.bfloat16: 2.0**-7}
SIZES = (0, 1, 2, 3, 7, 16, 31, 64, 67, 97, 130)
ACTIVATIONS, GATES = (None, *reference.ACTIVATIONS), reference.GATES
CASES: dict[str, Callable[[], None]] = {}


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES[function.__name__] = function
    return function


def poisoned(rng: random.Random, values: torch.Tensor) -> torch.Tensor:
    """The same matrix inside a buffer of NaN, with a random layout: rows or columns adjacent, or every second one."""
    m, n = values.shape
    layout = rng.choice(["rows", "columns", "strided"])
    buffer = torch.full((m + 3, 2 * n + 5), torch.nan, dtype=values.dtype)
    view = buffer[1 : 1 + m, 2 : 2 + n]
    if layout == "strided":
        view = buffer[1 : 1 + m, 2 : 2 + 2 * n : 2]
    if layout == "columns":
        view = torch.full((n + 3, m + 5), torch.nan, dtype=values.dtype)[1 : 1 + n, 2 : 2 + m].t()
    return view.copy_(values)


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


def check_linear(seed: int, dtype: torch.dtype) -> None:
    """One random problem on one random shipped tile, launched on views whose surroundings are NaN."""
    from tpmp_kernels.kernels.linear import DTYPES as NAMES
    from tpmp_kernels.kernels.linear import arguments, launch, linear_kernel

    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    m, n, k = (rng.choice(SIZES) for _ in range(3))
    m, n = max(m, 1), max(n, 1)
    activation = rng.choice(ACTIVATIONS)
    bias, residual = (draw(n) if rng.random() < 0.5 else None), (draw(m, n) if rng.random() < 0.5 else None)
    epilogue = tiles.Epilogue(activation, bias is not None, residual is not None, rng.random() < 0.5)
    tile = rng.choice(tiles.shipped(k, NAMES[dtype], arch=90, epilogue=epilogue))
    x, weight = draw(m, k), draw(n, k)
    (y, y_buffer), (z, z_buffer) = poisoned_output(m, n, dtype), poisoned_output(m, n, dtype)
    named = arguments(
        poisoned(rng, x), poisoned(rng, weight), None if bias is None else poisoned(rng, bias[None])[0],
        None if residual is None else poisoned(rng, residual), y, z if epilogue.preact else None, activation, tile,
    )  # fmt: skip
    with only_within(t for t in named.values() if isinstance(t, torch.Tensor)):
        launch(linear_kernel, named, tile)

    unit = UNIT_HERE[dtype]
    oracle, bound = linear_bound(x, weight, bias, activation=activation, residual=residual, unit=unit)
    assert_within(y, oracle, bound)
    eager = reference.linear(x, weight, bias, activation=activation, residual=residual)
    assert_no_worse_than_torch(y, eager, oracle, unit)
    if epilogue.preact:
        assert_within(z, *linear_bound(x, weight, bias, unit=unit))
    written = m * n * (1 + epilogue.preact)
    finite = int(y_buffer.isfinite().sum() + z_buffer.isfinite().sum())
    assert finite == written, f"{finite} elements written, expected {written}"


def check_activation_grad(seed: int, dtype: torch.dtype) -> None:
    """One random dz and bias gradient, against the derivative that autograd gives in fp64."""
    from tpmp_kernels.kernels.activation_grad import activation_grad

    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    m, n = rng.choice(SIZES), rng.choice(SIZES)
    activation = rng.choice(list(reference.ACTIVATIONS))
    dy, z = (torch.randn(m, n, generator=generator).mul(3).to(dtype) for _ in range(2))
    dz, dbias = activation_grad(poisoned(rng, dy), z, activation, bias=True)

    unit, wide = UNIT_HERE[dtype], UNIT[torch.float32]
    oracle = dy.double() * reference.activation_derivative(z.double(), activation)
    rounding = ACTIVATION_UNITS * wide * dy.double().abs()  # act' itself, evaluated in fp32: it does not grow with z
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert_within(dz, oracle, rounding + unit * (oracle.abs() + rounding) + tiny)
    error = rounding.sum(0) + gamma(m + 1, wide) * oracle.abs().sum(0)
    assert_within(dbias, oracle.sum(0), error + unit * (oracle.sum(0).abs() + error) + tiny)


def check_integers(dtype: torch.dtype) -> None:
    """Sums of small integers are exact in any order: every bit must agree, whatever the tile."""
    from tpmp_kernels.kernels.linear import linear

    for m, n, k in ((67, 131, 64), (1, 300, 127), (129, 1, 97)):
        x, weight = torch.randint(-1, 2, (m, k)).to(dtype), torch.randint(-1, 2, (n, k)).to(dtype)
        bias, residual = torch.randint(-3, 4, (n,)).to(dtype), torch.randint(-3, 4, (m, n)).to(dtype)
        y, z = linear(x, weight, bias, residual, "relu", store_preact=True)
        exact = x.double() @ weight.double().t() + bias.double()
        assert torch.equal(z.double(), exact)
        assert torch.equal(y.double(), exact.relu() + residual.double())


def check_empty(dtype: torch.dtype) -> None:
    """No rows or no columns give an empty result; no inner dimension gives act(bias)."""
    from tpmp_kernels.kernels.linear import linear

    for m, n in ((0, 5), (5, 0), (0, 0)):
        y, z = linear(torch.ones(m, 3, dtype=dtype), torch.ones(n, 3, dtype=dtype), store_preact=True)
        assert y.shape == z.shape == (m, n)
    bias = torch.tensor([-1.0, 2.0], dtype=dtype)
    y, _ = linear(torch.ones(3, 0, dtype=dtype), torch.ones(2, 0, dtype=dtype), bias, None, "relu")
    assert torch.equal(y, bias.relu().expand(3, 2))


@case
def op_gradients() -> None:
    """ops.linear and ops.gated_linear with the Triton backend, forward and backward: no worse than twice torch."""
    torch.manual_seed(0)
    x, weight, other, bias = (torch.randn(*s, requires_grad=True) for s in ((4, 16, 33), (48, 33), (48, 33), (48,)))
    upstream = torch.randn(4, 16, 48)
    calls = [(lambda r, x, w, b, a=a: r.linear(x, w, b, activation=a), [x, weight, bias]) for a in ACTIVATIONS]
    calls += [(lambda r, x, g, u, a=a: r.gated_linear(x, g, u, activation=a), [x, weight, other]) for a in GATES]
    for call, inputs in calls:
        with ops.use_backend("triton"):
            got = with_gradients(call(ops, *inputs), inputs, upstream)
        eager = with_gradients(call(reference, *inputs), inputs, upstream)
        wide = [t.detach().double().requires_grad_() for t in inputs]
        oracle = with_gradients(call(reference, *wide), wide, upstream.double())
        for ours, theirs, exact in zip(got, eager, oracle, strict=True):
            assert_no_worse_than_torch(ours, theirs, exact, least=1)


def with_gradients(y: torch.Tensor, inputs: list[torch.Tensor], upstream: torch.Tensor) -> list[torch.Tensor]:
    return [y.detach(), *torch.autograd.grad(y, inputs, upstream)]


for _name, _dtype in DTYPES.items():
    CASES[f"integers-{_name}"] = lambda d=_dtype: check_integers(d)
    CASES[f"empty-{_name}"] = lambda d=_dtype: check_empty(d)
    for _seed in range(100):
        CASES[f"linear-{_name}-{_seed}"] = lambda s=_seed, d=_dtype: check_linear(s, d)
        CASES[f"activation_grad-{_name}-{_seed}"] = lambda s=_seed, d=_dtype: check_activation_grad(s, d)


def watch_accesses() -> None:
    """Check every address of every load and store against ALLOWED, while that is set."""
    from triton.runtime.interpreter import InterpreterBuilder

    def watched(original):
        def access(self, pointers, *rest):
            mask = next(each.data for each in rest if each is not None and each.data.dtype == bool)
            used = np.broadcast_to(pointers.data, mask.shape)[mask].astype(np.int64)
            if ALLOWED and not np.isin(used, np.concatenate(ALLOWED)).all():
                raise AssertionError(f"{original.__name__} out of range")
            return original(self, pointers, *rest)

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


def main(names: list[str]) -> dict[str, str]:
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


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1"
    print(json.dumps(main(sys.argv[1:])))
