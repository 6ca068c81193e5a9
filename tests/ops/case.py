"""A call of an op, and the check that its results and gradients are as near the fp64 oracle as torch's."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from bounds import UNIT, assert_no_worse_than_torch, assert_within
from problem import flat
from torch import Tensor

from tpmp_kernels import ops, reference

# In fp64 torch is its own oracle, without error, and only the order of sums and products is left.
EXACT = 64 * UNIT[torch.float64]
# Torch may be lucky in the few elements of a small result, or in the few numbers of which an outer product is made: as
# many roundings of the inputs, as the oracle itself shows their effect, or of the largest result are allowed too.
ROUNDINGS = 8


@dataclass
class Case:
    """`call(room, *tensors)`, None among the tensors being an argument not given.

    `bound()` are (oracle, largest error) of the result, componentwise, where there is a theorem for one.
    """

    tensors: list[Tensor | None]
    call: Callable[..., Any]
    bound: Callable[[], tuple[Tensor, Tensor]] | None = None


def leaves(case: Case, change: Callable[[Tensor], Tensor] = Tensor.detach) -> list[Tensor | None]:
    """The case's tensors, changed, as leaves that require grad."""
    return [t if t is None or not t.is_floating_point() else change(t).requires_grad_() for t in case.tensors]


def run(case: Case, room, inputs: list[Tensor | None], upstream: list[Tensor] | None = None) -> list[Tensor]:
    """The results and, for `upstream`, the gradients of every input that requires grad."""
    results = flat(case.call(room, *inputs))
    if upstream is None:
        return results
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    grads = torch.autograd.grad(results, wanted, [u.to(r.dtype) for u, r in zip(upstream, results, strict=True)])
    return [*(r.detach() for r in results), *grads]


def check(case: Case) -> None:
    generator = torch.Generator().manual_seed(1)
    fused = run(case, ops, case.tensors)
    unit = min(UNIT[t.dtype] for t in fused)

    def nudged(t: Tensor) -> Tensor:
        """Every element one rounding away, up or down."""
        signs = torch.randint(2, t.shape, generator=generator, dtype=torch.float64).mul_(2).sub_(1)
        return t.double() * (1 + signs * 2 * unit)

    upstream = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype).double() for t in fused]
    got, eager = (run(case, room, leaves(case), upstream) for room in (ops, reference))
    oracle, moved = (run(case, reference, leaves(case, change), upstream) for change in (Tensor.double, nudged))
    largest = max((float(t.abs().max()) for t in oracle if t.numel()), default=0.0)
    for mine, other, truth, near in zip(got, eager, oracle, moved, strict=True):
        assert mine.shape == truth.shape and mine.dtype == other.dtype and mine.isfinite().all()
        if mine.numel() == 0:
            continue
        error, theirs, explained = (float((t.double() - truth).abs().max()) for t in (mine, other, near))
        if mine.dtype == torch.float64:
            allowed = ROUNDINGS * explained + EXACT * largest
        else:
            allowed = 2 * theirs + ROUNDINGS * (explained + UNIT[mine.dtype] * float(truth.abs().max()))
            if case.tensors[0].numel() >= 1000:
                assert_no_worse_than_torch(mine, other, truth)
        assert error <= allowed, f"error {error:.3e}, torch's {theirs:.3e}, of a rounding {explained:.3e}"
    if case.bound is not None:
        assert_within(fused[0], *case.bound())
        assert_within(got[0], *case.bound())
