"""What the ranks of a group called, compared: calls that differ, and calls that can never be served.

Everything here is computed from reports (reports.py), whatever carried them (board.py).
"""

from collections.abc import Iterable, Sequence

from tpmp_kernels.comm.out_of_band.reports import COLLECTIVES, Call, Lane, Report, Verdict, members

_NAMES = ("kind", "dtype", "count", "reduce op", "root", "tag")
_STUCK = 0.5  # seconds in one call before circles are looked for
_HASTE = 0.3  # seconds that a mismatch waits for the ranks that have not come to it, so that the odd one is known


class Judge:
    """Judges successive reports of all ranks; `agreed` says for each lane how many calls all its members share."""

    def __init__(self, size: int):
        self._size = size
        self.agreed: dict[str, int] = {}
        self._disputed: float | None = None  # since when a mismatch waits for the ranks that have not come to it
        self._waiting: dict[int, tuple[Call, float]] = {}  # the call in which each rank waits, and since when

    def verdict(self, reports: Sequence[Report], now: float) -> Verdict | None:
        return self._mismatch(reports, now) or abandoned(reports) or circle(reports, self._stuck(reports, now))

    def _mismatch(self, reports: Sequence[Report], now: float) -> Verdict | None:
        for name in sorted({name for report in reports for name in report.lanes}):
            ranks = members(name, self._size)
            lanes = {rank: reports[rank].lanes[name] for rank in ranks if name in reports[rank].lanes}
            wrong = self._compare(name, ranks, lanes)
            if wrong is not None:
                self._disputed = self._disputed or now
                calls = {rank: call for rank, lane in lanes.items() if (call := lane.at(wrong)) is not None}
                if len(calls) == len(ranks) or now - self._disputed > _HASTE:
                    return _mismatch(calls, len(ranks))
        return None

    def _stuck(self, reports: Sequence[Report], now: float) -> list[int]:
        """The ranks that have been waiting in one call for some time."""
        waiting = {rank: report.waits for rank, report in enumerate(reports) if report.waits is not None}
        old = self._waiting
        self._waiting = {
            rank: old[rank] if rank in old and old[rank][0] == call else (call, now) for rank, call in waiting.items()
        }
        return [rank for rank, (_, since) in self._waiting.items() if now - since > _STUCK]

    def _compare(self, name: str, ranks: Sequence[int], lanes: dict[int, Lane]) -> int | None:
        """The number of the first call that differs between those who report it; moves `agreed` up to it."""
        at = max([self.agreed.get(name, 0), *(lane.first for lane in lanes.values())])
        common = min((lane.end() for lane in lanes.values()), default=at) if len(lanes) == len(ranks) else at
        slices = [lane.prints[at - lane.first : common - lane.first] for lane in lanes.values()]
        if common > at and all(each == slices[0] for each in slices[1:]):
            uneven = next((number for number in range(at, common) if _uneven(lanes, number)), None)
            self.agreed[name] = at = common if uneven is None else uneven
            if uneven is not None:
                return uneven
        for number in range(at, max((lane.end() for lane in lanes.values()), default=at)):
            prints = {lane.prints[number - lane.first] for lane in lanes.values() if number < lane.end()}
            if len(prints) > 1:
                return number
        return None


def _uneven(lanes: dict[int, Lane], number: int) -> tuple[int, int] | None:
    """The pair (sender, receiver) that disagrees about its part of an all_to_all with splits."""
    if next(iter(lanes.values())).at(number).count != "split":
        return None
    calls = {rank: lane.at(number) for rank, lane in lanes.items()}
    pairs = ((a, b) for a in calls for b in calls if calls[a].sends[b] != calls[b].receives[a])
    return next(pairs, None)


def _mismatch(calls: dict[int, Call], size: int) -> Verdict:
    """The majority is right where all but one rank agree, so that the odd rank is named; else nobody is."""
    votes = {rank: sum(other.print() == call.print() for other in calls.values()) for rank, call in calls.items()}
    right = max(votes, key=lambda rank: votes[rank])  # the lowest of equals
    wrong = next((rank for rank, call in calls.items() if call.print() != calls[right].print()), None)
    if wrong is None:
        a, b = _uneven({rank: Lane(call.number, 0, [""], [call]) for rank, call in calls.items()}, calls[right].number)
        text = f"rank {a} called {calls[a].numbered()} with {calls[a].sends[b]} elements for rank {b}, "
        text += f"but rank {b} called it with {calls[b].receives[a]} from rank {a}; they differ in count"
        return Verdict("CollectiveMismatch", None, text)
    odd = wrong if size > 2 and votes[right] == size - 1 else None
    text = f"rank {wrong} called {calls[wrong].numbered()}, but rank {right} called {calls[right].numbered()}"
    return Verdict("CollectiveMismatch", odd, f"{text}; they differ in {_differing(calls[wrong], calls[right])}")


def _differing(a: Call, b: Call) -> str:
    fields = zip(_NAMES, a.print().split("|", 5), b.print().split("|", 5), strict=True)
    return ", ".join(name for name, left, right in fields if left != right)


# ---- calls that nobody will serve


def unserved(reports: Sequence[Report], rank: int) -> list[int]:
    """The ranks that have not yet made the call in which `rank` waits."""
    call = reports[rank].waits
    return [] if call is None else absent(reports, rank, call)


def absent(reports: Sequence[Report], rank: int, call: Call) -> list[int]:
    """The ranks, but for `rank`, that have not yet made `call`."""
    others = (other for other in members(call.lane, len(reports)) if other != rank)
    return [other for other in others if reports[other].total(call.lane) <= call.number]


def abandoned(reports: Sequence[Report]) -> Verdict | None:
    """A rank waits for one that left the group without making the call."""
    for rank, report in enumerate(reports):
        for other in unserved(reports, rank):
            if reports[other].left:
                return Verdict("PeerDied", other, f"rank {other} left the group; rank {rank} waits for it in "
                               f"{report.waits.numbered()}")  # fmt: skip
    return None


def circle(reports: Sequence[Report], stuck: Iterable[int]) -> Verdict | None:
    """Ranks of `stuck` that wait for each other in a circle: none of them can go on.

    A report gives the waiting call and the counts of one moment, so a circle is a proof even where the reports are of
    different moments: the first of its ranks to go on would have to be served by one that is itself still waiting.
    """
    waits_for = {rank: unserved(reports, rank) for rank in stuck}
    while loose := [rank for rank, others in waits_for.items() if not any(other in waits_for for other in others)]:
        for rank in loose:
            del waits_for[rank]
    if not waits_for:
        return None
    path = [min(waits_for)]  # what is left leads into a circle from everywhere
    while (after := next(other for other in waits_for[path[-1]] if other in waits_for)) not in path:
        path.append(after)
    ring = sorted(path[path.index(after) :])
    calls = [f"rank {rank} waits in {reports[rank].waits.numbered()}" for rank in ring]
    together = [rank for rank, report in enumerate(reports) if report.waits and report.waits.lane == COLLECTIVES]
    odd = [rank for rank in ring if rank not in together]
    culprit = odd[0] if len(odd) == 1 and len(reports) > 2 and len(together) == len(reports) - 1 else None
    text = f"{', but '.join(calls)}; each waits for a call of another that never comes"
    return Verdict("CollectiveMismatch", culprit, text)


def timeout(reports: Sequence[Report], rank: int, seconds: float, call: Call) -> Verdict:
    """The deadline of `rank` passed in `call`: what every rank was doing."""
    missing = absent(reports, rank, call)
    doing = []
    for other, report in enumerate(reports):
        if report.left:
            what = "left"
        elif report.waits is not None:
            what = f"waits in {report.waits.numbered()}"
        else:
            what = f"is in no call, last {report.last}" if report.last else "has called nothing yet"
        doing.append(f"rank {other} {what}")
    text = f"rank {rank} waited {seconds:.2f} s in {call.numbered()}: {'; '.join(doing)}"
    return Verdict("TransportTimeout", missing[0] if len(missing) == 1 else None, text)
