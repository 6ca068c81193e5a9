"""The proof that a schedule runs: it cannot deadlock, loses and repeats nothing, and stays within its memory.

Each rank's own order is checked here; that the ranks fit together, in rendezvous.py. Why this is a proof for all
timings and all buffer sizes stands in docs/schedules.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from tpmp_kernels.errors import ScheduleError
from tpmp_kernels.pipeline.lowering import Lowered, lower
from tpmp_kernels.pipeline.rendezvous import Rendezvous
from tpmp_kernels.pipeline.schedule import Action, Kind, Schedule
from tpmp_kernels.pipeline.schedules import SCHEDULES
from tpmp_kernels.pipeline.schedules import peak_live as closed_form


@dataclass(frozen=True)
class Report:
    """What the proof counted.

    actions: computes over all ranks; joint steps count as their two. messages: between ranks.
    `peak_live[rank]`: the most (stage, microbatch) activations held at once, from F to the weight gradient.
    """

    actions: int
    messages: int
    peak_live: tuple[int, ...]


def validate(plan: Schedule | Lowered, *, tensor_parallel: Sequence[Lowered] = ()) -> Report:
    """Prove a schedule (lowered here) or a lowered one. Linear in its steps.

    tensor_parallel: what the other tensor-parallel ranks of the same stages run, where these come from elsewhere.

    Raises ScheduleError, in one sentence with rank, stage and microbatch, unless

    - every F, and every B and W (or BW) where the schedule has backwards, runs exactly once, on the rank that holds
      the stage, F before B before W, and gradients add up in increasing microbatch order (the same bits everywhere);
    - every PAIR is followed by an F and a backward, with all that they need there before;
    - no rank holds more activations than the closed form of the named schedule allows;
    - every message is posted once and waited for once at each end, after it was produced and before it is consumed,
      both ends post in the same order, and everything finishes without any buffering, posts of a group as one;
    - the tensor-parallel ranks of a stage run the same steps, so that the collectives within their computes meet in
      the same order.
    """
    schedule = plan.schedule if isinstance(plan, Lowered) else plan
    _check_shape(schedule)
    progress = bytearray(schedule.stages * schedule.microbatches)
    peak_live = tuple(_check_actions(schedule, rank, progress) for rank in range(schedule.ranks))
    _check_complete(schedule, progress)
    lowered = plan if isinstance(plan, Lowered) else lower(schedule)
    _check_same_actions(lowered)
    messages = Rendezvous(lowered).run()
    for other in tensor_parallel:
        _check_same_steps(lowered, other)
    actions = sum(action.kind is not Kind.PAIR for actions in schedule.actions for action in actions)
    return Report(actions, messages, peak_live)


def _check_shape(schedule: Schedule) -> None:
    stages, ranks, microbatches = schedule.stages, schedule.ranks, schedule.microbatches
    if stages < 1 or microbatches < 1:
        raise ScheduleError(
            f"{schedule.name}: {stages} stages and {microbatches} microbatches; expected at least one of each"
        )
    for stage, rank in enumerate(schedule.placement):
        if not 0 <= rank < ranks:
            raise ScheduleError(f"{schedule.name}: stage {stage} is placed on rank {rank}, but there are {ranks} ranks")


# How far a microbatch is in a stage: what each kind finds, and what it leaves.
_FINDS = {Kind.F: 0, Kind.B: 1, Kind.BW: 1, Kind.W: 2}
_LEAVES = {Kind.F: 1, Kind.B: 2, Kind.BW: 3, Kind.W: 3}
_BEFORE = {Kind.B: "F", Kind.BW: "F", Kind.W: "B"}


def _check_actions(schedule: Schedule, rank: int, progress: bytearray) -> int:
    """All that one rank's own order decides; returns its peak of live activations. Marks `progress`, by stage and
    microbatch. One flat loop, for it sees every action."""
    placement, microbatches, backward = schedule.placement, schedule.microbatches, schedule.backward
    # Some gradients add up in B, those of norms and embeddings, and the rest in W.
    in_b, in_w = ([-1] * schedule.stages for _ in range(2))
    added = {Kind.B: (in_b,), Kind.W: (in_w,), Kind.BW: (in_b, in_w)}
    live = peak = 0
    for position, action in enumerate(schedule.actions[rank]):
        kind, stage, microbatch = action
        if not (0 <= stage < len(placement) and 0 <= microbatch < microbatches and placement[stage] == rank):
            raise _misplaced(schedule, rank, action)
        if kind is Kind.PAIR:
            _check_pair(schedule, rank, position)
            continue
        at = stage * microbatches + microbatch
        if progress[at] != _FINDS[kind]:
            again = progress[at] > _FINDS[kind]
            raise _fault(schedule, rank, action, "a second time" if again else f"before its {_BEFORE[kind]}")
        progress[at] = _LEAVES[kind]
        if kind is Kind.F:
            live += backward
            peak = max(peak, live, 1)
        elif not backward:
            raise _fault(schedule, rank, action, "but the schedule is forward only")
        else:
            live -= kind is not Kind.B
            for newest in added[kind]:
                if microbatch < newest[stage]:
                    text = f"after that of microbatch {newest[stage]}, but gradients must add up in increasing order"
                    raise _fault(schedule, rank, action, text)
                newest[stage] = microbatch
    _check_memory(schedule, rank, peak)
    return peak


def _misplaced(schedule: Schedule, rank: int, action: Action) -> ScheduleError:
    if not (0 <= action.stage < schedule.stages and 0 <= action.microbatch < schedule.microbatches):
        text = f"outside of {schedule.stages} stages and {schedule.microbatches} microbatches"
    else:
        text = f"but rank {schedule.placement[action.stage]} holds that stage"
    return _fault(schedule, rank, action, text)


def _check_pair(schedule: Schedule, rank: int, position: int) -> None:
    pair, *step = schedule.actions[rank][position : position + 3]
    if len(step) != 2 or step[0] != (Kind.F, *pair[1:]) or step[1].kind not in (Kind.B, Kind.BW):
        got = " and ".join(map(str, step)) or "nothing"
        raise _fault(schedule, rank, pair, f"followed by {got}; expected that F and then a B or BW")
    if step[0][1:] == step[1][1:]:
        raise _fault(schedule, rank, pair, "whose B needs its own F; expected two different ones")


def _fault(schedule: Schedule, rank: int, action: Action, text: str) -> ScheduleError:
    return ScheduleError(f"{schedule.name}: rank {rank} computes {action} {text}")


def _check_memory(schedule: Schedule, rank: int, peak: int) -> None:
    """Where the schedule has a name that we know, and the placement that goes with it."""
    entry, ranks = SCHEDULES.get(schedule.name), schedule.ranks
    chunks = schedule.stages // ranks
    if entry is None or schedule.placement != entry.placement(ranks, chunks) or entry.chunks not in (None, chunks):
        return
    bound = closed_form(schedule.name, rank, ranks=ranks, microbatches=schedule.microbatches, chunks=chunks)
    if peak > bound:
        raise ScheduleError(
            f"{schedule.name}: rank {rank} holds {peak} activations at once, more than the {bound} of "
            f"{ranks} ranks, {schedule.stages} stages and {schedule.microbatches} microbatches"
        )


def _check_complete(schedule: Schedule, progress: bytearray) -> None:
    done = 3 if schedule.backward else 1
    if progress.count(done) == len(progress):
        return
    stage, m = divmod(next(i for i, each in enumerate(progress) if each != done), schedule.microbatches)
    part, rank = "FBW"[progress[stage * schedule.microbatches + m]], schedule.placement[stage]
    raise ScheduleError(f"{schedule.name}: rank {rank} never computes {part} of stage {stage}, microbatch {m}")


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


def _check_same_steps(lowered: Lowered, other: Lowered) -> None:
    name = lowered.schedule.name
    for rank, (ours, theirs) in enumerate(zip_longest(lowered.programs, other.programs, fillvalue=())):
        if ours != theirs:
            mine, got = next((m, g) for m, g in zip_longest(ours, theirs) if m != g)
            raise ScheduleError(
                f"{name}: tensor-parallel ranks of rank {rank} differ: {mine or 'nothing'} on one where another has "
                f"{got or 'nothing'}; their collectives would not meet: give all of them one schedule"
            )
