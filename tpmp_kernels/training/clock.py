"""One clock for all ranks: time.perf_counter is one for the processes of a host, and another on the next host."""

import time
import uuid
from collections.abc import Callable
from pathlib import Path

import torch

from tpmp_kernels.comm import Communicator

ROUNDS = 8


def clock_offset(
    comm: Communicator, *, clock: Callable[[], float] = time.perf_counter, host: int | None = None
) -> float:
    """What this rank adds to its `clock` to have that of rank 0, seconds. Collective.

    0.0 on rank 0's host. On another, half a round trip is the most that it can be off by: of ROUNDS exchanges the
    fastest counts, taken to be as fast in both directions. host: a number that is another on every host.
    """
    mine = torch.tensor([_host() if host is None else host])
    hosts = comm.all_gather(torch.empty(comm.size, dtype=torch.int64), mine, tag="hosts").tolist()
    offset = 0.0
    for rank in (r for r in range(comm.size) if hosts[r] != hosts[0]):
        if comm.rank == 0:
            _answer(comm, rank, clock)
        elif comm.rank == rank:
            offset = _ask(comm, clock)
    return offset


def _ask(comm: Communicator, clock: Callable[[], float]) -> float:
    found = []
    for _ in range(ROUNDS):
        begin, time_there = clock(), torch.zeros(1, dtype=torch.float64)
        comm.send(time_there, 0, tag="clock?")
        comm.recv(time_there, 0, tag="clock")
        end = clock()
        found.append((end - begin, time_there.item() - (begin + end) / 2))
    return min(found)[1]


def _answer(comm: Communicator, rank: int, clock: Callable[[], float]) -> None:
    question = torch.zeros(1, dtype=torch.float64)
    for _ in range(ROUNDS):
        comm.recv(question, rank, tag="clock?")
        comm.send(torch.tensor([clock()], dtype=torch.float64), rank, tag="clock")


def _host() -> int:
    """Of the kernel that runs here since it was started; of the machine where there is no such file."""
    path = Path("/proc/sys/kernel/random/boot_id")
    name = uuid.UUID(path.read_text().strip()).int if path.exists() else uuid.getnode()
    return name % 2**63
