"""What the ranks of a group tell each other beside the data: calls made, failures, presence; over a torch Store.

    board = Board(store, rank, size, interrupt)   # store: a part of a Store that is this communicator's own
    board.record(call)                            # on the way of every call: one append
    board.failure                                 # the group's Verdict, once there is one

A small thread of each rank writes its report and reads those of others. The lowest rank that has not left is the judge:
it reads all reports, compares them (agreement.py) and writes back how far they agree, so that a report carries only the
calls since then. The others read the judge's report and whether anybody failed. The first failure in the Store counts.

Once the board is made, only the thread talks to the Store. A lost Store ends the comparison in silence; what a rank
finds by itself (a peer's process gone, an error of the backend) still becomes its own failure.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch.distributed as dist

from tpmp_kernels.comm.out_of_band.agreement import Judge
from tpmp_kernels.comm.out_of_band.bulletin import Bulletin
from tpmp_kernels.comm.out_of_band.reports import Call, Report, Verdict

_BUSY, _IDLE = 0.05, 0.25  # seconds between two looks at the Store, while calls are made and otherwise
_GRACE = 1.0  # seconds in which a failure found elsewhere precedes a lost connection, which may be its consequence
_BACKLOG = 1 << 16  # calls that wait for the thread


class Board:
    """One rank's side. `interrupt()` is called while the group has failed and somebody is in `blocked`; `serves` says
    that the Store may live in this process."""

    def __init__(self, store: dist.Store, rank: int, size: int, interrupt: Callable[[], None], *, serves: bool = False):
        self.failure: Verdict | None = None
        self.waits: Call | None = None  # the call in which the caller of this rank waits
        self.blocked: set = set()  # whoever is inside the backend now
        # What a transport's own watch has found: None, or a judge of the reports, and whether others have grace.
        self.probe: Callable[[], tuple[Callable[[Sequence[Report]], Verdict], bool] | None] | None = None
        self._rank, self._size, self._interrupt, self._serves = rank, size, interrupt, serves
        self._bulletin, self._lost = Bulletin(store, rank, size), False
        self._judge, self._judges = Judge(size), 0  # how this rank would judge, and the rank that does
        self._bulletin.write(self._judge.agreed)  # here, so that the death of a rank is seen from its first call on
        self._fresh: deque[Call] = deque(maxlen=_BACKLOG)
        self._requests: deque[_Request] = deque()
        self._leaving = self._idle = False
        self._pid = os.getpid()
        self._wake, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._serve, name="tpmp-board", daemon=True)
        self._thread.start()

    def record(self, call: Call) -> None:
        self._fresh.append(call)
        if self._idle:
            self._wake.set()

    def fail(self, judge: Callable[[Sequence[Report]], Verdict], *, grace: bool = False) -> Verdict:
        """Make `judge(reports of all ranks)` the failure of the group and return it, or the one that came before it;
        with `grace` also one that comes soon after."""
        request = _Request(judge, time.monotonic() + (_GRACE if grace else 0))
        if self.failure is None and not self._ended.is_set():
            self._requests.append(request)
            self._wake.set()
            request.answered.wait(_GRACE + 2)
        if self.failure is None:  # the thread has ended, or hangs in the Store
            self.failure = judge(self._bulletin.reports)
        return self.failure

    def leave(self) -> None:
        """Tell the peers that this rank makes no more calls, and end the thread."""
        if os.getpid() == self._pid and not self._leaving:
            self._leaving = True
            self._wake.set()
            if threading.current_thread() is not self._thread:  # as where the thread's own garbage collection ends us
                self._thread.join(2)

    def forked(self) -> bool:
        """Whether this process was forked from the one that made the board: the thread is not here."""
        return os.getpid() != self._pid

    # ---- the thread

    def _serve(self) -> None:
        try:
            while not self._leaving:
                self._idle = not self._round()
                self._wake.wait(_IDLE if self._idle else _BUSY)
                self._wake.clear()
            self._collect()
            self._guarded(self._end)
        finally:
            self._ended.set()

    def _round(self) -> bool:
        """One look; whether the next should follow soon."""
        busy = self._collect()
        if self.failure is None:
            self._probe()
            self.failure = self._guarded(self._exchange) or (self._local() if self._lost else None)
        if self.failure is not None:
            while self._requests:
                self._requests.popleft().answered.set()
            if self.blocked:
                self._interrupt()
        return bool(busy or self.waits or self._requests or (self.failure and self.blocked))

    def _probe(self) -> None:
        found = self.probe() if self.probe is not None else None
        if found is not None:
            judge, grace = found
            self.probe = None
            self._requests.append(_Request(judge, time.monotonic() + (_GRACE if grace else 0)))

    def _collect(self) -> bool:
        """Take up the new calls; whether some of this rank's are still to be compared."""
        mine, waits = self._bulletin.reports[self._rank], self.waits
        while self._fresh:
            mine.add(self._fresh.popleft())
        # Counts and wait must be of one moment: where the caller has gone on meanwhile, it is in no call that we know.
        mine.waits = waits if self.waits is waits else None
        return mine.forget(self._judge.agreed)

    def _guarded(self, step: Callable[[], Verdict | None]) -> Verdict | None:
        if self._lost:
            return None
        try:
            return step()
        except RuntimeError:  # DistError among them
            self._lost = True
            return None

    def _exchange(self) -> Verdict | None:
        bulletin = self._bulletin
        bulletin.write(self._judge.agreed)
        found = bulletin.failure()
        if found is None:
            found = self._look() or self._request()
            found = found and bulletin.fail(found)
        return found

    def _look(self) -> Verdict | None:
        """Read the reports that are this rank's to read, and judge if it is the judge."""
        bulletin = self._bulletin
        judging = self._judges == self._rank
        bulletin.read(range(self._size) if judging else {self._judges, *bulletin.unread()})
        dead = bulletin.dead(range(self._size) if judging else self._watched())
        if dead is not None:
            bulletin.read([dead.culprit])  # it may have left in order just now
            dead = bulletin.dead([dead.culprit])
        if judging and all(report.left for rank, report in enumerate(bulletin.reports) if rank != self._rank):
            self._end()  # nobody is there to talk to, and the Store may go with the last one that left
            self._lost = True
            return None
        if judging:
            return self._judge.verdict(bulletin.reports, time.monotonic()) or dead
        self._judge.agreed = dict(bulletin.agreed[self._judges])
        if bulletin.reports[self._judges].left:
            self._judges += 1
        return dead

    def _watched(self) -> set[int]:
        """The ranks whose presence this one checks: that of two neighbours has somebody on its own host to check it."""
        return {self._judges, (self._rank - 1) % self._size, (self._rank + 1) % self._size} - {self._rank}

    def _request(self) -> Verdict | None:
        if self._requests and time.monotonic() >= self._requests[0].after:
            self._bulletin.read(range(self._size))
            return self._requests[0].judge(self._bulletin.reports)
        return None

    def _end(self) -> None:
        self._bulletin.leave(self._judge.agreed)
        if self._serves:
            self._bulletin.linger()

    def _local(self) -> Verdict | None:
        """What can be found without a Store, from what the others told last."""
        reports = self._bulletin.reports
        found = self._judge.verdict(reports, time.monotonic()) or self._bulletin.dead(range(self._size))
        return found or (self._requests[0].judge(reports) if self._requests else None)


class _Request:
    def __init__(self, judge: Callable[[Sequence[Report]], Verdict], after: float):
        self.judge, self.after = judge, after
        self.answered = threading.Event()
