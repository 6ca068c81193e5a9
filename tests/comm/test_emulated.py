"""The emulated link is as late as its model says, hides behind computing, and changes nothing else about the calls.

Lower bounds are exact, because a call may never be early; upper bounds leave room for a busy machine. The processes of
one host share time.monotonic(), so that ranks are compared on it.
"""

import time

import pytest
import torch
import torch.distributed as dist
from shm_world import caught, world

from tpmp_kernels.comm.alone import SelfCommunicator
from tpmp_kernels.comm.arguments import Collective
from tpmp_kernels.comm.emulated import EmulatedLink, _Lane, bytes_moved

NEVER = float("inf")  # as a bandwidth: bytes take no time
BUSY = 0.25  # seconds that a busy machine may add
FLOATS = torch.zeros(12)


def link(latency: float, bandwidth: float = NEVER, timeout: float = 30) -> EmulatedLink:
    return EmulatedLink(world(timeout), latency=latency, bandwidth=bandwidth)


def clocked(call) -> tuple[float, float]:
    """When `call` began and when it returned."""
    began = time.monotonic()
    call()
    return began, time.monotonic()


# ---- the model


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (Collective("all_reduce", 12, FLOATS, FLOATS), 2 * 3 / 4 * 48),
        (Collective("reduce_scatter", 12, FLOATS, FLOATS), 3 * 48),
        (Collective("all_gather", 12, FLOATS, FLOATS), 3 * 48),
        (Collective("all_to_all", 3, FLOATS, FLOATS), 3 * 12),
        (Collective("all_to_all", 0, FLOATS, FLOATS, input_splits=[3, 4, 5, 0], output_splits=[1, 9, 1, 1]), 8 * 4),
        (Collective("scatter", 12, None, FLOATS), 3 * 48),
        (Collective("gather", 12, FLOATS, None), 3 * 48),
        (Collective("broadcast", 12, FLOATS), 48),
        (Collective("reduce", 12, FLOATS), 48),
        (Collective("barrier"), 0),
    ],
    ids=lambda value: value.kind if isinstance(value, Collective) else "",
)
def test_bytes_that_cross_a_link_of_four_ranks(call, expected):
    assert bytes_moved(call, rank=1, size=4) == expected


def test_lane_gives_the_first_gap_that_is_long_enough():
    lane = _Lane()
    assert lane.free == 0
    assert lane.take(10, 2) == 12
    lane.occupy(20, 30)
    assert lane.take(11, 4) == 16, "behind the first"
    assert lane.take(11, 5) == 35, "not between them"
    assert lane.take(0, 3) == 3, "ahead of all"
    assert lane.free == 35


@pytest.mark.parametrize("wrong", [{"latency": -1}, {"latency": float("nan")}, {"bandwidth": 0}, {"bandwidth": -1.0}])
def test_figures_that_are_no_link(wrong):
    with pytest.raises(ValueError, match=rf"emulated link: {next(iter(wrong))} is .*; pass"):
        EmulatedLink(SelfCommunicator(), **({"latency": 0, "bandwidth": 1e9} | wrong))


def test_tensors_are_refused_as_by_the_wrapped_communicator():
    with pytest.raises(TypeError, match=r"all_reduce: expected a torch\.Tensor, got list"):
        EmulatedLink(SelfCommunicator(), latency=0, bandwidth=1e9).all_reduce([1.0, 2.0])


def test_group_of_one_has_no_delay():
    alone = EmulatedLink(SelfCommunicator(name="one", timeout=1), latency=100, bandwidth=1)
    x = torch.arange(3.0)
    alone.all_reduce(x)  # 100 seconds would be a timeout
    assert torch.equal(x, torch.arange(3.0))
    assert alone.all_gather(torch.empty(3), x, async_op=True).done()
    assert repr(alone) == "<self over an emulated link communicator 'one': rank 0 of 1, 1e+08 us, 1e-09 GB/s>"


# ---- results are those of the wrapped communicator


def every_call(comm) -> list[torch.Tensor]:
    rank, size = comm.rank, comm.size
    x = torch.arange(6.0).view(2, 3) + 10 * rank
    turned = torch.empty(3, 2).t()  # not contiguous
    whole = torch.arange(6.0 * size) * (rank + 1)
    ragged = torch.empty(sum(range(1, size + 1)) if rank == 0 else size)
    results = [
        comm.all_reduce(x.clone(), "max"),
        comm.all_reduce(turned.copy_(x)).clone(),
        comm.reduce(x.clone(), root=1),
        comm.reduce_scatter(torch.empty(6), whole),
        comm.all_gather(torch.empty(6 * size), x),
        comm.broadcast(x.clone(), root=size - 1),
        comm.all_to_all(torch.empty(6 * size), whole),
        comm.scatter(torch.empty(6), whole if rank == 0 else None, root=0),
        comm.gather(torch.empty(6 * size) if rank == 0 else torch.empty(0), x, root=0),
    ]
    splits = [rank + 1] + [1] * (size - 1)  # rank r sends r + 1 elements to rank 0, one to each other
    taken = [r + 1 for r in range(size)] if rank == 0 else [1] * size
    results.append(comm.all_to_all(ragged, torch.arange(float(sum(splits))) + rank, taken, splits))
    posted = turned.copy_(x)
    comm.all_reduce(posted, async_op=True).wait()
    comm.barrier()
    incoming = torch.empty(3, 2).t()
    arriving = comm.irecv(incoming, (rank - 1) % size, tag="ring")
    comm.send(x, (rank + 1) % size, tag="ring")
    arriving.wait()
    return [*results, posted, incoming]


def both_ways() -> list[bool]:
    with world() as plain, link(1e-4, 1e9) as late:
        return [torch.equal(*pair) for pair in zip(every_call(plain), every_call(late), strict=True)]


def test_results_are_those_of_the_wrapped_communicator(ranks):
    assert all(all(same) for same in ranks(3).run(both_ways))


def labels() -> tuple[str, str, list[str]]:
    with link(2e-3, 5e8) as late:
        late.all_reduce(torch.ones(5), tag="layer 3")
        return late.transport, repr(late), late.last_ops()


def test_rows_and_messages_say_that_it_is_emulated(ranks):
    for transport, text, ops in ranks(2).run(labels):
        assert transport == "shm over an emulated link"
        assert text.startswith("<shm over an emulated link communicator") and text.endswith(", 2000 us, 0.5 GB/s>")
        assert len(ops) == 2 and all("'layer 3 (emulated link)'" in line for line in ops)


def test_close_closes_the_wrapped_communicator(monkeypatch):
    closed = []
    monkeypatch.setattr(SelfCommunicator, "close", lambda self: closed.append(self))
    alone = SelfCommunicator()
    with EmulatedLink(alone, latency=0, bandwidth=1e9):
        assert closed == []
    assert closed == [alone]


def test_empty_is_that_of_the_wrapped_communicator(monkeypatch):
    given = torch.empty(0)
    monkeypatch.setattr(SelfCommunicator, "empty", lambda self, *shape, dtype: (given, shape, dtype))
    late = EmulatedLink(SelfCommunicator(), latency=0, bandwidth=1e9)
    assert late.empty(2, 3, dtype=torch.int8) == (given, (2, 3), torch.int8)


# ---- collectives


def late_all_reduce() -> tuple[float, float]:
    with link(0.03, 1e7) as late:
        late.barrier()
        if late.rank == 1:
            time.sleep(0.05)  # what is modelled counts from the last rank
        return clocked(lambda: late.all_reduce(torch.ones(100_000)))  # 400,000 bytes: 40 ms at 10 MB/s


def test_collective_is_complete_latency_and_bytes_after_the_last_rank_came(ranks):
    times = ranks(2).run(late_all_reduce)
    last = max(began for began, _ in times)
    assert all(0.07 <= ended - last < 0.07 + BUSY for _, ended in times)


def late_roots() -> list[tuple[float, float]]:
    with link(0.02) as late:
        late.barrier()
        calls = [
            lambda: late.broadcast(torch.ones(4), root=0),
            lambda: late.reduce(torch.ones(4), root=1),
            lambda: late.barrier(),
        ]
        return [clocked(call) for call in calls]


def test_roots_and_senders_are_as_late_as_the_others(ranks):
    for times in zip(*ranks(2).run(late_roots), strict=True):
        assert all(ended - max(began for began, _ in times) >= 0.02 for _, ended in times)


def hidden_behind_work() -> tuple[float, float]:
    with link(0.3) as late:
        late.barrier()

        def overlapped():
            work = late.all_reduce(torch.ones(1000), async_op=True)
            early = work.done()
            time.sleep(0.3)  # stands for computing of the same length
            work.wait()
            assert not early and work.done()

        return clocked(overlapped)


def test_posted_collective_hides_behind_work_of_equal_length(ranks):
    times = ranks(2).run(hidden_behind_work)
    took = max(ended for _, ended in times) - max(began for began, _ in times)
    assert 0.3 <= took < 0.3 + BUSY, "one length, not two"


def in_place_before_it_is_due() -> tuple[bool, float]:
    with link(0.3) as late:
        late.barrier()
        began = time.monotonic()
        work = late.all_reduce(torch.ones(10), async_op=True)
        while not (work.carried.done() and work.stamped.done()):
            time.sleep(1e-3)
        early = work.done() and time.monotonic() - began < 0.3
        while not work.done():
            time.sleep(1e-3)
        return early, time.monotonic() - began


def test_done_says_when_the_modelled_time_is_over(ranks):
    for early, took in ranks(2).run(in_place_before_it_is_due):
        assert not early and 0.3 <= took < 0.3 + BUSY


def cpu_seconds_of_a_wait() -> float:
    with link(0.4) as late:
        before = time.process_time()
        late.all_reduce(torch.ones(10))
        return time.process_time() - before


def test_waiting_costs_no_core(ranks):
    assert max(ranks(2).run(cpu_seconds_of_a_wait)) < 0.1


def posted_in_a_row() -> tuple[float, list[float]]:
    with link(0.01, 1e8) as late:
        late.barrier()
        began = time.monotonic()
        works = [late.all_reduce(torch.ones(250_000), async_op=True) for _ in range(4)]  # 10 + 10 ms each
        ends = [clocked(work.wait)[1] for work in works]
        return began, ends


def test_collectives_take_the_link_one_after_the_other(ranks):
    results = ranks(2).run(posted_in_a_row)
    began = max(began for began, _ in results)
    for _, ends in results:
        assert all(end - began >= 0.02 * (i + 1) for i, end in enumerate(ends))
        assert ends[-1] - began < 0.08 + BUSY


# ---- messages


def message() -> tuple[float, float]:
    with link(0.2, 1e7) as late:
        late.barrier()
        x = torch.full((100_000,), float(late.rank))  # 40 ms
        if late.rank == 0:
            return clocked(lambda: late.send(x, 1))
        times = clocked(lambda: late.recv(x, 0))
        assert x.sum() == 0
        return times


def test_message_leaves_now_and_arrives_late(ranks):
    (began, left), (_, arrived) = ranks(2).run(message)
    assert left - began < 0.2, "the sender is free before it arrives"
    assert 0.24 <= arrived - began < 0.24 + BUSY


def waited_for_backwards() -> list[float]:
    with link(0.01, 1e7) as late:
        late.barrier()
        if late.rank == 0:
            for n in (200_000, 1):  # 80 ms, then nothing
                late.isend(torch.full((n,), float(n)), 1).wait()
            return []
        now = time.monotonic()
        for start, end in ((0.03, 0.12), (0.17, 0.3)):  # leaves a gap in which the small one alone has room
            late._incoming.occupy(now + start, now + end)
        large, small = torch.empty(200_000), torch.empty(1)
        works = [late.irecv(large, 0), late.irecv(small, 0)]
        ends = [clocked(work.wait)[1] for work in reversed(works)]
        assert large.eq(200_000).all() and small.item() == 1
        return [now, *ends]


def test_messages_of_a_pair_do_not_overtake(ranks):
    _, (now, small, _) = ranks(2).run(waited_for_backwards)
    assert small - now >= 0.38, "the small one waits for the large one, which waits for the lane"


def shared_lanes(src: int | None) -> list[tuple[float, float]]:
    """Rank `src` sends to both others, or both others to rank 0: 50 ms each."""
    with link(0.0, 1e7) as late:
        late.barrier()
        pairs = [(src, r) for r in range(3) if r != src] if src is not None else [(1, 0), (2, 0)]
        began = time.monotonic()
        works = [late.isend(torch.ones(125_000), b) for a, b in pairs if a == late.rank]
        works += [late.irecv(torch.empty(125_000), a) for a, b in pairs if b == late.rank]
        return [(began, clocked(work.wait)[1]) for work in works]


def test_messages_to_two_ranks_share_the_senders_lane(ranks):
    sent, first, second = ranks(3).run(shared_lanes, 0)
    assert first[0][1] - sent[0][0] >= 0.05
    assert second[0][1] - sent[0][0] >= 0.1


def test_messages_from_two_ranks_share_the_receivers_lane(ranks):
    received, one, two = ranks(3).run(shared_lanes, None)
    assert max(end for _, end in received) - max(one[0][0], two[0][0]) >= 0.05
    assert max(end for _, end in received) - min(one[0][0], two[0][0]) >= 0.1


def message_and_collective() -> list[float]:
    """A collective that both ranks have posted takes the lanes; the message after it waits for them."""
    with link(0.0, 1e7) as late:
        late.barrier()
        began = time.monotonic()
        posted = late.all_reduce(torch.ones(125_000), async_op=True)  # 50 ms
        while not posted.stamped.done():  # until the wrapped transport is through with it
            time.sleep(1e-3)
        x = torch.ones(125_000)
        (late.send if late.rank == 0 else late.recv)(x, 1 - late.rank)
        return [began, time.monotonic()]


def test_message_waits_for_the_collective_before_it(ranks):
    results = ranks(2).run(message_and_collective)
    assert results[1][1] - max(began for began, _ in results) >= 0.1


# ---- faults and life


def too_slow() -> list[tuple]:
    late = link(30, timeout=0.3)
    began = time.monotonic()
    first = caught(lambda: late.all_reduce(torch.ones(2), tag="slow"))
    return [first, caught(late.barrier), (time.monotonic() - began,)]


def test_deadline_covers_the_emulated_time(ranks):
    for first, later, (took,) in ranks(2).run(too_slow):
        assert 0.3 <= took < 0.3 + 2 * BUSY
        assert first[0] == later[0] == "TransportTimeout"
        assert "all_reduce is still on the emulated link" in first[2] and "29.7 s too short" in first[2]


def too_slow_for_one() -> tuple:
    late = link(30, timeout=10)
    if dist.get_rank() == 1:
        late.send(torch.ones(2), 0)
        return caught(late.barrier)
    return caught(lambda: late.irecv(torch.empty(2), 1).wait(timeout=0.2))


def test_peers_are_told_of_a_deadline_that_passed_on_the_link(ranks):
    (kind, _, text), (told, culprit, copy) = ranks(2).run(too_slow_for_one)
    assert (kind, told, culprit) == ("TransportTimeout", "PeerFailed", 0)
    assert "recv from rank 1 is still on the emulated link" in text
    assert "recv from rank 1 is still on the emulated link" in copy


def different_calls() -> tuple:
    late = link(0.01, timeout=10)
    return caught(lambda: late.barrier() if late.rank else late.all_reduce(torch.ones(3), tag="t"))


def test_mismatch_comes_through(ranks):
    for kind, _, text in ranks(2).run(different_calls):
        assert kind == "CollectiveMismatch"
        assert "all_reduce" in text and "barrier" in text and "emulated link" not in text


def other_leaves(how: str) -> tuple:
    late = link(0.01, timeout=10)
    late.barrier()
    if late.rank == 1:
        late.abort("no more disk") if how == "abort" else late.close()
        return ()
    try:
        return caught(lambda: late.all_reduce(torch.ones(3)))
    finally:
        late.close()


@pytest.mark.parametrize(("how", "kind"), [("abort", "PeerFailed"), ("close", "PeerDied")])
def test_error_of_a_peer_comes_through(ranks, how, kind):
    (found, culprit, text), _ = ranks(2).run(other_leaves, how)
    assert (found, culprit) == (kind, 1)
    assert how != "abort" or "no more disk" in text


def closed_in_flight() -> float:
    late = link(0.2, timeout=10)
    late.barrier()
    if late.rank == 0:
        late.send(torch.arange(5.0), 1)
        late.irecv(torch.empty(3), 1)  # nothing will come
        began, ended = clocked(late.close)
        dist.barrier()
        return ended - began
    dist.barrier()  # rank 0 has closed
    x = torch.empty(5)
    late.recv(x, 0)
    late.close()
    return x.sum().item()


def test_close_neither_hangs_nor_loses_what_was_sent(ranks):
    took, total = ranks(2).run(closed_in_flight)
    assert took < BUSY and total == 10
