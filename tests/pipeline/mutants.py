"""Faults for the validator's tests: mutants of schedules and lowered schedules, and an oracle that runs them.

The oracle shares no code with the validator. It carries a lowered schedule out on named values, with transfers that
match by order of posting alone and complete only when both ends have posted, and tells whether the end is right.
"""

import random
from collections import defaultdict
from dataclasses import replace

from tpmp_kernels.pipeline.lowering import Lowered
from tpmp_kernels.pipeline.schedule import Action, Kind, Schedule, Transfer

Programs = list[list[Action | Transfer]]


class Wrong(Exception):
    """The run got stuck, lost something, or computed with the wrong value."""


def runs_right(lowered: Lowered) -> bool:
    try:
        _Run(lowered).finish()
    except Wrong:
        return False
    return True


class _Run:
    def __init__(self, lowered: Lowered):
        self.schedule, self.programs = lowered.schedule, lowered.programs
        ranks = range(len(self.programs))
        self.at = [0 for _ in ranks]
        self.values = [{} for _ in ranks]
        self.handles = [{} for _ in ranks]
        self.sends, self.receives = defaultdict(list), defaultdict(list)
        self.gradients = defaultdict(list)
        self.losses = defaultdict(int)

    def finish(self) -> None:
        while sum(self._turn(rank) for rank in range(len(self.programs))):
            continue
        if any(at < len(program) for at, program in zip(self.at, self.programs, strict=True)):
            raise Wrong("deadlock")
        if any(self.handles) or any(len(self.sends[p]) != len(self.receives[p]) for p in [*self.sends, *self.receives]):
            raise Wrong("a post without its wait or its other end")
        all_microbatches = list(range(self.schedule.microbatches))
        for stage in range(self.schedule.stages):
            if self.schedule.backward and self.gradients[stage] != all_microbatches:
                raise Wrong("gradients")
        if any(self.losses[i] != 1 for i in all_microbatches) or len(self.losses) != len(all_microbatches):
            raise Wrong("losses")

    def _turn(self, rank: int) -> bool:
        moved = False
        while self.at[rank] < len(self.programs[rank]):
            step = self.programs[rank][self.at[rank]]
            done = self._compute(rank, *step) if isinstance(step, Action) else self._transfer(rank, step)
            if not done:
                break
            self.at[rank] += 1
            moved = True
        return moved

    def _take(self, rank: int, name: str, expected: str) -> None:
        if self.values[rank].pop(name, None) != expected:
            raise Wrong(f"{name} is not {expected}")

    def _put(self, rank: int, name: str, value: str) -> None:
        if name in self.values[rank]:
            raise Wrong(f"{name} twice")
        self.values[rank][name] = value

    def _compute(self, rank: int, kind: str, stage: int, i: int) -> bool:
        last = self.schedule.stages - 1
        if self.schedule.placement[stage] != rank:
            raise Wrong("another rank's parameters")
        if kind == "F":
            if stage > 0:
                self._take(rank, f"F{stage - 1}.{i}", f"F{stage - 1}.{i}")
            self._put(rank, f"saved{stage}.{i}", "x")
            if stage < last:
                self._put(rank, f"F{stage}.{i}", f"F{stage}.{i}")
            else:
                self.losses[i] += 1
        if "B" in kind:
            if stage < last:
                self._take(rank, f"B{stage + 1}.{i}", f"B{stage + 1}.{i}")
            self._take(rank, f"saved{stage}.{i}", "x")
            self._put(rank, f"delta{stage}.{i}", "dy")
            if stage > 0:
                self._put(rank, f"B{stage}.{i}", f"B{stage}.{i}")
        if "W" in kind:
            self._take(rank, f"delta{stage}.{i}", "dy")
            self.gradients[stage].append(i)
        return True

    def _transfer(self, rank: int, step: Transfer) -> bool:
        kind, payload, stage, i, peer = step
        name = f"{payload}{stage}.{i}"
        sends = kind.startswith("SEND")
        pair = (rank, peer) if sends else (peer, rank)
        ours, theirs = (self.sends, self.receives) if sends else (self.receives, self.sends)
        key = (sends, name, peer)
        if kind.endswith("POST"):
            if key in self.handles[rank]:
                raise Wrong("posted twice")
            self.handles[rank][key] = len(ours[pair])
            value = self.values[rank].pop(name, None) if sends else name
            if value is None:
                raise Wrong("sends what it does not have")
            ours[pair].append(value)
            return True
        if key not in self.handles[rank]:
            raise Wrong("waits for what it has not posted")
        index = self.handles[rank][key]
        if index >= len(theirs[pair]):
            return False
        if not sends:
            self._put(rank, name, theirs[pair][index])
        del self.handles[rank][key]
        return True


def mutate_schedule(schedule: Schedule, rng: random.Random) -> tuple[str, Schedule]:
    actions = [list(rank) for rank in schedule.actions]
    program = rng.choice([rank for rank in actions if len(rank) > 1] or actions)
    at = rng.randrange(len(program))
    action = program[at]
    what = rng.choice(["drop", "duplicate", "swap", "retag", "move", "backward first"])
    if what == "drop":
        del program[at]
    elif what == "duplicate":
        program.insert(rng.randrange(len(program) + 1), action)
    elif what == "swap":
        at = rng.randrange(max(1, len(program) - 1))
        program[at : at + 2] = reversed(program[at : at + 2])
    elif what == "retag":
        program[at] = action._replace(microbatch=rng.randrange(schedule.microbatches + 1))
    elif what == "move":
        program.insert(rng.randrange(len(program)), program.pop(at))
    else:
        backward = rng.choice([a for a in program if a.kind != Kind.F] or [action])
        forward = Action(Kind.F, backward.stage, backward.microbatch)
        program.remove(backward)
        program.insert(program.index(forward) if forward in program else 0, backward)
    return what, replace(schedule, actions=tuple(map(tuple, actions)))


def mutate_transfers(lowered: Lowered, rng: random.Random) -> tuple[str, Lowered]:
    programs = [list(rank) for rank in lowered.programs]
    program = rng.choice([rank for rank in programs if any(isinstance(step, Transfer) for step in rank)])
    at = rng.choice([i for i, step in enumerate(program) if isinstance(step, Transfer)])
    step = program[at]
    what = rng.choice(
        ["drop", "duplicate", "swap", "retag", "payload", "peer", "defer", "hasten", "wait at once", "kind"]
    )
    if what == "drop":
        del program[at]
    elif what == "duplicate":
        program.insert(rng.randrange(len(program) + 1), step)
    elif what == "swap":
        other = min(at + 1, len(program) - 1)
        program[at], program[other] = program[other], program[at]
    elif what == "retag":
        field = rng.choice(["stage", "microbatch"])
        program[at] = step._replace(**{field: getattr(step, field) + rng.choice([-1, 1])})
    elif what == "payload":
        program[at] = step._replace(payload="B" if step.payload == "F" else "F")
    elif what == "peer":
        program[at] = step._replace(peer=(step.peer + rng.randrange(1, len(programs))) % len(programs))
    elif what == "defer":
        program.insert(rng.randrange(at, len(program)), program.pop(at))
    elif what == "hasten":
        program.insert(rng.randrange(at + 1), program.pop(at))
    elif what == "wait at once":
        posts = [s for s in program if isinstance(s, Transfer) and s.kind == Kind.SEND_POST]
        for post in posts:
            wait = post._replace(kind=Kind.SEND_WAIT)
            program.remove(wait)
            program.insert(program.index(post) + 1, wait)
    else:
        kinds = [Kind.RECV_POST, Kind.RECV_WAIT, Kind.SEND_POST, Kind.SEND_WAIT]
        program[at] = step._replace(kind=rng.choice(kinds))
    return what, Lowered(lowered.schedule, tuple(map(tuple, programs)))
