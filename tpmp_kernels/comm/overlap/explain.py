"""Which plan a linear gets, and why, in words.

print(explain("linear_all_reduce", x.shape, weight.shape, x.dtype, comm))
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from tpmp_kernels.comm.arguments import Collective
from tpmp_kernels.comm.communicator import Communicator
from tpmp_kernels.comm.emulated import bytes_moved
from tpmp_kernels.comm.overlap.plan import Costs, Plan, bounds, choose, fastest
from tpmp_kernels.comm.overlap.rates import Rates, default_rates, link_of

MODES = ("none", "chunked", "auto")
# The collective, and whether it moves the rows of x (else of Y). Backward moves as much, the other way.
_MOVES = {
    "linear_all_reduce": ("all_reduce", False),
    "copy_linear": ("all_reduce", True),
    "linear_reduce_scatter": ("reduce_scatter", False),
    "all_gather_linear": ("all_gather", True),
}


@dataclass(frozen=True)
class Explanation:
    """The plan of one call, and what it was made from."""

    head: str
    plan: Plan
    rows: int  # of which the chunks are cut
    source: str  # of the rates

    @property
    def r(self) -> float:
        """T_comm / T_gemm."""
        costs = self.plan.costs
        return costs.communication / costs.gemm if costs.gemm else float("inf")

    def __str__(self) -> str:
        plan, costs = self.plan, self.plan.costs
        largest = max(each.stop - each.start for each in bounds(self.rows, plan.chunks))
        cut = f", {plan.chunks} chunks of up to {largest} rows" if plan.mode != "none" else ""
        behind = f", wgrad behind it {_ms(costs.behind)}" if costs.behind else ""
        return "\n".join(
            [
                self.head,
                f"  mode           {plan.mode}{cut}: {plan.why}",
                f"  GEMM           {_ms(costs.gemm)}{behind} ({self.source})",
                f"  communication  {_ms(costs.communication)}, {costs.nbytes / 1e6:.3g} MB, r = {self.r:.2f}",
                f"  expected       {_ms(plan.seconds)} against {_ms(costs.none)} of none, gain {100 * plan.gain:.0f} %",
            ]
        )


def explain(
    name: str,
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    dtype: torch.dtype,
    comm: Communicator,
    *,
    mode: str = "auto",
    chunks: int | None = None,
    rates: Rates | None = None,
    device: str = "cpu",
) -> Explanation:
    """How `name(x, weight, comm, mode=, chunks=, rates=)` will run on tensors of these shapes. Nothing is measured and
    nobody is asked. Of copy_linear it is the backward, which is the pass that communicates."""
    plan = plan_of(name, x_shape, [weight_shape], dtype, comm, mode=mode, chunks=chunks, rates=rates, device=device)
    rates = rates or default_rates(device)
    kind = str(dtype).removeprefix("torch.")
    head = f"{name} in {kind}: x {list(x_shape)}, weight {list(weight_shape)}, {comm.size} ranks, {comm.transport}"
    return Explanation(head, plan, _rows(name, x_shape, comm), rates.source)


def plan_of(
    name: str,
    x_shape: Sequence[int],
    weight_shapes: Sequence[Sequence[int]],
    dtype: torch.dtype,
    comm: Communicator,
    *,
    mode: str = "auto",
    chunks: int | None = None,
    rates: Rates | None = None,
    device: str = "cpu",
) -> Plan:
    """The plan of a call whose x serves some weights [N_i, K]: a function of its arguments alone, which are the same on
    every rank. ValueError for names, shapes and modes."""
    _check(name, x_shape, len(weight_shapes), comm, mode, chunks, device)
    costs = _costs(name, x_shape, weight_shapes, dtype, comm, rates or default_rates(device))
    rows = _rows(name, x_shape, comm)
    if comm.size == 1:
        return Plan("none", 1, costs, "one rank has nobody to talk to")
    if mode == "none":
        return Plan("none", 1, costs, "asked for")
    if mode == "auto":
        return choose(costs, rows, overlaps=comm.overlaps, transport=comm.transport)
    if mode == "signal":
        whole = replace(costs, overhead=0.0)  # no GEMM is cut
        many = chunks or fastest(whole, rows, least=2)
        return Plan("signal", min(many, max(rows, 1)), whole, "asked for")
    if chunks is not None:
        return Plan("chunked", len(bounds(rows, chunks)), costs, "asked for")
    return Plan("chunked", fastest(costs, rows, least=2), costs, "asked for; so many are the fastest")


def _check(
    name: str, x_shape: Sequence[int], weights: int, comm: Communicator, mode: str, chunks: int | None, device: str
) -> None:
    if name not in _MOVES:
        raise ValueError(f"explain: expected one of {', '.join(_MOVES)}, got {name!r}; only these overlap")
    if mode == "signal":
        _check_signal(name, weights, comm, device)
    elif mode not in MODES:
        raise ValueError(f"{name}: mode is {mode!r}; pass one of {', '.join(MODES)}")
    if chunks is not None and (mode not in ("chunked", "signal") or chunks < 1):
        raise ValueError(f'{name}: chunks is {chunks} in mode {mode!r}; pass at least 1, and mode="chunked"')
    if name in ("linear_all_reduce", "copy_linear"):
        return
    if len(x_shape) != 2:
        raise ValueError(f"{name}: x must be a matrix, got {list(x_shape)}; flatten the tokens: x.flatten(0, -2)")
    if name == "linear_reduce_scatter" and x_shape[0] % comm.size:
        raise ValueError(
            f"{name}: x has {x_shape[0]} rows, not divisible by {comm.size} ranks; pad it to "
            f"{-(-x_shape[0] // comm.size) * comm.size}"
        )


def _check_signal(name: str, weights: int, comm: Communicator, device: str) -> None:
    if name not in ("linear_all_reduce", "copy_linear"):
        raise ValueError(f"{name}: signal is for linear_all_reduce and copy_linear; use chunked or auto")
    if comm.size > 1 and comm.gates != device:
        raise ValueError(f"{name}: signal needs CUDA tensors and the nccl transport; use chunked or auto")
    if weights > 1:
        raise ValueError(f"{name}: signal multiplies one weight in a pass, got {weights}; use chunked or auto")


def _rows(name: str, x_shape: Sequence[int], comm: Communicator) -> int:
    """Of which chunks are cut: those of a shard where rows are cut over the ranks."""
    rows = _product(x_shape[:-1])
    return rows // comm.size if name == "linear_reduce_scatter" else rows


def _costs(
    name: str,
    x_shape: Sequence[int],
    weight_shapes: Sequence[Sequence[int]],
    dtype: torch.dtype,
    comm: Communicator,
    rates: Rates,
) -> Costs:
    kind, moves_x = _MOVES[name]
    k, n = x_shape[-1], sum(shape[0] for shape in weight_shapes)
    rows = _product(x_shape[:-1]) * (comm.size if name == "all_gather_linear" else 1)
    gemm = 2 * rows * n * k / _flops(dtype, rates)
    numel = rows * (k if moves_x else n) // (1 if kind == "all_reduce" else comm.size)
    nbytes = bytes_moved(Collective(kind, numel, torch.empty(0, dtype=dtype)), comm.rank, comm.size)
    behind = gemm if name == "copy_linear" else 0.0
    return Costs(gemm, nbytes, link_of(comm, rates), rates.overhead, behind)


def _flops(dtype: torch.dtype, rates: Rates) -> float:
    if dtype not in rates.flops:
        names = ", ".join(str(each) for each in rates.flops)
        raise ValueError(f"overlap: the rates know {names}, but no {dtype}; calibrate for it, or pass no rates")
    return rates.flops[dtype]


def _product(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
