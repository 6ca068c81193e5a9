"""Pipeline schedules as data: who computes what in which order, and the transfers that this implies.

A `Schedule` says which rank holds which stage and, for each rank, the order of its compute actions:

    F     forward of one stage on one microbatch
    B     its input gradient alone        W    its weight gradient alone        BW    both in one go
    PAIR  a joint step: the F and the B or BW that follow it directly run together, to hide communication, so both of
          their inputs are there before. Its own stage and microbatch are those of the F. Where there is nothing to
          hide, `Schedule.apart` gives the same order without, in which each starts on its own input.

`lowering.lower` adds the transfers and gives one straight line of steps for each rank, which the validator proves, the
simulator times, and the runtime carries out without knowing any schedule by name. files.py reads and writes schedules.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    F = "F"
    B = "B"
    W = "W"
    BW = "BW"
    PAIR = "PAIR"
    # The steps of a transfer. A post never blocks; a wait blocks until both ends have posted, and after SEND_WAIT the
    # sender's buffer is free again.
    RECV_POST = "RECV_POST"
    RECV_WAIT = "RECV_WAIT"
    SEND_POST = "SEND_POST"
    SEND_WAIT = "SEND_WAIT"
    GROUP = "GROUP"

    __hash__ = str.__hash__  # as dictionary keys, three times as fast as the enum's own


# Entries are named tuples: as immutable as frozen dataclasses, and the large schedules hold a few hundred thousand.
class Action(NamedTuple):
    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind} of stage {self.stage}, microbatch {self.microbatch}"


class Transfer(NamedTuple):
    """One of the four steps of one message. There are no wildcards: every step names its message and its peer.

    `payload` is "F" (the activation that the forward of `stage` produced) or "B" (the input gradient that its backward
    produced), so `stage` is always the producing stage, on both ends. `peer` is the rank at the other end.
    """

    kind: Kind
    payload: str
    stage: int
    microbatch: int
    peer: int

    def __str__(self) -> str:
        return f"{self.kind} of {self.payload} of stage {self.stage}, microbatch {self.microbatch}"


class Group(NamedTuple):
    """The next `posts` steps are posts that start in one call, and none of them is complete before all of them are."""

    kind: Kind
    posts: int

    def __str__(self) -> str:
        return f"{self.kind} of {self.posts} posts"


class Event(NamedTuple):
    """What a rank did, from `start` to `end` in seconds of one clock for all ranks.

    `kind` is F, B, W or BW, or "comm" (blocked in a collective or a transfer; may lie within a compute event), or "opt"
    (the optimizer). The last two belong to no stage and no microbatch where these are None.
    """

    kind: str
    stage: int | None
    microbatch: int | None
    start: float
    end: float


@dataclass(frozen=True)
class Schedule:
    """`placement[stage]` is the rank that holds the stage; `actions[rank]` is what that rank computes, in order.

    `backward` is False where nothing but forwards runs, that is in validation.
    """

    name: str
    placement: tuple[int, ...]
    microbatches: int
    actions: tuple[tuple[Action, ...], ...]
    backward: bool = True

    @property
    def stages(self) -> int:
        return len(self.placement)

    @property
    def ranks(self) -> int:
        return len(self.actions)

    def source(self, action: Action) -> tuple[str, int] | None:
        """(payload, producing stage) of what the action consumes from another stage; None where it needs nothing."""
        if action.kind == Kind.F:
            return ("F", action.stage - 1) if action.stage > 0 else None
        if action.kind in (Kind.W, Kind.PAIR) or action.stage == self.stages - 1:
            return None
        return "B", action.stage + 1

    def target(self, action: Action) -> tuple[str, int] | None:
        """(payload, consuming stage) of what the action produces for another stage; None where nobody needs it."""
        if action.kind == Kind.F:
            return ("F", action.stage + 1) if action.stage < self.stages - 1 else None
        if action.kind in (Kind.W, Kind.PAIR) or action.stage == 0:
            return None
        return "B", action.stage - 1

    def apart(self) -> "Schedule":
        """The same without joint steps: one after the other, which is faster unless the two hide something."""
        orders = (tuple(each for each in actions if each.kind is not Kind.PAIR) for actions in self.actions)
        return replace(self, actions=tuple(orders))

    def forwards(self) -> "Schedule":
        """Its forwards alone, on the same ranks and in the same order: for validation between its steps."""
        orders = (tuple(each for each in actions if each.kind is Kind.F) for actions in self.actions)
        return replace(self, name=f"{self.name}, forwards", actions=tuple(orders), backward=False)

    def digest(self) -> str:
        """16 hex digits over everything. Ranks compare it before use: two schedules between them would hang."""
        orders = [" ".join(f"{stage}{kind}{m}" for kind, stage, m in actions) for actions in self.actions]
        everything = [self.name, self.placement, self.microbatches, self.backward, orders]
        return hashlib.sha256(json.dumps(everything).encode()).hexdigest()[:16]
