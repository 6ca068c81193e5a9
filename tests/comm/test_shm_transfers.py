"""Transfers on shm arrive whole and in order, move while the caller computes, and wake who sleeps for them."""

import os
import random
import signal
import statistics
import time

import pytest
import torch
from shm_world import world

from tpmp_kernels.comm._ext import C
from tpmp_kernels.errors import CollectiveMismatch, TransportError

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


def _put(posts: int) -> list[bool]:
    """Several messages of 16 times the ring each: whether each send was over when it was posted."""
    with world() as comm:
        values = [_message(2 * RING, torch.int64, seed) for seed in range(posts)]
        if comm.rank == 0:
            comm.barrier()
            works = [comm.isend(value, 1, tag=f"m{i}") for i, value in enumerate(values)]
            over = [work.done() for work in works]
            for work in works:
                work.wait()
            return over
        buffers = [comm.empty(2 * RING, dtype=torch.int64).zero_() for _ in values]
        works = [comm.irecv(buffer, 0, tag=f"m{i}") for i, buffer in enumerate(buffers)]
        comm.barrier()
        for work in works:
            work.wait()
        return [torch.equal(*pair) for pair in zip(buffers, values, strict=True)]


def test_a_send_is_put_into_the_buffer_of_a_receive_that_was_posted_before(ranks):
    """Through the ring, a message is over when three quarters of its pieces were taken."""
    over, right = ranks(2).run(_put, 3)
    assert all(right) and over == [True] * 3


def test_more_receives_than_the_sender_is_shown_arrive_too(ranks):
    over, right = ranks(2).run(_put, 12)
    assert all(right) and over[:4] == [True] * 4


def _any_pair_of_memories(seed: int) -> bool:
    """Messages of all lengths, from and into heap or other memory, posted in any interleaving of both ends."""
    draw = random.Random(seed)
    plan = [(draw.choice([1, RING // 8, RING // 4, RING]), draw.random(), draw.random()) for _ in range(40)]
    with world() as comm:
        works, results = [], []
        for i, (n, source, target) in enumerate(plan):
            value = _message(n, torch.float32, i)
            if comm.rank == 0:
                memory = comm.empty(n) if source < 0.3 else torch.empty(n)
                works.append(comm.isend(memory.copy_(value), 1, tag=f"m{i}"))
            else:
                buffer = comm.empty(n) if target < 0.7 else torch.empty(n)
                works.append(comm.irecv(buffer, 0, tag=f"m{i}"))
                results.append((buffer, value))
            if random.random() < 0.3:
                time.sleep(random.random() * 2e-3)
            while len(works) > 10:
                works.pop(0).wait()
        for work in works:
            work.wait()
        return all(torch.equal(*pair) for pair in results)


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.full) for s in range(1, 30))])
def test_messages_of_any_memory_arrive_whole_and_in_order(ranks, seed):
    assert all(ranks(2).run(_any_pair_of_memories, seed))


def _put_of_another_kind() -> str:
    """The receiver shows a buffer of as many bytes, of another dtype."""
    with world() as comm:
        memory = comm.empty(2 * RING)
        try:
            if comm.rank == 0:
                comm.barrier()
                comm.isend(torch.ones(2 * RING, dtype=torch.int32), 1, tag="x").wait()
            else:
                work = comm.irecv(memory.zero_(), 0, tag="x")
                comm.barrier()
                work.wait()
            comm.barrier()
        except CollectiveMismatch as error:
            return f"{error} {memory.any().item()}"


def test_what_does_not_belong_there_is_not_put(ranks):
    texts = ranks(2).run(_put_of_another_kind)
    assert all("dtype" in text for text in texts) and texts[1].endswith("False")


def _empty_after_a_fault() -> str:
    with world() as comm:
        comm.abort("enough")
        try:
            comm.empty(4)
        except TransportError as error:
            return str(error)


def test_memory_of_a_failed_group_is_not_given_out(ranks):
    """A peer may still be writing into a buffer that was given back."""
    assert all("comm.empty" in text and "enough" in text for text in ranks(2).run(_empty_after_a_fault))


def _late_posts() -> float:
    """Median time that a receive takes for which a sender sleeps already."""
    with world() as comm:
        pid, took = torch.tensor([os.getpid()]), []
        comm.broadcast(pid, 1)
        memory = comm.empty(2 * RING, dtype=torch.uint8)
        for _ in range(15):
            if comm.rank == 1:
                comm.send(torch.ones(2 * RING, dtype=torch.uint8), 0)
            else:
                while not _asleep(pid.item()):
                    os.sched_yield()
                start = time.monotonic()
                comm.recv(memory, 1)
                took.append(time.monotonic() - start)
            comm.barrier()
        return statistics.median(took) if took else 0.0


def test_a_posted_receive_wakes_the_sender_that_sleeps_for_it(ranks):
    assert max(ranks(2).run(_late_posts)) < 0.01


def _sends_to_a_stopped_rank() -> bool:
    """Posted before its receive, a send longer than the ring needs nothing of a receiver that stops behind its post."""
    with world() as comm:
        pid = torch.tensor([os.getpid()])
        comm.broadcast(pid, 1)
        memory = comm.empty(2 * RING, dtype=torch.int64)
        if comm.rank == 0:
            work = comm.isend(torch.arange(2 * RING), 1)
            comm.barrier()
            deadline = time.monotonic() + 5
            while not work.done() and time.monotonic() < deadline:
                time.sleep(0.001)
            put = work.done()
            os.kill(pid.item(), signal.SIGCONT)
            work.wait()
        else:
            comm.barrier()
            time.sleep(0.05)  # so that the sender's caller no longer moves anything itself
            work = comm.irecv(memory, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
            work.wait()
            put = torch.equal(memory, torch.arange(2 * RING))
        comm.barrier()
        return put


def test_a_send_waits_for_its_receive_to_be_put_whole(ranks):
    assert all(ranks(2).run(_sends_to_a_stopped_rank))


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
