"""From a schedule to programs: the transfers between the compute actions, in an order that cannot deadlock."""

from collections import defaultdict, deque
from dataclasses import dataclass

from tpmp_kernels.errors import ScheduleError
from tpmp_kernels.pipeline.schedule import Action, Kind, Schedule, Transfer


@dataclass(frozen=True)
class Lowered:
    """`programs[rank]`: the compute actions of `schedule` in their order, with the transfers between them."""

    schedule: Schedule
    programs: tuple[tuple[Action | Transfer, ...], ...]


def lower(schedule: Schedule) -> Lowered:
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

    Raises ScheduleError where the compute orders themselves wait in a circle or for something that is never computed.
    """
    return Lowered(schedule, _Lowering(schedule).run())


# A message is (payload, producing stage, microbatch); a channel holds those from one rank to another, as they are sent.
_Message = tuple[str, int, int]
# What an action consumes or produces, and the other rank where it is another.
_Ends = tuple[_Message | None, int | None]


class _Lowering:
    def __init__(self, schedule: Schedule):
        self.schedule = schedule
        ranks = range(schedule.ranks)
        self.programs: list[list[Action | Transfer]] = [[] for _ in ranks]
        self.position = [0 for _ in ranks]
        self.inputs = [[_input(schedule, rank, action) for action in schedule.actions[rank]] for rank in ranks]
        self.outputs = [[_output(schedule, rank, action) for action in schedule.actions[rank]] for rank in ranks]
        self.made: set[_Message] = set()
        self.posted: set[_Message] = set()  # receives
        self.in_flight: list[dict[int, deque[_Message]]] = [defaultdict(deque) for _ in ranks]
        self.channels: dict[tuple[int, int], deque[_Message]] = defaultdict(deque)
        for rank in ranks:
            for message, peer in self.outputs[rank]:
                if peer is not None:
                    self.channels[rank, peer].append(message)

    def run(self) -> tuple[tuple[Action | Transfer, ...], ...]:
        todo = [rank for rank, actions in enumerate(self.schedule.actions) if actions]
        for rank in todo:
            self._post_receives(rank, 0)
            self._post_receives(rank, 1)
        while todo:
            ready = [rank for rank in todo if self._ready(rank)]
            if not ready:
                raise ScheduleError(f"{self.schedule.name} deadlocks: {'; '.join(map(self._stuck, todo))}")
            for rank in ready:
                self._step(rank)
            todo = [rank for rank in todo if self.position[rank] < len(self.schedule.actions[rank])]
        for rank, program in enumerate(self.programs):
            for peer, messages in self.in_flight[rank].items():
                program.extend(Transfer(Kind.SEND_WAIT, *message, peer) for message in messages)
        return tuple(map(tuple, self.programs))

    def _ready(self, rank: int) -> bool:
        message, _ = self.inputs[rank][self.position[rank]]
        return message is None or message in self.made

    def _step(self, rank: int) -> None:
        program, position = self.programs[rank], self.position[rank]
        source, sender = self.inputs[rank][position]
        if sender is not None:
            program.append(Transfer(Kind.RECV_WAIT, *source, sender))
        program.append(self.schedule.actions[rank][position])
        message, peer = self.outputs[rank][position]
        self.made.add(message)
        if peer is not None:
            in_flight = self.in_flight[rank][peer]
            while in_flight and in_flight[0] in self.posted:
                program.append(Transfer(Kind.SEND_WAIT, *in_flight.popleft(), peer))
            in_flight.append(message)
            program.append(Transfer(Kind.SEND_POST, *message, peer))
        self._post_receives(rank, position + 2)
        self.position[rank] = position + 1

    def _post_receives(self, rank: int, position: int) -> None:
        """Post what the action at `position` needs, and before it everything that the same peer sends earlier."""
        message, peer = self.inputs[rank][position] if position < len(self.inputs[rank]) else (None, None)
        if peer is None or message in self.posted:
            return
        channel = self.channels[peer, rank]
        while channel:
            first = channel.popleft()
            self.posted.add(first)
            self.programs[rank].append(Transfer(Kind.RECV_POST, *first, peer))
            if first == message:
                return

    def _stuck(self, rank: int) -> str:
        (payload, stage, _), _ = self.inputs[rank][self.position[rank]]
        action = self.schedule.actions[rank][self.position[rank]]
        return f"rank {rank} waits at {action} for {payload} of stage {stage} of rank {self.schedule.placement[stage]}"


def _input(schedule: Schedule, rank: int, action: Action) -> _Ends:
    source = schedule.source(action)
    if source is None:
        return None, None
    sender = schedule.placement[source[1]]
    return (*source, action.microbatch), None if sender == rank else sender


def _output(schedule: Schedule, rank: int, action: Action) -> _Ends:
    target = schedule.target(action)
    if target is None:
        return None, None
    receiver = schedule.placement[target[1]]
    return (target[0], action.stage, action.microbatch), None if receiver == rank else receiver
