"""Our transports against gloo through torch.distributed: two ranks on this host, one thread each.

The ceiling is one copy of the same bytes within a rank, because data has to move once at least: in both ranks at once
for all_reduce, in one rank and then back for a message. The buffer is the same in each call, so that small sizes are
copied within a cache; there the ceiling says how much of the time is latency.
"""

import pytest
import torch
import torch.distributed as dist

from tpmp_kernels.bench import bus_bytes, interleave, slowest
from tpmp_kernels.comm import communicator
from tpmp_kernels.testing import RankPool

SUITE = "comm"
RANKS = 2
SIZES = {"4 KiB": 4 << 10, "64 KiB": 64 << 10, "1 MiB": 1 << 20, "16 MiB": 16 << 20}


@pytest.fixture(scope="module")
def pool():
    pool = RankPool(RANKS)
    yield pool
    pool.close()


def counts(nbytes: int) -> dict[str, int]:
    """Many calls a turn where one is short, so that the clock and the barrier do not show."""
    return {"rounds": 15, "iterations": max(4, min(100, (2 << 20) // nbytes)), "warmup": 2}


@pytest.mark.parametrize("size", SIZES)
def test_all_reduce(compare, pool, size):
    nbytes = SIZES[size]
    compare(
        lambda: slowest(pool.run(time_all_reduce, nbytes, timeout=300)),
        case="all_reduce 2 ranks",
        shape=size,
        dtype="fp32",
        baseline="gloo",
        ceiling="memcpy",
        work=bus_bytes("all_reduce", nbytes, RANKS),
        unit="B/s",
        threads=1,
    )


@pytest.mark.parametrize("size", SIZES)
def test_ping_pong(compare, pool, size):
    nbytes = SIZES[size]
    compare(
        lambda: slowest(pool.run(time_ping_pong, nbytes, timeout=300)),
        case="send+recv there and back",
        shape=size,
        dtype="fp32",
        baseline="gloo",
        ceiling="memcpy",
        work=2 * bus_bytes("send", nbytes, RANKS),
        unit="B/s",
        threads=1,
    )


def data(rank: int, nbytes: int) -> torch.Tensor:
    """Random values so small that the sums of a whole turn, each twice the last, stay finite and normal."""
    generator = torch.Generator().manual_seed(rank)
    return 2.0**-90 * (1 + torch.rand(nbytes // 4, generator=generator))


def time_all_reduce(nbytes: int) -> dict:
    """What each rank runs: check the sum of both contenders, then time them on a buffer that every turn restores."""
    source = data(dist.get_rank(), nbytes)
    buffer, copy = source.clone(), torch.empty_like(source)
    expected = sum(data(rank, nbytes) for rank in range(RANKS))
    with communicator(dist.group.WORLD, transport="shm") as comm:
        contenders = {
            "gloo": lambda: dist.all_reduce(buffer),
            "tpmp shm": lambda: comm.all_reduce(buffer),
        }

        def restore():
            buffer.copy_(source)
            dist.barrier()

        for name, call in contenders.items():
            restore()
            call()
            if not torch.equal(buffer, expected):  # two terms have one sum, whatever the order
                raise AssertionError(f"{name}: all_reduce of {nbytes} bytes is not the sum of both ranks")
        contenders["memcpy"] = lambda: copy.copy_(buffer)
        return interleave(contenders, before=restore, **counts(nbytes))


def time_ping_pong(nbytes: int) -> dict:
    """What each rank runs: rank 0 sends and gets the message back from rank 1, through another buffer."""
    rank, peer = dist.get_rank(), 1 - dist.get_rank()
    source = data(0, nbytes)
    outgoing, incoming = (source.clone() if rank == 0 else torch.empty_like(source)), torch.empty_like(source)
    with communicator(dist.group.WORLD, transport="shm") as comm:
        contenders = {
            "gloo": lambda: _there_and_back(rank, peer, dist.send, dist.recv, outgoing, incoming),
            "tpmp shm": lambda: _there_and_back(rank, peer, comm.send, comm.recv, outgoing, incoming),
        }
        for name, call in contenders.items():
            incoming.fill_(float("nan"))
            call()
            if not torch.equal(incoming, source):
                raise AssertionError(f"{name}: a message of {nbytes} bytes came back changed")
        contenders["memcpy"] = lambda: _copy_twice(rank, source, outgoing, incoming)
        return interleave(contenders, before=dist.barrier, **counts(nbytes))


def _there_and_back(rank: int, peer: int, send, recv, outgoing, incoming) -> None:
    if rank == 0:
        send(outgoing, peer)
        recv(incoming, peer)
    else:
        recv(incoming, peer)
        send(incoming, peer)


def _copy_twice(rank: int, source, first, second) -> None:
    """One copy a way, while the peer waits as it does for a message."""
    if rank == 0:
        first.copy_(source)
        second.copy_(first)
