"""Transfers on shm arrive whole and in order, move while the caller computes, and wake who sleeps for them."""

import os
import statistics
import time

import pytest
import torch
from shm_world import world

from tpmp_kernels.comm._ext import C

pytestmark = pytest.mark.skipif(C is None, reason="needs the compiled extension")

DTYPES = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8,
    torch.int16, torch.int8, torch.bool,
)  # fmt: skip
RING = 512 << 10  # bytes of the ring of one ordered pair, for up to 4 ranks


def _message(n: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randint(0, 120, (n,), generator=torch.Generator().manual_seed(seed)).to(dtype)


def _both_ways() -> bool:
    """All ranks send to all others at once: sizes far above the ring, every dtype, an empty message."""
    with world() as comm:
        cases = [(n, dtype) for dtype in DTYPES for n in (0, 1, 1001)]
        cases += [(5 * RING + 3, torch.uint8), (RING // 4, torch.float32), (RING // 4 + 1, torch.float32)]
        peers = [r for r in range(comm.size) if r != comm.rank]
        works, received = [], []
        for index, (n, dtype) in enumerate(cases):
            for peer in peers:
                works.append(comm.isend(_message(n, dtype, 100 * index + comm.rank), peer, tag=f"m{index}"))
                into = torch.zeros(n, dtype=dtype)
                works.append(comm.irecv(into, peer, tag=f"m{index}"))
                received.append((into, 100 * index + peer))
        for work in reversed(works):
            work.wait()
        return all(work.done() for work in works) and all(
            torch.equal(into, _message(into.numel(), into.dtype, seed)) for into, seed in received
        )


@pytest.mark.parametrize("size", [2, 3, 4])
def test_transfers_in_both_directions_at_once(ranks, size):
    assert all(ranks(size).run(_both_ways))


def _mixed_order() -> list[float]:
    """Blocking and posted calls of one pair keep the order of their posting."""
    with world() as comm:
        if comm.rank == 0:
            works = []
            for i in range(100):
                value = torch.full((1 + 997 * (i % 5),), float(i))
                works.append(comm.isend(value, 1)) if i % 3 else comm.send(value, 1)
            for work in works:
                work.wait()
            return [float(i) for i in range(100)]
        buffers = [torch.zeros(1 + 997 * (i % 5)) for i in range(100)]
        posted = []
        for i, buffer in enumerate(buffers):
            posted.append(comm.irecv(buffer, 0)) if i % 2 else comm.recv(buffer, 0)
        for work in posted:
            work.wait()
        return [buffer[-1].item() for buffer in buffers]


def test_blocking_and_posted_transfers_keep_their_order(ranks):
    assert ranks(2).run(_mixed_order) == [[float(i) for i in range(100)]] * 2


def _progress_without_calls() -> bool:
    """Neither rank enters the communicator again, and 16 times the ring still arrives."""
    with world() as comm:
        data = torch.arange(2 * RING, dtype=torch.int64)
        buffer = data.clone() if comm.rank == 0 else torch.zeros_like(data)
        work = comm.isend(buffer, 1) if comm.rank == 0 else comm.irecv(buffer, 0)
        deadline = time.monotonic() + 20
        while not work.done() and time.monotonic() < deadline:
            torch.ones(64, 64) @ torch.ones(64, 64)
        arrived = work.done()
        work.wait()
        comm.barrier()
        return arrived and torch.equal(buffer, data)


def test_posted_transfers_move_while_the_caller_computes(ranks):
    assert all(ranks(2).run(_progress_without_calls))


def _asleep(pid: int) -> bool:
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] == "S"


def _wakes(kind: str) -> float:
    """Median time between a publication and the return of the rank that slept for it."""
    with world() as comm:
        pid = torch.tensor([os.getpid()])
        if comm.rank == 0:
            comm.recv(pid, 1)
        else:
            comm.send(pid, 0)
        late = []
        for _ in range(15):
            now = torch.zeros(1, dtype=torch.float64)
            if comm.rank == 0:
                while not _asleep(pid.item()):
                    os.sched_yield()
                now.fill_(time.monotonic())
                comm.all_reduce(now) if kind == "all_reduce" else comm.send(now, 1)
            else:
                comm.all_reduce(now) if kind == "all_reduce" else comm.recv(now, 0)
                late.append(time.monotonic() - now.item())
            comm.barrier()
        return statistics.median(late) if late else 0.0


@pytest.mark.parametrize("kind", ["all_reduce", "recv"])
def test_a_publication_wakes_the_rank_that_sleeps_for_it(ranks, kind):
    # Without the doorbell the sleeper would look again after its slice of 20 ms, just begun.
    assert max(ranks(2).run(_wakes, kind)) < 0.01


def _dropped_work() -> bool:
    """A posted receive whose Work and tensor are forgotten must not write into freed memory."""
    with world() as comm:
        n = RING
        if comm.rank == 0:
            comm.barrier()
            comm.isend(torch.ones(n), 1).wait()
        else:
            comm.irecv(torch.zeros(n), 0)
            comm.barrier()
            probes = [torch.zeros(n) for _ in range(8)]
        comm.barrier()
        return comm.rank == 0 or not any(probe.any() for probe in probes)


def test_the_buffer_of_a_forgotten_transfer_stays_alive(ranks):
    assert all(ranks(2).run(_dropped_work))
