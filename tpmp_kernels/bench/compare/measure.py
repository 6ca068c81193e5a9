"""Contenders of one problem: their errors against fp64, and their times taken in turns."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tpmp_kernels import ops, reference
from tpmp_kernels.bench.compare.problems import Problem
from tpmp_kernels.bench.timing import Timing, interleave, rotating

EAGER, COMPILED = "eager", "torch.compile"
CACHE_BYTES = 64 << 20  # operands of a layer come from memory: other layers ran since its last call


@dataclass(frozen=True)
class Error:
    """The largest error of outputs and gradients against fp64, each over the largest value of its tensor, and the
    same over plain torch's. `wrong`: one of them is more than twice as far as plain torch, plus one rounding, or a few
    where a tensor is so small that plain torch may be lucky."""

    relative: float
    of_torch: float
    wrong: bool


def contenders(problem: Problem, device: str) -> dict[str, Callable[..., object] | str]:
    """Name -> call(*operands), or the reason why it cannot run here. Plain torch is the first."""
    found: dict[str, Callable[..., object] | str] = {EAGER: partial(problem.call, reference)}
    found[COMPILED] = torch.compile(partial(problem.call, reference), dynamic=False)
    for backend in ("cpu", "triton"):
        runs = backend == "cpu" or device == "cuda"
        found[f"tpmp {backend}"] = _on(backend, problem.call) if runs else "needs a CUDA device"
    ours = "triton" if device == "cuda" else "cpu"
    found |= {f"tpmp {name}": _on(ours, call) for name, call in problem.forms.items()}
    return found | dict(problem.peers)


def _on(backend: str, call: Callable) -> Callable[..., object]:
    def run(*operands: Tensor) -> object:
        with ops.use_backend(backend):
            return call(ops, *operands)

    return run


def step(call: Callable[..., object], *, backward: bool) -> Callable[..., list[Tensor]]:
    """`call` on operands: its outputs, and behind them the gradients of every floating operand if `backward`."""

    def run(*operands: Tensor) -> list[Tensor]:
        if not backward:
            with torch.no_grad():
                return _flat(call(*operands))
        leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in operands]
        outputs = _flat(call(*leaves))
        wanted = [t for t in leaves if t.requires_grad]
        return [*(t.detach() for t in outputs), *torch.autograd.grad(outputs, wanted, [_upstream(t) for t in outputs])]

    return run


def _upstream(output: Tensor) -> Tensor:
    """Fixed and not uniform; 1 for a scalar."""
    if output.dim() == 0:
        return torch.ones_like(output)
    return (
        torch.linspace(0.5, 1.5, output.numel(), dtype=torch.float32, device=output.device)
        .view(output.shape)
        .to(output.dtype)
    )


def _flat(outputs: object) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def errors(
    problem: Problem, calls: Mapping[str, Callable[..., object]], operands: tuple[Tensor, ...], *, backward: bool
) -> dict[str, Error]:
    """Of each contender on these operands. fp64 in plain torch is taken for exact."""
    wide = tuple(t.double() if t.is_floating_point() else t for t in operands)
    exact = step(partial(problem.call, reference), backward=backward)(*wide)
    unit = torch.finfo(operands[0].dtype).eps / 2
    allowed = [unit * (8 if truth.numel() < 1000 else 1) for truth in exact]
    found = {name: _distances(step(call, backward=backward)(*operands), exact) for name, call in calls.items()}
    return {name: _error(gaps, found[EAGER], allowed) for name, gaps in found.items()}


def _distances(results: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [
        (out.double() - truth).abs().max().item() / max(truth.abs().max().item(), torch.finfo(torch.float64).tiny)
        for out, truth in zip(results, exact, strict=True)
    ]


def _error(ours: list[float], eager: list[float], allowed: list[float]) -> Error:
    # `not <=` rather than `>`: a NaN is wrong
    wrong = any(not our <= 2 * theirs + extra for our, theirs, extra in zip(ours, eager, allowed, strict=True))
    return Error(max(ours), max(ours) / max(eager) if max(eager) else float(max(ours) > 0), wrong)


def times(
    calls: Mapping[str, Callable[..., object]],
    draws: list[tuple[Tensor, ...]],
    *,
    backward: bool,
    rounds: int,
    iterations: int,
) -> dict[str, Timing]:
    """Each contender over `draws` in rotation, in turns with the others."""
    cuda = draws[0][0].is_cuda
    steps = {name: rotating(step(call, backward=backward), draws) for name, call in calls.items()}
    sync = torch.cuda.synchronize if cuda else lambda: None
    return interleave(steps, rounds=rounds, iterations=iterations, warmup=2, sync=sync)


def draws_of(problem: Problem, dtype: torch.dtype, device: str) -> list[tuple[Tensor, ...]]:
    """Sets of operands that together exceed the cache."""
    first = problem.draw(dtype, device, 0)
    nbytes = sum(t.numel() * t.element_size() for t in first)
    cache = 2 * torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else CACHE_BYTES
    return [first, *(problem.draw(dtype, device, seed) for seed in range(1, cache // nbytes + 1))]


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Torch uses `count` threads of the CPU; None leaves it alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
