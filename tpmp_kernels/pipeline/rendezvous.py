"""A lowered schedule carried out without any buffering: the half of the validator's proof that concerns transfers.

One linear pass is a proof because every step names its message and its peer, so a rank has no choice and a message has
one sender and one receiver. All executions then reach the same end, and one that finishes with no buffering at all
(a message moves only when both ends have posted) finishes under any buffering (Siegel and Avrunin, 2005).
"""

from collections import defaultdict
from itertools import permutations, zip_longest
from typing import NamedTuple

from tpmp_kernels.errors import ScheduleError
from tpmp_kernels.pipeline.lowering import Lowered
from tpmp_kernels.pipeline.schedule import Action, Kind, Schedule, Transfer

# What has happened to a message, as bits.
_MADE, _SENT, _RECEIVING, _ARRIVED, _FREED = 1, 2, 4, 8, 16
_ALL = _MADE | _SENT | _RECEIVING | _ARRIVED | _FREED


class _Rule(NamedTuple):
    """A transfer step is refused before `needs` and after `sets`, and stops its rank until `awaits`."""

    sends: bool
    needs: int
    awaits: int
    sets: int


_RULES = {
    Kind.SEND_POST: _Rule(True, needs=_MADE, awaits=0, sets=_SENT),
    Kind.SEND_WAIT: _Rule(True, needs=_SENT, awaits=_RECEIVING, sets=_FREED),
    Kind.RECV_POST: _Rule(False, needs=0, awaits=0, sets=_RECEIVING),
    Kind.RECV_WAIT: _Rule(False, needs=_RECEIVING, awaits=_SENT, sets=_ARRIVED),
}


class Rendezvous:
    """Carries out a lowered schedule without any buffering: a rank stops at a wait until its peer has posted.

    Each step is executed once, and a stopped rank is looked at again only when the one post that it waits for is
    reached, so the pass is linear. Messages are numbered: first those of payload F, then those of payload B, each by
    producing stage and microbatch.
    """

    def __init__(self, lowered: Lowered):
        self.schedule, self.programs = lowered.schedule, lowered.programs
        ranks = range(self.schedule.ranks)
        self.first = _first_messages(self.schedule)
        self.state = bytearray(2 * self.schedule.stages * self.schedule.microbatches)
        self.stopped: dict[int, int] = {}  # message -> the rank that waits for its other end
        self.position = [0 for _ in ranks]
        self.posts = [(defaultdict(list), defaultdict(list)) for _ in ranks]  # [rank][sends][peer] -> messages

    def run(self) -> int:
        """The number of messages."""
        self.ready = list(range(self.schedule.ranks))
        while self.ready:
            self._advance(self.ready.pop())
        self._check_finished()
        self._check_order()
        self._check_waited()
        return sum(len(order) for _, sent in self.posts for order in sent.values())

    def _advance(self, rank: int) -> None:
        """Run a rank until it stops. One flat loop: it is most of the time of the whole proof."""
        program, first, posts = self.programs[rank], self.first[rank], self.posts[rank]
        state, stopped, rules, microbatches = self.state, self.stopped, _RULES, self.schedule.microbatches
        for position in range(self.position[rank], len(program)):
            step = program[position]
            if type(step) is Action:
                self._compute(rank, step)
                continue
            kind, payload, stage, microbatch, peer = step
            sends, needs, awaits, sets = rules[kind]
            message = first[sends].get((payload, stage, peer))
            if message is None or not 0 <= microbatch < microbatches:
                raise self._error(rank, step, f"with rank {peer}, but the placement has no such message")
            message += microbatch
            now = state[message]
            if now & (needs | sets) != needs:
                fault = "a second time" if now & sets else "before it is computed or posted"
                raise self._error(rank, step, fault)
            if not awaits:
                posts[sends][peer].append(message)
                if message in stopped:
                    self.ready.append(stopped.pop(message))
            elif not now & awaits:
                stopped[message] = rank
                self.position[rank] = position
                return
            state[message] = now | sets
        self.position[rank] = len(program)

    def _compute(self, rank: int, action: Action) -> None:
        schedule = self.schedule
        source = schedule.source(action)
        if source is not None:
            message = _number(schedule, *source, action.microbatch)
            there = _MADE if schedule.placement[source[1]] == rank else _ARRIVED
            if not self.state[message] & there:
                raise self._error(rank, action, f"before {self._name(message)} is there")
        if action.kind is not Kind.W:
            payload = "F" if action.kind is Kind.F else "B"
            self.state[_number(schedule, payload, action.stage, action.microbatch)] |= _MADE

    def _error(self, rank: int, step: Action | Transfer, fault: str) -> ScheduleError:
        return ScheduleError(f"{self.schedule.name}: rank {rank} reaches {step} {fault}")

    def _name(self, message: int | None) -> str:
        if message is None:
            return "nothing"
        column, microbatch = divmod(message, self.schedule.microbatches)
        payload, stage = divmod(column, self.schedule.stages)
        return f"{'FB'[payload]} of stage {stage}, microbatch {microbatch}"

    def _check_finished(self) -> None:
        stuck = [
            f"rank {rank} waits at {program[position]} for rank {program[position].peer}"
            for rank, (program, position) in enumerate(zip(self.programs, self.position, strict=True))
            if position < len(program)
        ]
        if stuck:
            raise ScheduleError(f"{self.schedule.name} deadlocks: {'; '.join(stuck)}")

    def _check_order(self) -> None:
        """Both ends of a pair of ranks post the same messages in the same order, as transports without tags need."""
        for sender, receiver in permutations(range(self.schedule.ranks), 2):
            sent, received = self.posts[sender][True].get(receiver, ()), self.posts[receiver][False].get(sender, ())
            if sent != received:
                ours, theirs = next((s, r) for s, r in zip_longest(sent, received) if s != r)
                raise ScheduleError(
                    f"{self.schedule.name}: rank {sender} sends {self._name(ours)} "
                    f"where rank {receiver} receives {self._name(theirs)}"
                )

    def _check_waited(self) -> None:
        for message, state in enumerate(self.state):
            if state not in (0, _MADE, _ALL):
                at, kind = ("sender", Kind.SEND_WAIT) if state & _ARRIVED else ("receiver", Kind.RECV_WAIT)
                raise ScheduleError(f"{self.schedule.name}: the {at} never reaches {kind} of {self._name(message)}")


def _number(schedule: Schedule, payload: str, stage: int, microbatch: int) -> int:
    return ((payload == "B") * schedule.stages + stage) * schedule.microbatches + microbatch


def _first_messages(schedule: Schedule) -> list[tuple[dict, dict]]:
    """[rank][sends]: (payload, producing stage, peer) -> the message of microbatch 0, for all that crosses ranks."""
    first = [({}, {}) for _ in range(schedule.ranks)]
    for stage, rank in enumerate(schedule.placement):
        for kind in (Kind.F, Kind.B):
            target = schedule.target(Action(kind, stage, 0))
            if target and schedule.placement[target[1]] != rank:
                peer, number = schedule.placement[target[1]], _number(schedule, target[0], stage, 0)
                first[rank][True][target[0], stage, peer] = number
                first[peer][False][target[0], stage, rank] = number
    return first
