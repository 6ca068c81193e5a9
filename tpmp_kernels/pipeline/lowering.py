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
    walk = _Walk(schedule, group)
    todo = [rank for rank in walk.ranks if rank.actions]
    while todo:
        ready = [rank for rank in todo if rank.missing() is None]
        if not ready:
            raise ScheduleError(f"{schedule.name} deadlocks: {'; '.join(rank.stuck() for rank in todo)}")
        for rank in ready:
            rank.step()
        todo = [rank for rank in todo if rank.position < rank.length]
    return Lowered(schedule, tuple(rank.finished() for rank in walk.ranks))


# Transfer(...) without its Python-level constructor, which would be a quarter of the time of lowering.
_transfer = partial(tuple.__new__, Transfer)


class _Walk:
    """The execution that the programs are written along: `made` and `posted` (receives) say, by message, how far it
    is."""

    def __init__(self, schedule: Schedule, group: bool):
        self.schedule, self.group = schedule, group
        self.routes = messages.routes(schedule)
        self.made = bytearray(2 * schedule.stages * schedule.microbatches)
        self.posted = bytearray(len(self.made))
        self.channels = self._channels()
        self.ranks = [_Rank(self, rank) for rank in range(schedule.ranks)]

    def _channels(self) -> list[dict[int, deque[Action]]]:
        """[receiver][sender]: the actions whose output is sent, in the order in which it is."""
        channels = [defaultdict(deque) for _ in range(self.schedule.ranks)]
        for rank, actions in enumerate(self.schedule.actions):
            for action in actions:
                receiver = self.routes[action[0]][action[1]][3]
                if receiver is not None:
                    channels[receiver][rank].append(action)
        return channels


class _Rank:
    """One rank of the execution, and its program so far."""

    def __init__(self, walk: _Walk, rank: int):
        self.rank, self.schedule, self.group = rank, walk.schedule, walk.group
        self.routes, self.made, self.posted = walk.routes, walk.made, walk.posted
        self.actions, self.length = walk.schedule.actions[rank], len(walk.schedule.actions[rank])
        self.channels = walk.channels[rank]  # by sender
        self.program: list[Step] = []
        self.position = 0
        self.ahead = 0  # the first action whose receive is not posted yet
        self.in_flight: dict[int, deque[tuple[int, Transfer]]] = defaultdict(deque)  # by receiver: message, SEND_WAIT
        # By received message: the send posted right before its receive, its receiver, and where; where groups begin.
        self.candidates: dict[int, tuple[int, int, int]] = {}
        self.groups: list[int] = []
        self._post_receives()
        self._post_receives()

    def missing(self) -> Action | None:
        """What the rank cannot compute yet, if it is next or part of the joint step that is next."""
        action = self.actions[self.position]
        kind, stage, microbatch = action
        if kind is Kind.PAIR:
            return next((each for each in self._joint(self.position) if not self._fed(each)), None)
        source = self.routes[kind][stage][0]
        return None if source is None or self.made[source + microbatch] else action

    def step(self) -> None:
        action = self.actions[self.position]
        if action[0] is Kind.PAIR:
            self._step_joint(action)
            self.position += 3
        else:
            self._wait_receive(action)
            self.program.append(action)
            self._send(action, wait=True)
            self.position += 1
        self._post_receives()

    def finished(self) -> tuple[Step, ...]:
        """The program, with the waits that are left and a GROUP mark in front of each pair of posts that is one."""
        self.program.extend(wait for sends in self.in_flight.values() for _, wait in sends)
        parts, last = [], 0
        for begin in sorted(self.groups):
            parts += [*self.program[last:begin], Group(Kind.GROUP, 2)]
            last = begin
        return (*parts, *self.program[last:])

    def stuck(self) -> str:
        action = self.missing()
        payload, producer = ("F", action.stage - 1) if action.kind is Kind.F else ("B", action.stage + 1)
        holder = self.schedule.placement[producer]
        return f"rank {self.rank} waits at {action} for {payload} of stage {producer} of rank {holder}"

    def _joint(self, position: int) -> tuple[Action, ...]:
        return self.actions[position + 1 : position + 3]

    def _fed(self, action: Action) -> bool:
        source = self.routes[action.kind][action.stage].source
        return source is None or self.made[source + action.microbatch] == 1

    def _step_joint(self, mark: Action) -> None:
        unit = self._joint(self.position)
        for action in unit:
            self._wait_receive(action)
        for action in unit:
            self._wait_sends(self.routes[action.kind][action.stage].receiver)
        self.program.append(mark)
        for action in unit:
            self.program.append(action)
            self._send(action, wait=False)

    def _wait_receive(self, action: Action) -> None:
        kind, stage, microbatch = action
        source, sender, _, _ = self.routes[kind][stage]
        if sender is not None:
            payload, producer = ("F", stage - 1) if kind is Kind.F else ("B", stage + 1)
            self.program.append(_transfer((Kind.RECV_WAIT, payload, producer, microbatch, sender)))
            if self.group:
                self._wait_together(source + microbatch)

    def _send(self, action: Action, *, wait: bool) -> None:
        """What the action made is there, and on its way if another rank needs it."""
        kind, stage, microbatch = action
        _, _, target, receiver = self.routes[kind][stage]
        if target is not None:
            self.made[target + microbatch] = 1
        if receiver is not None:
            if wait:
                self._wait_sends(receiver)
            payload = "F" if kind is Kind.F else "B"
            self.program.append(_transfer((Kind.SEND_POST, payload, stage, microbatch, receiver)))
            wait_step = _transfer((Kind.SEND_WAIT, payload, stage, microbatch, receiver))
            self.in_flight[receiver].append((target + microbatch, wait_step))

    def _wait_sends(self, receiver: int | None) -> None:
        """For the messages to that rank whose receives are posted."""
        sends, posted = self.in_flight.get(receiver), self.posted
        while sends and posted[sends[0][0]]:
            self.program.append(sends.popleft()[1])

    def _post_receives(self) -> None:
        """Post what the next action needs whose receive is not posted; for a joint step, what both of its parts do."""
        if self.ahead >= self.length:
            return
        action = self.actions[self.ahead]
        if action[0] is Kind.PAIR:
            for each in self._joint(self.ahead):
                self._post_receive(each)
            self.ahead += 3
        else:
            before = len(self.program)
            self._post_receive(action)
            self.ahead += 1
            if self.group and len(self.program) == before + 1 and before:
                self._remember_candidate(action, before - 1)

    def _post_receive(self, action: Action) -> None:
        """Before it, what the same peer sends earlier."""
        kind, stage, microbatch = action
        source, sender, _, _ = self.routes[kind][stage]
        if sender is None or self.posted[source + microbatch]:
            return
        channel, program = self.channels[sender], self.program
        while channel:
            kind, stage, of = channel.popleft()
            message = self.routes[kind][stage][2] + of
            self.posted[message] = 1
            program.append(_transfer((Kind.RECV_POST, "F" if kind is Kind.F else "B", stage, of, sender)))
            if message == source + microbatch:
                return

    def _remember_candidate(self, action: Action, at: int) -> None:
        before = self.program[at]
        if type(before) is Transfer and before.kind is Kind.SEND_POST:
            sent = self.in_flight[before.peer][-1][0]
            received = self.routes[action.kind][action.stage].source + action.microbatch
            self.candidates[received] = (sent, before.peer, at)

    def _wait_together(self, received: int) -> None:
        """After the RECV_WAIT of that message: the SEND_WAIT of the send posted with it, if it can be waited for."""
        sent, peer, at = self.candidates.pop(received, (None, None, None))
        sends = self.in_flight.get(peer)
        if sends and sends[0][0] == sent and self.posted[sent]:
            self.program.append(sends.popleft()[1])
            self.groups.append(at)
