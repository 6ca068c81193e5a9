"""Which layers make which stage: the contiguous split of a model whose slowest rank is the least slow.

    layers = [LayerCost("embed_tokens", F=0, B=0, W=1, message=8), LayerCost("layers.0", F=4, B=5, W=4, message=8), ...]
    split = partition(layers, ranks=4)
    split.parts[0].layers                                 # range(0, 3)
    simulate(schedule, split.costs())

Embedding and head are layers as any other, so a stage with the head gets fewer of the rest. What is minimised stands in
`partition`; how it is found, in partition_search.py. Where costs come from: models/layer_costs.py.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tpmp_kernels.pipeline.costs import Costs
from tpmp_kernels.pipeline.partition_pins import Pins, pins
from tpmp_kernels.pipeline.partition_search import Problem, find, least_memory
from tpmp_kernels.pipeline.schedules.placement import looped


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs for one microbatch, on one rank (a tensor-parallel shard costs less than the whole).

    F, B, W: times in any one unit, the same for all layers. message: what crosses a border between ranks behind the
    layer, and its gradient back; activation: held from F to the end of W; parameters: weights with their gradients and
    the optimizer's state. These three in any one unit of memory. ValueError for a number that none of this can be.
    """

    name: str
    F: float
    B: float
    W: float
    message: float = 0.0
    activation: float = 0.0
    parameters: float = 0.0

    def __post_init__(self):
        for what in ("F", "B", "W", "message", "activation", "parameters"):
            if not 0 <= (value := getattr(self, what)) < math.inf:
                raise ValueError(f"layer {self.name}: {what} is {value}; expected a finite number of at least 0")


@dataclass(frozen=True)
class Part:
    """One stage: the layers first..last of the model, and their sums. time: F + B + W and what it has to send.

    message: behind its last layer; 0 in the last stage and where the next stage is on the same rank.
    """

    stage: int
    rank: int
    layers: range
    first: str
    last: str
    F: float
    B: float
    W: float
    time: float
    message: float
    activation: float
    parameters: float


@dataclass(frozen=True)
class Partition:
    """All layers, each in one part, in order. Everything that is per rank is indexed by rank.

    rank_times: of one microbatch, what `partition` minimises the largest of. rank_memory: in_flight x the largest
    activation of the rank's stages + the parameters of all of them; for ranks of one stage that is its peak, for others
    a bound. optimal: False where a search over several stages on a rank ended before it had proved the split best.
    """

    parts: tuple[Part, ...]
    rank_times: tuple[float, ...]
    rank_memory: tuple[float, ...]
    optimal: bool
    latency: float = 0.0
    bandwidth: float = math.inf

    def costs(self, **others) -> Costs:
        """For schedules of these stages: their own times and activations, and the largest message between ranks.

        others: pair, early_release and kept of Costs; also latency and bandwidth, in place of those of the partition.
        """
        others = {"latency": self.latency, "bandwidth": self.bandwidth, **others}
        sums = {name: [getattr(part, name) for part in self.parts] for name in ("F", "B", "W", "activation")}
        return Costs(**sums, message=max(part.message for part in self.parts), **others)


class TooLittleMemory(ValueError):
    """No split keeps the memory limit. least: the smallest limit that a split was found for, and the smallest that
    there is where `optimal`; limit: what was given."""

    def __init__(self, limit: float, least: float, optimal: bool, ranks: int):
        self.limit, self.least, self.optimal = limit, least, optimal
        super().__init__(
            f"partition: memory_limit is {limit:g}, but on {ranks} ranks the fullest needs {rounded_up(least)}"
            f"{'' if optimal else ' in the best split found'}; expected at least that, more ranks, or fewer "
            "microbatches in flight"
        )


def partition(
    layers: Sequence[LayerCost],
    *,
    ranks: int,
    chunks: int = 1,
    placement: Sequence[int] | None = None,
    in_flight: Sequence[int] | None = None,
    memory_limit: float | None = None,
    latency: float = 0.0,
    bandwidth: float = math.inf,
    backward: bool = True,
    overrides: Mapping[str, int] | Sequence[str] = (),
) -> Partition:
    """The best split of `layers`, in their order, into stages of at least one layer each.

    Best is: the slowest rank as fast as can be; of such splits, the largest stage as small as can be; of such, the
    fullest rank as empty as can be. A rank's time is the sum, over its stages, of F + B + W and of latency + message /
    bandwidth for each activation or gradient that it sends to another rank. So give latency and bandwidth of what is
    not hidden behind computing, and neither where transfers are hidden.

    - One stage on each rank: dynamic programming, exact, O(stages layers^2). Of what is equal so far, the most even
      split is taken: the least sum of squared times.
    - Several: what a border costs then depends on all others. The most even split is improved by moving a layer's place
      from one stage to another while that gains anything; then a search that leaves out what cannot be better looks at
      all splits, or at the first 50,000 nodes of its tree, a number that is the same on every machine. The result is
      exact where `optimal` is True, and else never slower than the most even split, if that keeps the memory limit.

    placement: the rank of each stage; stage % ranks if None. in_flight: for each rank the most (stage, microbatch)
    activations that it holds at once, from schedules.peak_live or validate; 1 if None. memory_limit: of one rank, for
    its parameters and these activations. backward: False counts F and its messages alone, as in validation. overrides:
    {name: stage}, that layer begins that stage; or names that begin a stage each, whichever.

    Raises ValueError, in one sentence: TooLittleMemory where no split keeps the limit; fewer layers than stages;
    overrides that name no layer or contradict each other; arguments that none of this can be.
    """
    layers, placement = tuple(layers), tuple(looped(ranks, chunks) if placement is None else placement)
    in_flight = tuple([1] * ranks if in_flight is None else in_flight)
    _check(layers, ranks, chunks, placement, in_flight, memory_limit)
    problem = Problem(
        work=[each.F + (each.B + each.W if backward else 0) for each in layers],
        sends=_sends([each.message for each in layers], latency, bandwidth),
        activation=[each.activation for each in layers],
        parameters=[each.parameters for each in layers],
        placement=placement,
        ranks=ranks,
        in_flight=in_flight,
        limit=math.inf if memory_limit is None else memory_limit,
        backward=backward,
        pins=pins([each.name for each in layers], len(placement), overrides) if overrides else Pins(),
    )
    found = find(problem)
    if found is None:
        borders, optimal = least_memory(problem)
        raise TooLittleMemory(memory_limit, max(problem.rank_memory(borders)), optimal, ranks)
    borders, optimal = found
    return Partition(
        parts=tuple(_part(problem, layers, borders, stage) for stage in range(len(placement))),
        rank_times=tuple(problem.rank_times(borders)),
        rank_memory=tuple(problem.rank_memory(borders)),
        optimal=optimal,
        latency=latency,
        bandwidth=bandwidth,
    )


def _part(problem: Problem, layers: tuple[LayerCost, ...], borders: Sequence[int], stage: int) -> Part:
    start, stop = borders[stage], borders[stage + 1]
    crosses = stage + 1 < problem.stages and problem.placement[stage] != problem.placement[stage + 1]
    inside = layers[start:stop]
    sums = {name: sum(getattr(each, name) for each in inside) for name in ("F", "B", "W", "activation", "parameters")}
    return Part(
        stage=stage,
        rank=problem.placement[stage],
        layers=range(start, stop),
        first=inside[0].name,
        last=inside[-1].name,
        time=problem.time(stage, start, stop),
        message=inside[-1].message if crosses else 0,
        **sums,
    )


def _sends(messages: list[float], latency: float, bandwidth: float) -> list[float] | None:
    """What one message behind each layer takes; None where none takes any time, so that exact numbers stay exact."""
    if not 0 <= latency < math.inf or not bandwidth > 0:
        raise ValueError(
            f"partition: latency is {latency} and bandwidth {bandwidth}; expected at least 0, and more than 0 or inf"
        )
    if latency == 0 and bandwidth == math.inf:
        return None
    return [latency + message / bandwidth for message in messages]


def _check(layers, ranks, chunks, placement, in_flight, memory_limit) -> None:
    if ranks < 1 or chunks < 1:
        raise ValueError(f"partition: ranks is {ranks} and chunks {chunks}; expected at least 1 of each")
    if not placement or not all(0 <= rank < ranks for rank in placement):
        raise ValueError(f"partition: placement is {list(placement)}; expected ranks from 0 to {ranks - 1}")
    if len(layers) < len(placement):
        raise ValueError(
            f"partition: {len(placement)} stages need a layer each, got {len(layers)} layers, embedding and head "
            f"included; use at most {len(layers)} stages"
        )
    names = [each.name for each in layers]
    if len(set(names)) < len(names):
        twice = next(name for name, after in pairwise(sorted(names)) if name == after)
        raise ValueError(f"partition: two layers are called {twice!r}; expected a name for each, rename one")
    if len(in_flight) != ranks or min(in_flight) < 0:
        raise ValueError(f"partition: in_flight is {list(in_flight)}; expected a count for each of {ranks} ranks")
    if memory_limit is not None and not memory_limit > 0:
        raise ValueError(f"partition: memory_limit is {memory_limit}; expected more than 0, or None for no limit")


def rounded_up(value: float, digits: int = 4) -> str:
    """The number in `digits` digits, never below it: of a limit, so that what a sentence says is enough."""
    if not value:
        return "0"
    unit = 10.0 ** (math.floor(math.log10(value)) - digits + 1)
    text = f"{math.ceil(value / unit) * unit:.{digits}g}"
    return text if float(text) >= value else f"{(math.ceil(value / unit) + 1) * unit:.{digits}g}"
