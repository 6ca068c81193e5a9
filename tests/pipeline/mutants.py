"""Faults for the validator's tests: mutants of schedules and lowered schedules, and an oracle that runs them.

The oracle shares no code with the validator. It carries a lowered schedule out on named values, with transfers that
match by order of posting alone and complete only when both ends have posted (those of a group only when all of them
have), and tells whether the end is right.
"""

import random
from collections import defaultdict
from dataclasses import replace

from tpmp_kernels.pipeline.lowering import Lowered
from tpmp_kernels.pipeline.schedule import Action, Group, Kind, Schedule, Transfer


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
        self.indices = [{} for _ in ranks]  # the same, kept after the wait
        self.grouped = [{} for _ in ranks]  # key of a post -> the keys of its whole group
        self.open_group = [(0, []) for _ in ranks]  # posts still to come, keys so far
        self.joint = [[] for _ in ranks]  # what a joint step still has to compute
        self.sends, self.receives = defaultdict(list), defaultdict(list)
        # By stage, in the order in which they add up: those of norms and embeddings in B, the rest in W.
        self.gradients, self.gradients_of_b = defaultdict(list), defaultdict(list)
        self.losses = defaultdict(int)

    def finish(self) -> None:
        while sum(self._turn(rank) for rank in range(len(self.programs))):
            continue
        if any(at < len(program) for at, program in zip(self.at, self.programs, strict=True)):
            raise Wrong("deadlock")
        if any(self.joint) or any(count for count, _ in self.open_group):
            raise Wrong("a joint step or a group without its end")
        if any(self.handles) or any(len(self.sends[p]) != len(self.receives[p]) for p in [*self.sends, *self.receives]):
            raise Wrong("a post without its wait or its other end")
        if any(self.values) and self.schedule.backward:
            raise Wrong("values that nobody consumed")
        all_microbatches = list(range(self.schedule.microbatches))
        for stage in range(self.schedule.stages):
            both = self.gradients[stage], self.gradients_of_b[stage]
            if self.schedule.backward and any(each != all_microbatches for each in both):
                raise Wrong("gradients")
        if any(self.losses[i] != 1 for i in all_microbatches) or len(self.losses) != len(all_microbatches):
            raise Wrong("losses")

    def _turn(self, rank: int) -> bool:
        moved = False
        while self.at[rank] < len(self.programs[rank]):
            step = self.programs[rank][self.at[rank]]
            if self.open_group[rank][0] and not (isinstance(step, Transfer) and step.kind.endswith("POST")):
                raise Wrong("a group of something else than posts")
            if isinstance(step, Group):
                if step.posts < 2:
                    raise Wrong("a group of less than two posts")
                self.open_group[rank] = (step.posts, [])
            elif isinstance(step, Action):
                self._compute(rank, *step)
            elif not self._transfer(rank, step):
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

    def _compute(self, rank: int, kind: str, stage: int, i: int) -> None:
        last = self.schedule.stages - 1
        if self.schedule.placement[stage] != rank:
            raise Wrong("another rank's parameters")
        if self.joint[rank]:
            kinds, which = self.joint[rank].pop(0)
            if kind not in kinds or (kind == "F") != ((stage, i) == which):
                raise Wrong("a joint step of something else")
        if kind == "PAIR":
            self.joint[rank] = [(("F",), (stage, i)), (("B", "BW"), (stage, i))]
            return
        if kind == "F":
            if stage > 0:
                self._take(rank, f"F{stage - 1}.{i}", f"F{stage - 1}.{i}")
            self._put(rank, f"saved{stage}.{i}", "x")
            if stage < last:
                self._put(rank, f"F{stage}.{i}", f"F{stage}.{i}")
            else:
                self.losses[i] += 1
        if kind in ("B", "BW"):
            if stage < last:
                self._take(rank, f"B{stage + 1}.{i}", f"B{stage + 1}.{i}")
            self._take(rank, f"saved{stage}.{i}", "x")
            self._put(rank, f"delta{stage}.{i}", "dy")
            self.gradients_of_b[stage].append(i)
            if stage > 0:
                self._put(rank, f"B{stage}.{i}", f"B{stage}.{i}")
        if kind in ("W", "BW"):
            self._take(rank, f"delta{stage}.{i}", "dy")
            self.gradients[stage].append(i)

    def _transfer(self, rank: int, step: Transfer) -> bool:
        kind, payload, stage, i, peer = step
        name = f"{payload}{stage}.{i}"
        sends = kind.startswith("SEND")
        key = (sends, name, peer)
        if kind.endswith("POST"):
            self._post(rank, key)
            return True
        if self.joint[rank]:
            raise Wrong("waits within a joint step")
        if key not in self.handles[rank]:
            raise Wrong("waits for what it has not posted")
        if any(self._other_end(rank, member) is None for member in self.grouped[rank].get(key, [key])):
            return False
        if not sends:
            self._put(rank, name, self._other_end(rank, key))
        del self.handles[rank][key]
        return True

    def _post(self, rank: int, key: tuple[bool, str, int]) -> None:
        sends, name, peer = key
        if key in self.handles[rank]:
            raise Wrong("posted twice")
        ours = self.sends[rank, peer] if sends else self.receives[peer, rank]
        self.handles[rank][key] = self.indices[rank][key] = len(ours)
        value = self.values[rank].pop(name, None) if sends else name
        if value is None:
            raise Wrong("sends what it does not have")
        ours.append(value)
        count, keys = self.open_group[rank]
        if count:
            keys.append(key)
            self.grouped[rank][key] = keys
            self.open_group[rank] = (count - 1, keys)

    def _other_end(self, rank: int, key: tuple[bool, str, int]) -> str | None:
        """What the other end of that post has posted, by order alone; None where it has not got there yet."""
        sends, _, peer = key
        theirs = self.receives[rank, peer] if sends else self.sends[peer, rank]
        index = self.indices[rank][key]
        return theirs[index] if index < len(theirs) else None


def mutate_schedule(schedule: Schedule, rng: random.Random) -> tuple[str, Schedule]:
    actions = [list(rank) for rank in schedule.actions]
    program = rng.choice([rank for rank in actions if len(rank) > 1] or actions)
    at = rng.randrange(len(program))
    action = program[at]
    what = rng.choice(
        ["drop", "duplicate", "swap", "retag", "chunk", "move", "backward first", "W first", "warm-up", "pair"]
    )
    if what == "drop":
        del program[at]
    elif what == "duplicate":
        program.insert(rng.randrange(len(program) + 1), action)
    elif what == "swap":
        at = rng.randrange(max(1, len(program) - 1))
        program[at : at + 2] = reversed(program[at : at + 2])
    elif what == "retag":
        program[at] = action._replace(microbatch=rng.randrange(schedule.microbatches + 1))
    elif what == "chunk":
        program[at] = action._replace(stage=(action.stage + rng.choice([-1, 1]) * schedule.ranks) % schedule.stages)
    elif what == "move":
        program.insert(rng.randrange(len(program)), program.pop(at))
    elif what == "W first":
        weights = [i for i, a in enumerate(program) if a.kind == Kind.W]
        at = rng.choice(weights or [at])
        program.insert(rng.randrange(at + 1), program.pop(at))
    elif what == "warm-up":  # one forward too many or too few before the first backward
        forwards = [i for i, a in enumerate(program) if a.kind == Kind.F]
        first = next((i for i, a in enumerate(program) if a.kind != Kind.F), 0)
        later = [i for i in forwards if i > first]
        if later and rng.random() < 0.5:
            program.insert(first, program.pop(later[0]))
        elif first:
            program.insert(rng.randrange(first, len(program)), program.pop(first - 1))
    elif what == "pair":
        program.insert(at, Action(Kind.PAIR, action.stage, action.microbatch))
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
        ["drop", "duplicate", "swap", "retag", "payload", "peer", "defer", "hasten", "wait at once", "kind", "group"]
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
    elif what == "group":  # two posts that happen to stand together, or a count that does not fit
        posts = [i for i, s in enumerate(program) if isinstance(s, Transfer) and s.kind.endswith("POST")]
        at = rng.choice(posts or [at])
        program.insert(at, Group(Kind.GROUP, rng.choice([1, 2, 2, 2, 3])))
    else:
        kinds = [Kind.RECV_POST, Kind.RECV_WAIT, Kind.SEND_POST, Kind.SEND_WAIT]
        program[at] = step._replace(kind=rng.choice(kinds))
    return what, Lowered(lowered.schedule, tuple(map(tuple, programs)))
