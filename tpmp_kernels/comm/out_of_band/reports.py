"""What a rank tells the others about its calls, and what the group concludes: calls, lanes, reports, verdicts.

Calls are numbered in lanes. The lane "*" holds the collectives of the group; the lane "0>1" holds the messages from
rank 0 to rank 1, of which the sender reports the sends and the receiver the receives. Call k of a lane must be the same
on every member of the lane.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

COLLECTIVES = "*"
_MAX_PUBLISHED = 1024  # calls of one lane in one report; the rest follows once these are known to agree
_MAX_KEPT = 1 << 14  # calls of one lane kept while no answer comes; beyond them the oldest go uncompared


class Call(NamedTuple):
    """One call of one rank. Cheap to make: this happens on the way of every call."""

    lane: str
    number: int  # of the call in its lane, from 0
    kind: str
    dtype: str
    count: int | str  # "split" for an all_to_all with splits: the counts are a matter of each pair of ranks
    op: str | None
    root: int
    tag: str
    shape: Sequence[int] = ()
    sends: Sequence[int] = ()  # elements for each rank, of an all_to_all with splits
    receives: Sequence[int] = ()

    def print(self) -> str:
        """What must agree, as text. The two ends of a message have one print."""
        kind = self.kind if self.lane == COLLECTIVES else "message"
        return f"{kind}|{self.dtype}|{self.count}|{self.op or ''}|{self.root}|{self.tag}"

    def words(self) -> str:
        text = f"{self.kind} {self.op}" if self.op else self.kind
        if self.dtype:
            text += f" {self.dtype}[{','.join(map(str, self.shape))}]"
        if self.root >= 0:
            text += f" root {self.root}"
        if self.lane != COLLECTIVES:
            source, target = self.lane.split(">")
            text += f" to rank {target}" if self.kind == "send" else f" from rank {source}"
        return f"{text} {self.tag!r}" if self.tag else text

    def numbered(self) -> str:
        return f"{self.words()} #{self.number + 1}"


class Verdict(NamedTuple):
    """What went wrong, the same on every rank: the name of the error class, the culprit if there is one, the text."""

    error: str
    culprit: int | None
    text: str


@dataclass
class Lane:
    """The calls of one rank in one lane from number `first` on; `total` were made in all."""

    first: int = 0
    total: int = 0
    prints: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    def add(self, call: Call) -> None:
        if call.number != self.total or len(self.prints) >= _MAX_KEPT:  # some were lost: start anew behind them
            self.first, self.prints, self.calls = call.number, [], []
        self.total = call.number + 1
        self.prints.append(call.print())
        self.calls.append(call)

    def forget(self, agreed: int) -> None:
        """Drop what is known to agree."""
        count = min(agreed - self.first, len(self.prints))
        if count > 0:
            del self.prints[:count], self.calls[:count]
            self.first += count

    def published(self) -> list:
        return [self.first, self.total, self.prints[:_MAX_PUBLISHED], self.calls[:_MAX_PUBLISHED]]

    @classmethod
    def read(cls, published: list) -> "Lane":
        first, total, prints, calls = published
        return cls(first, total, prints, [Call(*call) for call in calls])

    def at(self, number: int) -> Call | None:
        place = number - self.first
        return self.calls[place] if 0 <= place < len(self.calls) else None

    def end(self) -> int:
        return self.first + len(self.prints)


@dataclass
class Report:
    """What one rank has told: its lanes, the call it waits in, the last one it made, whether it left."""

    lanes: dict[str, Lane] = field(default_factory=dict)
    waits: Call | None = None
    last: str = ""
    left: bool = False

    def add(self, call: Call) -> None:
        self.lanes.setdefault(call.lane, Lane()).add(call)
        self.last = call.numbered()

    def total(self, lane: str) -> int:
        return self.lanes[lane].total if lane in self.lanes else 0

    def forget(self, agreed: dict[str, int]) -> bool:
        """Drop what is known to agree; whether more is left to be compared."""
        for name, lane in self.lanes.items():
            lane.forget(agreed.get(name, 0))
        return any(lane.prints for lane in self.lanes.values())


def members(lane: str, size: int) -> Sequence[int]:
    return range(size) if lane == COLLECTIVES else [int(rank) for rank in lane.split(">")]
