"""The nccl transport carries every collective and message, over the double: results, order, streams, buffers."""

import gc
import time

import pytest
import torch
from cases import Case, grid
from nccl_world import KEPT, Rank, connected, double, log, run, synchronize
from shm_world import caught, refusals

from tpmp_kernels.comm._ext import C

pytestmark = pytest.mark.skipif(C is None, reason="needs the compiled extension")

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32, torch.int8, torch.uint8)
_MOVED = (torch.bool, torch.int16, torch.uint16, torch.complex64, torch.float8_e4m3fn)


def _wrong(cases: list[Case]) -> list[str]:
    with connected() as comm:
        return [text for case in cases if (text := case.wrong(comm, *case.post(comm)()))]


def test_every_kind_dtype_op_and_size(ranks):
    """At two ranks no order of reduction is open."""
    cases = grid((0, 97), (torch.float32, torch.bfloat16), _MOVED[:2])
    cases += [Case("all_reduce", 5, dtype) for dtype in (torch.float64, torch.float16, *_INTEGERS)]
    for wrong in ranks(2).run(_wrong, cases):
        assert wrong == []


@pytest.mark.full
@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_combination(ranks, size):
    exact = [torch.int64, torch.int32] if size > 2 else [*_FLOATS, *_INTEGERS]
    for wrong in ranks(size).run(_wrong, grid((0, 1, 2, 97, 10_007), exact, _MOVED)):
        assert wrong == []


def test_three_ranks_move_and_add_integers(ranks):
    for wrong in ranks(3).run(_wrong, grid((7,), (torch.int64,), (torch.bool,))):
        assert wrong == []


# ---- order


def _transfers() -> list:
    with connected() as comm:
        peer = 1 - comm.rank
        sizes = (1, 1001, 0, 30_000)
        outgoing = [torch.full((n,), float(10 * comm.rank + i)) for i, n in enumerate(sizes)]
        incoming = [torch.zeros(n) for n in sizes]
        works = [comm.isend(t, peer, tag=str(i)) for i, t in enumerate(outgoing)]
        works += [comm.irecv(t, peer, tag=str(i)) for i, t in enumerate(incoming)]
        for work in works:
            work.wait()
            work.wait()
        seen = [bool((t == 10 * peer + i).all()) for i, t in enumerate(incoming)]
        wide = torch.zeros(2, 6)
        comm.all_gather(wide[:, ::2], torch.full((3,), comm.rank + 1.0))
        seen.append(wide[:, ::2].tolist() == [[1.0] * 3, [2.0] * 3] and not wide[:, 1::2].any())
        comm.warm_up()
        comm.barrier()
        return [*seen, all(work.done() for work in works), comm.seconds > 0, not comm._kept, len(comm.last_ops()) > 8]


def test_messages_of_both_directions_cross(ranks):
    for seen in ranks(2).run(_transfers):
        assert all(seen), seen


def _round(rank: Rank) -> float:
    """A ring of three: each sends to the next and receives from the one before."""
    mine, theirs = torch.full((1000,), float(rank.rank)), torch.zeros(1000)
    works = [rank.core.isend(rank.message(mine, (rank.rank + 1) % 3)),
             rank.core.irecv(rank.message(theirs, (rank.rank - 1) % 3))]  # fmt: skip
    for work in works:
        rank.finish(work)
    return theirs.mean().item()


def test_messages_go_round_without_a_buffer():
    assert run(3, _round, connected=True) == [2.0, 0.0, 1.0]


def _behind_slow_work(rank: Rank) -> list[float]:
    """The input is ready only after what the caller's stream holds; the caller's stream waits for the output."""
    cuda = double()[0]
    x, y = torch.zeros(4), torch.zeros(4)
    ready = torch.full((4,), rank.rank + 1.0)
    gate = torch.zeros(1, dtype=torch.int32)
    KEPT.extend([y, ready, gate])
    assert cuda.cuStreamWaitValue32_v2(rank.stream, gate.data_ptr(), 1, 0) == 0
    assert cuda.cuMemcpyAsync(x.data_ptr(), ready.data_ptr(), 16, rank.stream) == 0
    work = rank.all_reduce(x)
    work.order(rank.stream)
    assert cuda.cuMemcpyAsync(y.data_ptr(), x.data_ptr(), 16, rank.stream) == 0
    time.sleep(0.02)
    early = work.done() or bool(x.any())
    gate[0] = 1
    synchronize(rank.stream)
    return [float(early), *y.tolist()]


def test_a_call_is_ordered_by_the_callers_stream(ranks):
    assert run(2, _behind_slow_work) == [[0.0, 3.0, 3.0, 3.0, 3.0]] * 2


def _two_at_once(rank: Rank) -> list:
    first, second = torch.ones(100_000), torch.full((3,), 2.0)
    works = [rank.all_reduce(first, tag="a"), rank.all_reduce(second, tag="b")]
    for work in reversed(works):
        rank.finish(work)
    works[0].wait(5)
    until = time.monotonic() + 5
    while not all(work.done() for work in works) and time.monotonic() < until:  # the watch has yet to see it
        time.sleep(0.001)
    return [first.sum().item(), second.tolist(), all(work.done() for work in works), rank.core.last_ops()]


def test_posted_calls_keep_their_order_and_streams(ranks):
    outcome = [200_000, [4.0] * 3, True, ["all_reduce 'a'", "all_reduce 'b'"]]
    assert run(2, _two_at_once) == [outcome] * 2


def _lanes(rank: Rank) -> list[int]:
    tensor = torch.zeros(8)
    peer = 1 - rank.rank
    send, recv = (rank.core.isend, rank.core.irecv)
    for work in [rank.all_reduce(tensor), *(call(rank.message(torch.zeros(2), peer)) for call in (send, recv))]:
        rank.finish(work)
    return rank.core.streams()


def test_each_lane_has_a_stream_of_its_own(ranks):
    before = len(log())
    streams = run(2, _lanes, connected=True)
    assert all(len(set(each)) == 3 and 0 not in each for each in streams)
    called = [line for line in log()[before:] if line.startswith(("ncclAllReduce", "ncclSend", "ncclRecv"))]
    assert len(called) == 6


# ---- behind a counter


def _gated(rank: Rank) -> list:
    """Two chunks, each reduced when its counter has its count; the second counter moves first."""
    counters, chunks = torch.zeros(2, dtype=torch.int32), torch.ones(2, 5)
    KEPT.append(counters)
    after = rank.core.mark(rank.stream)
    calls = [rank.collective("all_reduce", chunk, chunk, 5, tag=str(i)) for i, chunk in enumerate(chunks)]
    works = [rank.core.post_gated(call, 10.0, after, counters[i:].data_ptr(), 3) for i, call in enumerate(calls)]
    counters[1] = 3
    time.sleep(0.02)
    early = any(work.done() for work in works)
    chunks[0] = 7.0  # what the kernel stores before it raises the counter
    counters[0] = 3
    for work in works:
        work.wait(5)
    return [early, chunks.tolist()]


def test_a_gated_call_waits_for_its_counter(ranks):
    assert run(2, _gated) == [[False, [[14.0] * 5, [2.0] * 5]]] * 2


def _gated_and_aborted(rank: Rank) -> str:
    counters, x = torch.zeros(1, dtype=torch.int32), torch.ones(4)
    KEPT.append(counters)
    work = rank.core.post_gated(
        rank.collective("all_reduce", x, x, 4), 30.0, rank.core.mark(rank.stream), counters.data_ptr(), 3
    )
    rank.core.abort("enough")
    begun = time.monotonic()
    _, _, text = caught(lambda: work.wait(20))
    while counters.item() != 3 and time.monotonic() - begun < 5:
        time.sleep(0.001)
    return f"{text} | {time.monotonic() - begun < 2} | {counters.item()}"


def test_abort_opens_the_gates(ranks):
    for rank, text in enumerate(run(2, _gated_and_aborted)):
        assert text.startswith(f"rank {rank} of 2 failed: enough") and text.endswith("| True | 3"), text


# ---- buffers, life


def _keeps() -> list[int]:
    with connected() as comm:
        works = [comm.all_reduce(torch.ones(10), async_op=True) for _ in range(5)]
        held = len(comm._kept)
        for work in works:
            work.wait()
        after = len(comm._kept)
        comm.all_reduce(torch.ones(10), async_op=True)  # its Work is dropped, its tensor is not
        return [held >= 1, after, len(comm._kept)]


def test_tensors_live_until_the_stream_waits(ranks):
    for held, after, dropped in ranks(2).run(_keeps):
        assert (held, after, dropped) == (True, 0, 1)


def test_nothing_is_left():
    cuda, nccl_double = double()
    callers = 2  # streams of theirs
    gc.collect()
    before = nccl_double.fake_nccl_live(), cuda.fake_cuda_live_streams() + callers, cuda.fake_cuda_live_events()
    run(2, _two_at_once)
    gc.collect()
    after = nccl_double.fake_nccl_live(), cuda.fake_cuda_live_streams(), cuda.fake_cuda_live_events()
    assert after == before


def _again() -> list:
    seen = []
    for _ in range(2):
        comm = connected(name="again")
        seen.append(comm.all_reduce(torch.ones(3)).tolist())
        comm.close()
        comm.close()
    try:
        comm.all_reduce(torch.ones(3))
    except Exception as error:
        seen.append(str(error))
    return seen


def test_close_and_make_anew(ranks):
    for first, second, closed in ranks(2).run(_again):
        assert first == second == [2.0] * 3
        assert closed == "communicator 'again' is closed; make a new one"


def _refused() -> list[str]:
    with connected() as comm:
        return refusals(
            [
                lambda: comm.all_reduce(torch.ones(3, dtype=torch.int16)),
                lambda: comm.all_reduce(torch.ones(3, device="meta")),
                lambda: comm.all_gather(torch.ones(3), torch.ones(3)),
                lambda: comm.send(torch.ones(3), comm.rank),
            ]
        )


def test_bad_input_is_refused_before_anything_starts(ranks):
    for short, elsewhere, parts, peer in ranks(2).run(_refused):
        assert short.startswith("all_reduce: nccl cannot reduce torch.int16; convert to one of float64")
        assert elsewhere.startswith("all_reduce: nccl carries dense cpu tensors, got torch.strided on meta")
        assert "2 times the elements" in parts and "pass another group rank" in peer
