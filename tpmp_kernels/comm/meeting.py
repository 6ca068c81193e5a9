"""How the ranks of a group come together on shm, or agree that they cannot.

Every rank of the group runs `connect`. Through a torch Store the ranks agree on a transport, rank 0 hands the
segment's file descriptor to each of the others, and only if all of them hold it is shm used: the descriptor is the
proof that they share memory. Everything exchanged is plain text.
"""

import time
from collections.abc import Callable

import torch.distributed as dist

from tpmp_kernels.comm._ext import C
from tpmp_kernels.comm.shm import ShmCommunicator
from tpmp_kernels.errors import TransportError, TransportTimeout, UsageError

_MAX_RANKS = 64


class CannotShare(Exception):
    """The ranks of a group do not share memory, or not through shm; raised alike on every rank."""


def connect(group: dist.ProcessGroup, *, wish: str | None, name: str, timeout: float) -> ShmCommunicator:
    """Make the shm communicator of `group`, or raise CannotShare with the same reason on every rank."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    return connect_store(meeting_place(group), rank, size, wish=wish, name=name, timeout=timeout)


def meeting_place(group: dist.ProcessGroup) -> dist.Store:
    """A part of the default Store for one meeting of the group's ranks, who all ask for it in the same order."""
    store = dist.distributed_c10d._get_default_store()
    # Disjoint groups may bear one name, and a group may meet many times: each rank counts its own arrivals.
    members = ",".join(map(str, dist.get_process_group_ranks(group)))
    base = f"tpmp/{group.group_name}/{members}"
    number = store.add(f"{base}/arrivals/{dist.get_rank(group)}", 1)
    return dist.PrefixStore(f"{base}/{number}", store)


def connect_store(
    store: dist.Store, rank: int, size: int, *, wish: str | None, name: str, timeout: float
) -> ShmCommunicator:
    """The same between `size` ranks that share `store`, whose keys must be new."""
    meeting = Meeting(store, rank, size, name, timeout)
    obstacles = agree(meeting, wish or "any", _obstacle(size))
    if wish == "process_group":
        raise CannotShare("process_group was asked for")
    refuse_any(obstacles)
    if rank == 0:
        core, outcomes = _share(meeting)
    else:
        core, obstacle = _attach(meeting.get("segment"), size, rank)
        outcomes = meeting.exchange("attached", obstacle)
    try:
        refuse_any(outcomes)
    except CannotShare:
        if core is not None:
            core.close()
        raise
    return ShmCommunicator(core, rank, size, name=name, timeout=timeout)


def agree(meeting: "Meeting", wish: str, obstacle: str) -> list[str]:
    """Why each rank cannot have the transport that all wish for, "" where it can; UsageError where they differ."""
    wishes, obstacles = zip(
        *[text.split("|", 1) for text in meeting.exchange("wish", f"{wish}|{obstacle}")], strict=True
    )
    if len(set(wishes)) > 1:
        told = ", ".join(f"rank {r} {w}" for r, w in enumerate(wishes))
        raise UsageError(
            f"communicator {meeting.name!r}: ranks ask for different transports ({told}); ask for the same"
        )
    return list(obstacles)


def refuse_any(obstacles) -> None:
    """Raise CannotShare with the first obstacle of any rank."""
    for rank, obstacle in enumerate(obstacles):
        if obstacle:
            raise CannotShare(f"rank {rank}: {obstacle}")


def _obstacle(size: int) -> str:
    if C is None:
        return "the compiled extension tpmp_kernels._C is missing or stale"
    if size > _MAX_RANKS:
        return f"the group has {size} ranks, shm carries {_MAX_RANKS}"
    return ""


def _share(meeting: "Meeting"):
    """Rank 0: make the segment and hand it to whoever calls, until every rank has said how it went."""
    try:
        server = C.SegmentServer(meeting.size)
        core = server.transport()
    except TransportError as error:
        meeting.set("segment", f"!{error}")
        return None, meeting.exchange("attached", str(error))
    meeting.set("segment", f"{server.address} {server.nonce}")
    try:
        return core, meeting.exchange("attached", "", meanwhile=lambda: server.serve(0.002))
    except TransportError:
        core.close()
        raise


def _attach(segment: str, size: int, rank: int):
    """Another rank: the transport and "", or None and the reason why this rank cannot have it."""
    if segment.startswith("!"):
        return None, ""  # rank 0 reports its own obstacle
    address, nonce = segment.split()
    try:
        return C.attach(address, nonce, size, rank), ""
    except TransportError as error:
        return None, str(error)


class Meeting:
    """A board of short texts, one of each rank at each stage."""

    def __init__(self, store: dist.Store, rank: int, size: int, name: str, timeout: float):
        self.rank, self.size, self.name = rank, size, name
        self._store, self._timeout = store, timeout
        self._deadline = time.monotonic() + timeout

    def set(self, key: str, text: str) -> None:
        self._store.set(key, text)

    def get(self, key: str) -> str:
        self._await([key], [0], None)
        return self._store.get(key).decode()

    def exchange(self, stage: str, text: str, meanwhile: Callable[[], None] | None = None) -> list[str]:
        """Show `text` to all ranks and return the texts of all, by rank; run `meanwhile` until they are there."""
        keys = [f"{stage}/{rank}" for rank in range(self.size)]
        # A Store value may not be empty on every backend: each text goes with a leading mark.
        self._store.set(keys[self.rank], f"={text}")
        self._await(keys, range(self.size), meanwhile)
        return [self._store.get(key).decode()[1:] for key in keys]

    def _await(self, keys: list[str], ranks, meanwhile: Callable[[], None] | None) -> None:
        while not self._store.check(keys):
            if time.monotonic() > self._deadline:
                missing = [rank for rank, key in zip(ranks, keys, strict=True) if not self._store.check([key])]
                whom = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
                raise TransportTimeout(
                    f"communicator {self.name!r}: {whom} did not come within {self._timeout:g} s | rank {self.rank} "
                    "| do: call communicator(group) on every rank of the group, in the same order on each",
                    missing[0] if len(missing) == 1 else None,
                )
            if meanwhile is None:
                time.sleep(0.001)
            else:
                meanwhile()
