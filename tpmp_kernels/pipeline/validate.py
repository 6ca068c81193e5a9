"""The proof that a schedule runs: it cannot deadlock, loses and repeats nothing, and stays within its memory.

Each rank's own order is checked here; that the ranks fit together, in rendezvous.py.
"""

from dataclasses import dataclass
from itertools import product, zip_longest

from tpmp_kernels.errors import ScheduleError
from tpmp_kernels.pipeline.lowering import Lowered, lower
from tpmp_kernels.pipeline.rendezvous import Rendezvous
from tpmp_kernels.pipeline.schedule import Action, Kind, Schedule
from tpmp_kernels.pipeline.schedules import SCHEDULES


@dataclass(frozen=True)
class Report:
    """What the proof counted.

    `peak_live[rank]`: the most (stage, microbatch) activations held at once, from F to the weight gradient.
    """

    actions: int
    messages: int
    peak_live: tuple[int, ...]


def validate(plan: Schedule | Lowered) -> Report:
    """Prove a schedule (lowered here) or a lowered one. Linear in its steps.

    Raises ScheduleError, in one sentence with rank, stage and microbatch, unless

    - every F, and every B and W (or BW) where the schedule has backwards, runs exactly once, on the rank that holds
      the stage, F before B before W, and gradients add up in increasing microbatch order (the same bits everywhere);
    - no rank holds more activations than the closed form of the named schedule allows;
    - every message is posted once and waited for once at each end, after it was produced and before it is consumed,
      both ends post in the same order, and everything finishes without any buffering.
    """
    schedule = plan.schedule if isinstance(plan, Lowered) else plan
    _check_shape(schedule)
    found, peak_live = zip(*(_check_actions(schedule, rank) for rank in range(schedule.ranks)), strict=True)
    _check_complete(schedule, sum(found))
    lowered = plan if isinstance(plan, Lowered) else lower(schedule)
    _check_same_actions(lowered)
    messages = Rendezvous(lowered).run()
    return Report(sum(map(len, schedule.actions)), messages, peak_live)


def _check_shape(schedule: Schedule) -> None:
    stages, ranks, microbatches = schedule.stages, schedule.ranks, schedule.microbatches
    if stages < 1 or microbatches < 1:
        raise ScheduleError(
            f"{schedule.name}: {stages} stages and {microbatches} microbatches; expected at least one of each"
        )
    for stage, rank in enumerate(schedule.placement):
        if not 0 <= rank < ranks:
            raise ScheduleError(f"{schedule.name}: stage {stage} is placed on rank {rank}, but there are {ranks} ranks")


def _check_actions(schedule: Schedule, rank: int) -> tuple[int, int]:
    """All that one rank's own order decides; returns its numbers of F, B and W and its peak of live activations."""
    done: set[tuple[str, int, int]] = set()
    newest = [-1] * schedule.stages
    live = peak = 0
    for action in schedule.actions[rank]:
        kind, stage, microbatch = action
        _check_place(schedule, rank, action)
        for part in kind:
            if (part, stage, microbatch) in done:
                raise _fault(schedule, rank, action, "a second time")
            if part != "F" and (_BEFORE[part], stage, microbatch) not in done:
                raise _fault(schedule, rank, action, f"before its {_BEFORE[part]}")
            done.add((part, stage, microbatch))
        if kind is Kind.F:
            live += schedule.backward
            peak = max(peak, live, 1)
        elif kind is not Kind.B:
            live -= 1
            if microbatch < newest[stage]:
                text = f"after that of microbatch {newest[stage]}, but gradients must add up in increasing order"
                raise _fault(schedule, rank, action, text)
            newest[stage] = microbatch
    _check_memory(schedule, rank, peak)
    return len(done), peak


_BEFORE = {"B": "F", "W": "B"}


def _check_place(schedule: Schedule, rank: int, action: Action) -> None:
    if not (0 <= action.stage < schedule.stages and 0 <= action.microbatch < schedule.microbatches):
        text = f"outside of {schedule.stages} stages and {schedule.microbatches} microbatches"
        raise _fault(schedule, rank, action, text)
    if schedule.placement[action.stage] != rank:
        text = f"but rank {schedule.placement[action.stage]} holds that stage"
        raise _fault(schedule, rank, action, text)
    if action.kind is not Kind.F and not schedule.backward:
        raise _fault(schedule, rank, action, "but the schedule is forward only")


def _fault(schedule: Schedule, rank: int, action: Action, text: str) -> ScheduleError:
    return ScheduleError(f"{schedule.name}: rank {rank} computes {action} {text}")


def _check_memory(schedule: Schedule, rank: int, peak: int) -> None:
    """The closed form counts ranks as stages, so it speaks of schedules that hold stage s on rank s, as built."""
    if schedule.name not in SCHEDULES or schedule.placement != tuple(range(schedule.ranks)):
        return
    bound = SCHEDULES[schedule.name].peak_live(rank, schedule.stages, schedule.microbatches)
    if peak > bound:
        raise ScheduleError(
            f"{schedule.name}: rank {rank} holds {peak} live microbatches at once, more than the {bound} of "
            f"{schedule.stages} stages and {schedule.microbatches} microbatches"
        )


def _check_complete(schedule: Schedule, found: int) -> None:
    """The `found` F, B and W are known to differ and to be in place, so their number decides whether one is missing."""
    parts = "FBW" if schedule.backward else "F"
    if found == len(parts) * schedule.stages * schedule.microbatches:
        return
    there = {(part, stage, m) for actions in schedule.actions for kind, stage, m in actions for part in kind}
    part, stage, m = next(
        each for each in product(parts, range(schedule.stages), range(schedule.microbatches)) if each not in there
    )
    raise ScheduleError(
        f"{schedule.name}: rank {schedule.placement[stage]} never computes {part} of stage {stage}, microbatch {m}"
    )


def _check_same_actions(lowered: Lowered) -> None:
    schedule = lowered.schedule
    if len(lowered.programs) != schedule.ranks:
        raise ScheduleError(f"{schedule.name}: {len(lowered.programs)} programs for {schedule.ranks} ranks")
    for rank, (program, actions) in enumerate(zip(lowered.programs, schedule.actions, strict=True)):
        computes = tuple(step for step in program if type(step) is Action)
        if computes != actions:
            got, want = next((g, w) for g, w in zip_longest(computes, actions) if g != w)
            raise ScheduleError(
                f"{schedule.name}: rank {rank} computes {got or 'nothing'} where the schedule has {want or 'nothing'}"
            )
