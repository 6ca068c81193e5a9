"""From a schedule to programs: the transfers between the compute actions, in an order that cannot deadlock."""

from collections import defaultdict, deque
from dataclasses import dataclass
from functools import partial

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


# Transfer(...) without its Python-level constructor, which would be a quarter of the time of lowering.
_transfer = partial(tuple.__new__, Transfer)


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
        self.in_flight: list[dict[int, deque[tuple[int, tuple]]]] = [defaultdict(deque) for _ in ranks]
        self.channels = self._channels()
        # By received message: the send posted right before its receive, and where; and where groups begin.
        self.candidates: list[dict[int, tuple[int, int, int]]] = [{} for _ in ranks]
        self.groups: list[list[int]] = [[] for _ in ranks]

    def _channels(self) -> list[dict[int, deque[Action]]]:
        """[receiver][sender]: the actions whose output is sent, in the order in which it is."""
        channels = [{} for _ in range(self.schedule.ranks)]
        for rank, actions in enumerate(self.schedule.actions):
            for action in actions:
                receiver = self.routes[action[0]][action[1]][3]
                if receiver is not None:
                    if rank not in channels[receiver]:
                        channels[receiver][rank] = deque()
                    channels[receiver][rank].append(action)
        return channels

    def run(self) -> tuple[tuple[Step, ...], ...]:
        todo = [rank for rank, actions in enumerate(self.schedule.actions) if actions]
        for rank in todo:
            self._post_receives(rank)
            self._post_receives(rank)
        while todo:
            ready = [rank for rank in todo if self._missing(rank) is None]
            if not ready:
                raise ScheduleError(f"{self.schedule.name} deadlocks: {'; '.join(map(self._stuck, todo))}")
            for rank in ready:
                self._step(rank)
            todo = [rank for rank in todo if self.position[rank] < len(self.schedule.actions[rank])]
        for program, in_flight in zip(self.programs, self.in_flight, strict=True):
            program.extend(_transfer((Kind.SEND_WAIT, *which)) for sends in in_flight.values() for _, which in sends)
        return tuple(map(_with_groups, self.programs, self.groups))

    def _missing(self, rank: int) -> Action | None:
        """What the rank cannot compute yet, if it is next or part of the joint step that is next."""
        actions, position = self.schedule.actions[rank], self.position[rank]
        action = actions[position]
        kind, stage, microbatch = action
        if kind is Kind.PAIR:
            return next((each for each in actions[position + 1 : position + 3] if not self._fed(each)), None)
        source = self.routes[kind][stage][0]
        return None if source is None or self.made[source + microbatch] else action

    def _fed(self, action: Action) -> bool:
        source = self.routes[action.kind][action.stage].source
        return source is None or self.made[source + action.microbatch] == 1

    def _step(self, rank: int) -> None:
        actions, position = self.schedule.actions[rank], self.position[rank]
        action = actions[position]
        if action[0] is Kind.PAIR:
            self._joint(rank, action, actions[position + 1 : position + 3])
            self.position[rank] = position + 3
        else:
            self._wait_receive(rank, action)
            self.programs[rank].append(action)
            self._send(rank, action, wait=True)
            self.position[rank] = position + 1
        self._post_receives(rank)

    def _joint(self, rank: int, mark: Action, unit: tuple[Action, ...]) -> None:
        for action in unit:
            self._wait_receive(rank, action)
        for action in unit:
            self._wait_sends(rank, self.routes[action.kind][action.stage].receiver)
        self.programs[rank].append(mark)
        for action in unit:
            self.programs[rank].append(action)
            self._send(rank, action, wait=False)

    def _wait_receive(self, rank: int, action: Action) -> None:
        kind, stage, microbatch = action
        source, sender, _, _ = self.routes[kind][stage]
        if sender is not None:
            which = ("F", stage - 1, microbatch) if kind is Kind.F else ("B", stage + 1, microbatch)
            self.programs[rank].append(_transfer((Kind.RECV_WAIT, *which, sender)))
            if self.group:
                self._wait_together(rank, source + microbatch)

    def _send(self, rank: int, action: Action, *, wait: bool) -> None:
        """What the action made is there, and on its way if another rank needs it."""
        kind, stage, microbatch = action
        _, _, target, receiver = self.routes[kind][stage]
        if target is not None:
            self.made[target + microbatch] = 1
        if receiver is not None:
            if wait:
                self._wait_sends(rank, receiver)
            which = ("F" if kind is Kind.F else "B", stage, microbatch, receiver)
            self.programs[rank].append(_transfer((Kind.SEND_POST, *which)))
            self.in_flight[rank][receiver].append((target + microbatch, which))

    def _wait_sends(self, rank: int, receiver: int | None) -> None:
        """For the messages to that rank whose receives are posted."""
        sends, posted = self.in_flight[rank].get(receiver), self.posted
        while sends and posted[sends[0][0]]:
            self.programs[rank].append(_transfer((Kind.SEND_WAIT, *sends.popleft()[1])))

    def _post_receives(self, rank: int) -> None:
        """Post what the next action needs whose receive is not posted; for a joint step, what both of its parts do."""
        actions, ahead = self.schedule.actions[rank], self.ahead[rank]
        if ahead == len(actions):
            return
        action = actions[ahead]
        if action[0] is Kind.PAIR:
            self.ahead[rank] = ahead + 3
            for each in actions[ahead + 1 : ahead + 3]:
                self._post_receive(rank, each)
        else:
            self.ahead[rank] = ahead + 1
            before = len(self.programs[rank])
            self._post_receive(rank, action)
            if self.group and len(self.programs[rank]) == before + 1 and before:
                self._remember_candidate(rank, action, before - 1)

    def _post_receive(self, rank: int, action: Action) -> None:
        """Before it, what the same peer sends earlier."""
        kind, _, microbatch = action
        source, sender, _, _ = self.routes[kind][action[1]]
        if sender is None or self.posted[source + microbatch]:
            return
        channel, program = self.channels[rank].get(sender), self.programs[rank]
        while channel:
            kind, stage, of = channel.popleft()
            message = self.routes[kind][stage][2] + of
            self.posted[message] = 1
            program.append(_transfer((Kind.RECV_POST, "F" if kind is Kind.F else "B", stage, of, sender)))
            if message == source + microbatch:
                return

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
            self.programs[rank].append(_transfer((Kind.SEND_WAIT, *sends.popleft()[1])))
            self.groups[rank].append(at)

    def _stuck(self, rank: int) -> str:
        action = self._missing(rank)
        payload, producer = ("F", action.stage - 1) if action.kind is Kind.F else ("B", action.stage + 1)
        holder = self.schedule.placement[producer]
        return f"rank {rank} waits at {action} for {payload} of stage {producer} of rank {holder}"


def _with_groups(program: list[Step], begins: list[int]) -> tuple[Step, ...]:
    """The program with a GROUP mark in front of each of those pairs of posts."""
    if not begins:
        return tuple(program)
    parts, last = [], 0
    for begin in sorted(begins):
        parts += [*program[last:begin], Group(Kind.GROUP, 2)]
        last = begin
    return (*parts, *program[last:])
