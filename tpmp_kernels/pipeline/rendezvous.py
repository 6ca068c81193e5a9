"""A lowered schedule carried out without any buffering: the half of the validator's proof that concerns transfers.

One linear pass is a proof because every step names its message and its peer, so a rank has no choice and a message has
one sender and one receiver. All executions then reach the same end, and one that finishes with no buffering at all
(a message moves only when both ends have posted) finishes under any buffering (Siegel and Avrunin, 2005). The whole
argument is in docs/schedules.md.
"""

from itertools import zip_longest

from tpmp_kernels.errors import ScheduleError
from tpmp_kernels.pipeline import messages
from tpmp_kernels.pipeline.lowering import Lowered
from tpmp_kernels.pipeline.schedule import Action, Group, Kind, Transfer

# What has happened to a message, as bits.
_MADE, _SENT, _RECEIVING, _ARRIVED, _FREED = 1, 2, 4, 8, 16
_ALL = _MADE | _SENT | _RECEIVING | _ARRIVED | _FREED

# A transfer step is refused before `needs` and after `sets`, and stops its rank until `awaits`.
_RULES = {  # kind: (sends, needs, awaits, sets)
    Kind.SEND_POST: (True, _MADE, 0, _SENT),
    Kind.SEND_WAIT: (True, _SENT, _RECEIVING, _FREED),
    Kind.RECV_POST: (False, 0, 0, _RECEIVING),
    Kind.RECV_WAIT: (False, _RECEIVING, _SENT, _ARRIVED),
}


class Rendezvous:
    """Carries out a lowered schedule without any buffering: a rank stops at a wait until its peer has posted.

    The posts of a GROUP are one operation: a wait for one of them stops until the other ends of all have posted.
    Each step is executed once, and a stopped rank is looked at again only when the post that it waits for is reached,
    so the pass is linear. Messages go by their numbers (messages.py).
    """

    def __init__(self, lowered: Lowered):
        self.schedule, self.programs = lowered.schedule, lowered.programs
        self.routes = messages.routes(self.schedule)
        self.state = bytearray(2 * self.schedule.stages * self.schedule.microbatches)
        self.stopped: dict[int, int] = {}  # message -> the rank that waits for its other end
        self.position = [0] * self.schedule.ranks
        # [rank][kind][stage if payload is F, else ~stage]: peer, message of microbatch 0, rule, posts of the channel.
        self.table = [{kind: {} for kind in _RULES} for _ in range(self.schedule.ranks)]
        self.channels: dict[tuple[int, int], tuple[list[int], list[int]]] = {}  # (sender, receiver) -> sent, received
        self._fill_table()
        self.groups: list[dict[int, list[tuple[int, int]]]] = [{} for _ in range(self.schedule.ranks)]

    def _fill_table(self) -> None:
        """An entry for each step that the placement has."""
        for payload, kind in (("F", Kind.F), ("B", Kind.B)):
            for stage, (_, _, message, receiver) in enumerate(self.routes[kind]):
                if receiver is None:
                    continue
                sender = self.schedule.placement[stage]
                posts = self.channels.setdefault((sender, receiver), ([], []))
                for step, (sends, *rule) in _RULES.items():
                    rank, peer = (sender, receiver) if sends else (receiver, sender)
                    self.table[rank][step][stage if payload == "F" else ~stage] = (
                        peer,
                        message,
                        *rule,
                        posts[not sends],
                    )

    def run(self) -> int:
        """The number of messages between ranks."""
        self.ready = list(range(self.schedule.ranks))
        while self.ready:
            self._advance(self.ready.pop())
        self._check_finished()
        self._check_order()
        self._check_waited()
        return sum(len(sent) for sent, _ in self.channels.values())

    def _advance(self, rank: int) -> None:
        """Run a rank until it stops. One flat loop: it is most of the time of the whole proof."""
        program, table, groups, routes = self.programs[rank], self.table[rank], self.groups[rank], self.routes
        state, stopped, microbatches = self.state, self.stopped, self.schedule.microbatches
        for position in range(self.position[rank], len(program)):
            step = program[position]
            if type(step) is Action:
                kind, stage, microbatch = step
                if kind is Kind.PAIR:
                    self._check_joint(rank, position)
                source, sender, target, _ = routes[kind][stage]
                if source is not None and not state[source + microbatch] & (_MADE if sender is None else _ARRIVED):
                    name = messages.name(self.schedule, source + microbatch)
                    raise self._error(rank, step, f"before {name} is there")
                if target is not None:
                    state[target + microbatch] |= _MADE
                continue
            if type(step) is Group:
                self._open_group(rank, position)
                continue
            kind, payload, stage, microbatch, peer = step
            entry = table[kind].get(stage if payload == "F" else ~stage)
            if entry is None or entry[0] != peer or not 0 <= microbatch < microbatches:
                raise self._error(rank, step, f"with rank {peer}, but the placement has no such message")
            _, first, needs, awaits, sets, posts = entry
            message = first + microbatch
            now = state[message]
            if now & (needs | sets) != needs:
                raise self._error(rank, step, "a second time" if now & sets else "before it is computed or posted")
            if not awaits:
                posts.append(message)
                if message in stopped:
                    self.ready.append(stopped.pop(message))
            else:
                missing = message if not now & awaits else self._missing(groups, message) if groups else None
                if missing is not None:
                    stopped[missing] = rank
                    self.position[rank] = position
                    return
            state[message] = now | sets
        self.position[rank] = len(program)

    def _check_joint(self, rank: int, position: int) -> None:
        """Both inputs of a joint step are there before it: no wait stands between its mark and its backward."""
        for step in self.programs[rank][position + 1 :]:
            if type(step) is Action and step.kind is not Kind.F:
                return
            if step.kind in (Kind.RECV_WAIT, Kind.SEND_WAIT):
                raise self._error(rank, step, "within a joint step; wait before its PAIR")

    def _open_group(self, rank: int, position: int) -> None:
        """Note the members of the group: messages, each with the bit that its other end sets."""
        program, (_, posts) = self.programs[rank], self.programs[rank][position]
        members = []
        for step in program[position + 1 : position + 1 + max(posts, 0)]:
            if type(step) is Transfer and not _RULES[step.kind][2]:
                kind, payload, stage, microbatch, _ = step
                entry = self.table[rank][kind].get(stage if payload == "F" else ~stage)
                other = _SENT if kind is Kind.RECV_POST else _RECEIVING
                members.append((entry[1] + microbatch if entry else -1, other))
        if posts < 2 or len(members) != posts:
            raise self._error(rank, program[position], f"with {len(members)} posts of this rank behind it")
        for message, _ in members:
            self.groups[rank][message] = members

    def _missing(self, groups: dict[int, list[tuple[int, int]]], message: int) -> int | None:
        """A message of the same group whose other end has not posted."""
        for member, other in groups.get(message, ()):
            if not self.state[member] & other:
                return member
        return None

    def _error(self, rank: int, step: Action | Transfer | Group, fault: str) -> ScheduleError:
        return ScheduleError(f"{self.schedule.name}: rank {rank} reaches {step} {fault}")

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
        for (sender, receiver), (sent, received) in self.channels.items():
            if sent != received:
                ours, theirs = next((s, r) for s, r in zip_longest(sent, received) if s != r)
                raise ScheduleError(
                    f"{self.schedule.name}: rank {sender} sends {messages.name(self.schedule, ours)} "
                    f"where rank {receiver} receives {messages.name(self.schedule, theirs)}"
                )

    def _check_waited(self) -> None:
        if not set(self.state) - {0, _MADE, _ALL}:
            return
        message, state = next((m, s) for m, s in enumerate(self.state) if s not in (0, _MADE, _ALL))
        at, kind = ("sender", Kind.SEND_WAIT) if state & _ARRIVED else ("receiver", Kind.RECV_WAIT)
        name = messages.name(self.schedule, message)
        raise ScheduleError(f"{self.schedule.name}: the {at} never reaches {kind} of {name}")
