"""A schedule carried out with time: when each compute runs, which transfers show, and what is held in memory.

Nothing is chosen here. Every step names its message and its peer, so the times follow from the programs alone, and the
order in which this loop takes the ranks does not matter.
"""

from itertools import accumulate, chain

from tpmp_kernels.errors import ScheduleError
from tpmp_kernels.pipeline import messages
from tpmp_kernels.pipeline.costs import Costs
from tpmp_kernels.pipeline.lowering import Lowered, lower
from tpmp_kernels.pipeline.schedule import Action, Group, Kind, Schedule
from tpmp_kernels.pipeline.simulation import Simulation, memory_changes


def simulate(plan: Schedule | Lowered, costs: Costs | None = None) -> Simulation:
    """Carry out a schedule or a lowered one, from time 0 on all ranks. Linear in its steps.

    A schedule is lowered here, without its joint steps where the costs say that these hide nothing; a lowered one keeps
    what it has.

    costs: all times 1 and transfers for nothing if None.

    - A rank takes its steps in order; computes take the time that `costs` says, everything else takes none by itself.
    - A message moves once both ends have posted it and its link is free, and links serve in order of posting. A wait
      of either end lasts until the message has arrived: nothing is buffered, so a sender too can be held up.
    - Times stay what they are: costs in whole numbers give whole times, and Fractions stay Fractions.

    Raises ValueError where costs for each stage do not fit the stages, and ScheduleError where the programs do not
    finish. That is no proof: what `validate` refuses may have times here that mean nothing.
    """
    costs = costs or Costs()
    lowered = plan if isinstance(plan, Lowered) else lower(plan if costs.joint else plan.apart())
    schedule = lowered.schedule
    run = _Run(lowered, costs)
    run.finish()
    return Simulation(
        schedule=schedule,
        costs=costs,
        starts=tuple(run.starts),
        ends=tuple(run.ends),
        blocked=tuple(run.blocked),
        makespan=max((ends[-1] for ends in run.ends if ends), default=0),
        busy=tuple(run.busy),
        exposed=tuple(sum(end - start for start, end in each) for each in run.blocked),
        peak_memory=_peaks(schedule, costs),
    )


def _peaks(schedule: Schedule, costs: Costs) -> tuple[float, ...]:
    """These follow from each rank's order alone."""
    changes = memory_changes(schedule, costs)
    each = ((changes[kind][stage] for kind, stage, _ in actions) for actions in schedule.actions)
    return tuple(max(accumulate(chain.from_iterable(rank)), default=0) for rank in each)


class _Run:
    """Each step is taken once: a rank that has to wait for a post is taken up again when that post is made."""

    def __init__(self, lowered: Lowered, costs: Costs):
        schedule, self.programs = lowered.schedule, lowered.programs
        self.name, self.actions = schedule.name, schedule.actions
        ranks = range(schedule.ranks)
        self.clock, self.position, self.busy = ([0 for _ in ranks] for _ in range(3))
        self.starts, self.ends, self.blocked = ([[] for _ in ranks] for _ in range(3))
        self.times = costs.times(schedule.stages, schedule.ranks)
        # A factor or term that changes nothing is left out, since 1.0 and 0.0 would turn Fractions into floats.
        self.joint_times = self.times
        if costs.pair != 1:
            self.joint_times = {kind: [costs.pair * time for time in row] for kind, row in self.times.items()}
        self.early_release = costs.early_release
        self.occupied, self.latency = costs.occupied or 0, costs.latency or 0
        routes = messages.routes(schedule)
        self.first = {payload: [route.target for route in routes[Kind(payload)]] for payload in "FB"}
        # By message: when the first of its ends posted and then when both had; when it arrives.
        self.posted: list[float | None] = [None] * (2 * schedule.stages * schedule.microbatches)
        self.arrival: list[float | None] = [None] * len(self.posted)
        self.free: dict[tuple[int, int], float] = {}  # (sender, receiver) -> when that link is free again
        self.stopped: dict[int, int] = {}  # message -> the rank that waits for the post of its other end

    def finish(self) -> None:
        self.ready = list(range(len(self.programs)))
        while self.ready:
            self._advance(self.ready.pop())
        for rank, (program, position) in enumerate(zip(self.programs, self.position, strict=True)):
            if position < len(program):
                step = program[position]
                raise ScheduleError(
                    f"{self.name}: rank {rank} waits at {step} for a post that never comes from rank {step.peer}; "
                    f"validate tells what is wrong with the schedule"
                )

    def _advance(self, rank: int) -> None:
        """Run a rank until it waits for something that has no time yet. One flat loop: it is most of all the time.

        GROUP takes no time: lowering groups only posts whose waits stand together, and these end together either way.
        """
        program, clock, first = self.programs[rank], self.clock[rank], self.first
        posted, arrival, blocked = self.posted, self.arrival, self.blocked[rank]
        starts, ends, times = self.starts[rank], self.ends[rank], self.times
        busy, joint_end = self.busy[rank], None
        pair, forward, send_post, recv_post = Kind.PAIR, Kind.F, Kind.SEND_POST, Kind.RECV_POST  # faster than by class
        for position in range(self.position[rank], len(program)):
            step = program[position]
            if type(step) is Action:
                kind, stage, _ = step
                starts.append(clock)
                if kind is pair:
                    times = self.joint_times
                    joint_end = self._joint_end(rank)
                    ends.append(joint_end)
                    continue
                took = times[kind][stage]
                busy += took
                clock += took
                ends.append(clock)
                if joint_end is not None and kind is not forward:
                    times, joint_end = self.times, None
                continue
            if type(step) is Group:
                continue
            kind, payload, stage, microbatch, peer = step
            message = first[payload][stage] + microbatch
            if kind is send_post or kind is recv_post:
                now = clock if joint_end is None or self.early_release else joint_end
                other = posted[message]
                posted[message] = now if other is None or now > other else other
                if other is not None:
                    self._start(message, (rank, peer) if kind is send_post else (peer, rank))
                continue
            arrived = arrival[message]
            if arrived is None:
                self.stopped[message] = rank
                break
            if arrived > clock:
                begin = posted[message]
                if arrived > begin:
                    blocked.append((begin if begin > clock else clock, arrived))
                clock = arrived
        else:
            position = len(program)
        self.position[rank], self.clock[rank], self.busy[rank] = position, clock, busy

    def _joint_end(self, rank: int) -> float:
        """When the joint step ends whose PAIR has just got its start."""
        at = len(self.starts[rank])
        end = self.starts[rank][-1]
        for kind, stage, _ in self.actions[rank][at : at + 2]:
            end += self.joint_times[kind][stage]
        return end

    def _start(self, message: int, link: tuple[int, int]) -> None:
        """Both ends have posted the message."""
        start = self.posted[message]
        if self.occupied:
            start = max(start, self.free.get(link, start))
            self.free[link] = start + self.occupied
        self.arrival[message] = start + self.occupied + self.latency
        if message in self.stopped:
            self.ready.append(self.stopped.pop(message))
