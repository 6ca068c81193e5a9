"""From a schedule to programs: the transfers between the compute actions, in an order that cannot deadlock."""

from collections import deque
from dataclasses import dataclass

from tpmp_kernels.errors import ScheduleError
from tpmp_kernels.pipeline import messages
from tpmp_kernels.pipeline.schedule import Action, Group, Kind, Schedule, Transfer

Step = Action | Transfer | Group


@dataclass(frozen=True)
class Lowered:
    """`programs[rank]`: the compute actions of `schedule` in their order, with the transfers between them."""

    schedule: Schedule
    programs: tuple[tuple[Step, ...], ...]


def lower(schedule: Schedule, *, group: bool = False) -> Lowered:
    """Add the transfers. Stages on the same rank hand over without one.

    Around its compute i a rank runs RECV_WAIT for i, compute i, SEND_WAIT of earlier messages to the same peer,
    SEND_POST of i, RECV_POST for i + 2; the sends that are left are waited for at the end. Why:

    - The receive for i + 1 is posted before compute i, so its data travels under that compute, and no sender waits for
      a rank that is itself waiting to send: that is the deadlock of 1F1B lowered naively.
    - Receives from one peer are posted in the order in which that peer sends, even where a later one is consumed
      first: transports such as NCCL match by order alone.
    - A send has the whole next compute to complete, and a rank keeps one message to each peer in flight (a few where
      the next point says so). Waiting at once would stop it until the peer gets there; waiting only at the end would
      keep a buffer for every microbatch.
    - The programs are written down in the order of one execution, all ranks in step, and a send is waited for only once
      that execution has reached its receive. So they finish by construction wherever the compute orders can, also for
      orders such as interleaved zero-bubble, where a fixed limit of one message in flight deadlocks.

    A joint step counts as one compute with two inputs; its F's output leaves before its B starts, and no wait stands
    within it. With `group`, a SEND_POST of i and a RECV_POST for i + 2 start in one call where the waits of both can
    stand together before compute i + 2. That halves the launches of a transport whose calls are kernels; the send then
    has one compute to complete, so it is for links where that is enough.

    Raises ScheduleError where the compute orders themselves wait in a circle or for something that is never computed.
    """
    return Lowered(schedule, _Lowering(schedule, group).run())


class _Lowering:
    """`made` and `posted` (receives), by message, say how far the execution is that the programs are written along."""

    def __init__(self, schedule: Schedule, group: bool):
        self.schedule, self.group = schedule, group
        ranks = range(schedule.ranks)
        self.routes = messages.routes(schedule)
        self.programs: list[list[Step]] = [[] for _ in ranks]
        self.position = [0 for _ in ranks]
        self.ahead = [0 for _ in ranks]  # the first action whose receive is not posted yet
        self.made = bytearray(2 * schedule.stages * schedule.microbatches)
        self.posted = bytearray(len(self.made))
        self.in_flight: list[dict[int, deque[tuple[int, Transfer]]]] = [{} for _ in ranks]
        self.channels = self._channels()
        # By received message: the send posted right before its receive, and where; and where groups begin.
        self.candidates: list[dict[int, tuple[int, int, int]]] = [{} for _ in ranks]
        self.groups: list[list[int]] = [[] for _ in ranks]

    def _channels(self) -> list[dict[int, deque[tuple[int, str, int, int]]]]:
        """[receiver][sender]: the messages (number, payload, stage, microbatch) in the order in which they are sent."""
        channels = [{} for _ in range(self.schedule.ranks)]
        for rank, actions in enumerate(self.schedule.actions):
            for kind, stage, microbatch in actions:
                _, _, target, receiver = self.routes[kind][stage]
                if receiver is not None:
                    payload = "F" if kind is Kind.F else "B"
                    channel = channels[receiver].setdefault(rank, deque())
                    channel.append((target + microbatch, payload, stage, microbatch))
        return channels

    def run(self) -> tuple[tuple[Step, ...], ...]:
        todo = [rank for rank, actions in enumerate(self.schedule.actions) if actions]
        for rank in todo:
            self._post_receives(rank)
            self._post_receives(rank)
        while todo:
            ready = [rank for rank in todo if self._ready(rank)]
            if not ready:
                raise ScheduleError(f"{self.schedule.name} deadlocks: {'; '.join(map(self._stuck, todo))}")
            for rank in ready:
                self._step(rank)
            todo = [rank for rank in todo if self.position[rank] < len(self.schedule.actions[rank])]
        for program, in_flight in zip(self.programs, self.in_flight, strict=True):
            program.extend(wait for sends in in_flight.values() for _, wait in sends)
        return tuple(map(_with_groups, self.programs, self.groups))

    def _unit(self, rank: int, position: int) -> tuple[Action, ...]:
        """What is computed as one from there on: one action, or the two of a joint step."""
        actions = self.schedule.actions[rank]
        action = actions[position]
        return actions[position + 1 : position + 3] if action.kind is Kind.PAIR else (action,)

    def _ready(self, rank: int) -> bool:
        for kind, stage, microbatch in self._unit(rank, self.position[rank]):
            source = self.routes[kind][stage].source
            if source is not None and not self.made[source + microbatch]:
                return False
        return True

    def _step(self, rank: int) -> None:
        program, unit = self.programs[rank], self._unit(rank, self.position[rank])
        for action in unit:
            kind, stage, microbatch = action
            source, sender, _, _ = self.routes[kind][stage]
            if sender is not None:
                payload, producer = ("F", stage - 1) if kind is Kind.F else ("B", stage + 1)
                program.append(Transfer(Kind.RECV_WAIT, payload, producer, microbatch, sender))
                if self.group:
                    self._wait_together(rank, source + microbatch)
        if len(unit) == 2:
            for action in unit:
                self._wait_sends(rank, self.routes[action.kind][action.stage].receiver)
            program.append(self.schedule.actions[rank][self.position[rank]])
        for action in unit:
            self._compute(rank, action, joint=len(unit) == 2)
        self.position[rank] += 1 if len(unit) == 1 else 3
        self._post_receives(rank)

    def _compute(self, rank: int, action: Action, *, joint: bool) -> None:
        kind, stage, microbatch = action
        program = self.programs[rank]
        program.append(action)
        _, _, target, receiver = self.routes[kind][stage]
        if target is not None:
            self.made[target + microbatch] = 1
        if receiver is not None:
            if not joint:
                self._wait_sends(rank, receiver)
            payload = "F" if kind is Kind.F else "B"
            wait = Transfer(Kind.SEND_WAIT, payload, stage, microbatch, receiver)
            self.in_flight[rank].setdefault(receiver, deque()).append((target + microbatch, wait))
            program.append(Transfer(Kind.SEND_POST, payload, stage, microbatch, receiver))

    def _wait_sends(self, rank: int, receiver: int | None) -> None:
        """For the messages to that rank whose receives are posted."""
        sends = self.in_flight[rank].get(receiver)
        while sends and self.posted[sends[0][0]]:
            self.programs[rank].append(sends.popleft()[1])

    def _post_receives(self, rank: int) -> None:
        """Post what the next unit needs whose receives are not posted, and before it what the peer sends earlier."""
        if self.ahead[rank] >= len(self.schedule.actions[rank]):
            return
        unit, program, begin = self._unit(rank, self.ahead[rank]), self.programs[rank], len(self.programs[rank])
        self.ahead[rank] += 1 if len(unit) == 1 else 3
        for kind, stage, microbatch in unit:
            source, sender, _, _ = self.routes[kind][stage]
            if sender is None or self.posted[source + microbatch]:
                continue
            channel = self.channels[rank].get(sender)
            while channel:
                message, *which = channel.popleft()
                self.posted[message] = 1
                program.append(Transfer(Kind.RECV_POST, *which, sender))
                if message == source + microbatch:
                    break
        if self.group and len(unit) == 1 and len(program) == begin + 1 and begin:
            self._remember_candidate(rank, unit[0], begin - 1)

    def _remember_candidate(self, rank: int, action: Action, at: int) -> None:
        before = self.programs[rank][at]
        if type(before) is Transfer and before.kind is Kind.SEND_POST:
            sent = self.in_flight[rank][before.peer][-1][0]
            received = self.routes[action.kind][action.stage].source + action.microbatch
            self.candidates[rank][received] = (sent, before.peer, at)

    def _wait_together(self, rank: int, received: int) -> None:
        """After the RECV_WAIT of that message: the SEND_WAIT of the send posted with it, if it can be waited for."""
        sent, peer, at = self.candidates[rank].pop(received, (None, None, None))
        sends = self.in_flight[rank].get(peer)
        if sends and sends[0][0] == sent and self.posted[sent]:
            self.programs[rank].append(sends.popleft()[1])
            self.groups[rank].append(at)

    def _stuck(self, rank: int) -> str:
        for action in self._unit(rank, self.position[rank]):
            kind, stage, microbatch = action
            source = self.routes[kind][stage].source
            if source is not None and not self.made[source + microbatch]:
                payload, producer = ("F", stage - 1) if kind is Kind.F else ("B", stage + 1)
                holder = self.schedule.placement[producer]
                return f"rank {rank} waits at {action} for {payload} of stage {producer} of rank {holder}"
        raise AssertionError(f"rank {rank} is not stuck")


def _with_groups(program: list[Step], begins: list[int]) -> tuple[Step, ...]:
    """The program with a GROUP mark in front of each of those pairs of posts."""
    parts, last = [], 0
    for begin in sorted(begins):
        parts += [*program[last:begin], Group(Kind.GROUP, 2)]
        last = begin
    return (*parts, *program[last:])
