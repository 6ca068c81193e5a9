"""The reports of a group's ranks in a torch Store: one key for each rank, overwritten, and one for the first failure.

Nothing here waits for a peer. Errors of the Store (RuntimeErrors) are the caller's to handle.
"""

import json
import time
import weakref

import torch.distributed as dist

from tpmp_kernels.comm.out_of_band import presence
from tpmp_kernels.comm.out_of_band.reports import Call, Lane, Report, Verdict

_BEAT = 1.0  # seconds between two signs of life without news
_LINGER = 0.5  # seconds that the server of the Store waits for the others to leave
_SILENCE = 10.0  # seconds without a sign of life after which a rank of another host counts as dead


class Bulletin:
    """One rank's access. `reports[r]` is what rank r told by the last `read`; that of this rank goes out by `write`."""

    def __init__(self, store: dist.Store, rank: int, size: int):
        self._store, self._rank, self._size = store, rank, size
        self.reports = [Report() for _ in range(size)]
        self.agreed: list[dict[str, int]] = [{} for _ in range(size)]
        self._processes: list[list | None] = [None] * size
        self._heard: list[tuple[int, float]] = [(-1, time.monotonic())] * size  # last beat of each rank, and when
        self._process = presence.identity()
        self._written, self._beat, self._beaten = "", 0, -_BEAT

    # ---- reports

    def write(self, agreed: dict[str, int], *, left: bool = False) -> None:
        """Publish this rank's report if it has changed, or as a sign of life; `left` makes it the last one."""
        report = self.reports[self._rank]
        lanes = {name: lane.published() for name, lane in report.lanes.items()}
        text = json.dumps([report.waits, report.last, left, agreed, lanes, self._process])
        now = time.monotonic()
        if text != self._written or now - self._beaten >= _BEAT:
            self._written, self._beaten, self._beat = text, now, self._beat + 1
            self._store.set(f"report/{self._rank}", f"{self._beat} {text}")

    def read(self, ranks) -> None:
        keys = {rank: f"report/{rank}" for rank in ranks if rank != self._rank}
        known = [rank for rank in keys if self._processes[rank] is not None or self._store.check([keys[rank]])]
        for rank, text in zip(
            known, self._store.multi_get([keys[rank] for rank in known]) if known else [], strict=True
        ):
            self._take(rank, text.decode())

    def _take(self, rank: int, text: str) -> None:
        beat, _, text = text.partition(" ")
        if int(beat) == self._heard[rank][0]:
            return
        waits, last, left, self.agreed[rank], lanes, self._processes[rank] = json.loads(text)
        lanes = {name: Lane.read(lane) for name, lane in lanes.items()}
        self.reports[rank] = Report(lanes, Call(*waits) if waits else None, last, left)
        self._heard[rank] = int(beat), time.monotonic()

    def unread(self) -> list[int]:
        """The ranks of which nothing has been read yet."""
        return [rank for rank, process in enumerate(self._processes) if process is None and rank != self._rank]

    def dead(self, ranks) -> Verdict | None:
        """One of `ranks` whose process has ended, or that has been silent for long where nobody can look."""
        for rank in ranks:
            process = self._processes[rank]
            if process is None or self.reports[rank].left:
                continue
            if presence.comparable(self._process, process):
                if presence.gone(process):
                    return Verdict("PeerDied", rank, f"rank {rank} (pid {process[1]}) died")
            elif time.monotonic() - self._heard[rank][1] > _SILENCE:
                return Verdict("PeerDied", rank, f"rank {rank} has given no sign of life for {_SILENCE:g} s")
        return None

    # ---- the failure, and the end

    def failure(self) -> Verdict | None:
        return Verdict(*json.loads(self._store.get("failure"))) if self._store.check(["failure"]) else None

    def fail(self, verdict: Verdict) -> Verdict:
        """Make `verdict` the failure of the group unless there is one; return the one that counts."""
        if self._store.add("failures", 1) == 1:
            self._store.set("failure", json.dumps(verdict))
            return verdict
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            first = self.failure()
            if first is not None:
                return first
            time.sleep(0.005)
        return verdict  # whoever was first died before it could say why

    def leave(self, agreed: dict[str, int]) -> None:
        """Publish that this rank makes no more calls. The last one to leave clears the Store."""
        self.write(agreed, left=True)
        if self._store.add("left", 1) == self._size:
            keys = ("failures", "failure", "left")
            for key in (*(f"report/{rank}" for rank in range(self._size)), *keys):
                self._store.delete_key(key)

    def linger(self) -> None:
        """Wait a moment for the others to leave. A request to a Store whose process is gone makes torch print a page of
        stack trace before it raises: whoever serves the Store lets the others say their last words first."""
        deadline = time.monotonic() + _LINGER
        while time.monotonic() < deadline and self._store.check([f"report/{self._rank}"]):
            time.sleep(0.01)


_clients: weakref.WeakKeyDictionary[dist.Store, dist.Store] = weakref.WeakKeyDictionary()


def second_client(store: dist.Store) -> dist.Store:
    """A connection to the same Store beside that of `store`, where torch can make one: a client serves one request at a
    time, and a blocking one of somebody else could hold up ours for minutes.

    All communicators of a process share it. For each new connection the server of a TCPStore looks up the name of the
    peer's address; where the name server is slow to answer it serves nobody meanwhile (5 s, seen with torch 2.13).
    """
    if not hasattr(store, "clone"):
        return store
    if store not in _clients:
        _clients[store] = store.clone()
    return _clients[store]
