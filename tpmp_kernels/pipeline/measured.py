"""A pass that ran, in the simulator's own format: to be drawn over what was predicted, and to predict from.

took = measured(runtime.lowered, times)                 times[rank]: StepResult.times of every rank
predicted = simulate(runtime.lowered, took.costs)       the same orders with each action's median time
"""

from collections import defaultdict
from collections.abc import Sequence
from statistics import median

from tpmp_kernels.pipeline.costs import Costs
from tpmp_kernels.pipeline.lowering import Lowered
from tpmp_kernels.pipeline.schedule import Action, Kind
from tpmp_kernels.pipeline.simulation import Simulation

Times = Sequence[Sequence[tuple[float, float]]]


def measured(lowered: Lowered, times: Times) -> Simulation:
    """What the ranks did, in seconds from the start of the first. times[rank]: (start, end) of each step of
    `lowered.programs[rank]`, of one clock for all ranks.

    A wait is exposed transfer (`blocked`) from where both ends had posted the message; before that, it is for the
    compute of another rank. costs: the median time of each kind on each stage, and for the latency that of these
    exposed parts. Memory is not measured: peak_memory is 0. Raises ValueError where times and steps are not as many.
    """
    _check(lowered, times)
    origin = min((row[0][0] for row in times if row), default=0.0)
    steps = _timed(lowered, times, origin)
    computes = [[each for each in row if type(each[0]) is Action] for row in steps]
    blocked = _blocked(steps)
    return Simulation(
        schedule=lowered.schedule,
        costs=_costs(lowered, computes, blocked),
        starts=tuple([start for _, start, _ in row] for row in computes),
        ends=tuple([end for _, _, end in row] for row in computes),
        blocked=tuple(blocked),
        makespan=max((row[-1][2] for row in computes if row), default=0.0),
        busy=tuple(sum(end - start for _, start, end in row) for row in computes),
        exposed=tuple(sum(end - start for start, end in row) for row in blocked),
        peak_memory=tuple(0.0 for _ in steps),
    )


def exposed_transfer(lowered: Lowered, times: Times) -> tuple[float, ...]:
    """Of each rank, the seconds in which it waited for a message under way: `exposed` of `measured`, alone."""
    _check(lowered, times)
    return tuple(sum(end - start for start, end in row) for row in _blocked(_timed(lowered, times, 0.0)))


def _check(lowered: Lowered, times: Times) -> None:
    for rank, program in enumerate(lowered.programs):
        if len(times[rank]) != len(program):
            raise ValueError(
                f"measured: rank {rank} has {len(times[rank])} times for the {len(program)} steps of its program; pass "
                "the times of a whole pass of the same schedule"
            )


def _timed(lowered: Lowered, times: Times, origin: float) -> list[list[tuple]]:
    """Of each rank (step, start, end), from `origin` on."""
    return [
        [(step, start - origin, end - origin) for step, (start, end) in zip(program, row, strict=True)]
        for program, row in zip(lowered.programs, times, strict=True)
    ]


def _blocked(steps: Sequence[Sequence[tuple]]) -> list[list[tuple[float, float]]]:
    """Of each rank, the parts of its waits in which the message was under way."""
    posted: dict[tuple, float] = defaultdict(float)  # by message: when the later of its ends had posted it
    for row in steps:
        for step, _, end in row:
            if step.kind in (Kind.SEND_POST, Kind.RECV_POST):
                message = step.payload, step.stage, step.microbatch
                posted[message] = max(posted[message], end)
    blocked = []
    for row in steps:
        waits = [each for each in row if each[0].kind in (Kind.RECV_WAIT, Kind.SEND_WAIT)]
        begun = [(max(start, posted[w.payload, w.stage, w.microbatch]), end) for w, start, end in waits]
        blocked.append([(start, end) for start, end in begun if end > start])
    return blocked


def _costs(lowered: Lowered, computes: Sequence[Sequence[tuple]], blocked: Sequence[Sequence[tuple]]) -> Costs:
    took: dict[tuple[Kind, int], list[float]] = defaultdict(list)
    for row in computes:
        for action, start, end in row:
            took[action.kind, action.stage].append(end - start)
    stages = range(lowered.schedule.stages)

    def of(kind: Kind) -> list[float]:
        return [median(took.get((kind, stage), [0.0])) for stage in stages]

    waits = [end - start for row in blocked for start, end in row]
    return Costs(F=of(Kind.F), B=of(Kind.B), W=of(Kind.W), BW=of(Kind.BW), latency=median(waits) if waits else 0.0)
