"""The process_group transport offers the communicator's calls over gloo: results, order, views, refusals."""

import gc
import itertools

import pytest
import torch
import torch.distributed as dist
from cases import KINDS, Case, grid
from shm_world import caught

from tpmp_kernels.comm import communicator
from tpmp_kernels.comm.process_group import ProcessGroupCommunicator, messages


def _world(timeout: float = 20):
    return communicator(dist.group.WORLD, transport="process_group", timeout=timeout)


# ---- collectives

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_MOVED = (torch.bool, torch.uint16, torch.complex64, torch.float8_e4m3fn)
_SIZES = (0, 1, 97)


def _wrong(cases: list[Case], native: bool) -> list[str]:
    with pytest.MonkeyPatch.context() as patch, _world() as comm:
        if native:
            patch.setattr(ProcessGroupCommunicator, "_sealed", lambda *_: False)
        return [text for case in cases if (text := case.wrong(comm, *case.post(comm)()))]


@pytest.mark.parametrize("size", [2, 3])
def test_every_kind_dtype_op_and_size(ranks, size):
    cases = grid(_SIZES, (torch.float32, torch.bfloat16, torch.int64), _MOVED)
    cases += grid((5,), (torch.float64, torch.float16, torch.int32, torch.int16, torch.int8, torch.uint8))
    for wrong in ranks(size).run(_wrong, cases, False):
        assert wrong == []


@pytest.mark.full
@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_every_combination(ranks, size):
    for wrong in ranks(size).run(_wrong, grid((0, 1, 2, 97, 10_007), _FLOATS + _INTEGERS, _MOVED), False):
        assert wrong == []


def _wrong_in_pieces(cases: list[Case]) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(messages, "_PIECE", 64)
        patch.setattr(messages, "_SMALL", 16)
        return _wrong(cases, False)


@pytest.mark.parametrize("size", [2, 3])
def test_large_tensors_go_in_pieces(ranks, size):
    for wrong in ranks(size).run(_wrong_in_pieces, grid((16, 17, 50), (torch.float64, torch.float16))):
        assert wrong == []
    for wrong in ranks(size).run(_wrong, [Case(kind, 1_100_003) for kind in ("all_reduce", "all_gather")], False):
        assert wrong == []


def test_the_backends_own_collectives(ranks):
    """As on NCCL, here of gloo; at two ranks no order of reduction is open."""
    cases = grid(_SIZES, (torch.float32, torch.int64), _MOVED)
    for wrong in ranks(2).run(_wrong, cases, True):
        assert wrong == []


def _reductions() -> list[str]:
    wrong = []
    numbers = {"sum": 6, "avg": 2, "max": 3, "min": 1, "prod": 6}  # of 1, 2, 3
    with _world() as comm:
        for dtype, (op, want) in itertools.product(_FLOATS + _INTEGERS, numbers.items()):
            if op == "avg" and not dtype.is_floating_point:
                continue
            x = torch.full((1003,), comm.rank + 1, dtype=dtype)
            if comm.all_reduce(x, op, tag="t") is not x or not (x == want).all():
                wrong.append(f"{op} {dtype}: {x[:1]}")
        half = comm.all_reduce(torch.full((3,), 40_000.0, dtype=torch.float16), "avg")
        wrong += [] if (half == 40_000).all() else [f"avg overflows: {half}"]
        rounded = comm.all_reduce(torch.full((3,), [256.0, 1.0, 1.0][comm.rank], dtype=torch.bfloat16))
        wrong += [] if (rounded == 258).all() else [f"sum rounds on the way: {rounded}"]
    return wrong


def test_sums_of_small_numbers(ranks):
    assert ranks(3).run(_reductions) == [[]] * 3


# ---- order


def _posted() -> list[str]:
    wrong = []
    cases = [Case(kind, n, torch.float32) for n in (3, 5000) for kind in KINDS]
    with _world() as comm:
        finishes = [case.post(comm, tag=str(i)) for i, case in enumerate(cases)]
        between = Case("all_reduce", 11, torch.float64)
        wrong.append(between.wrong(comm, *between.post(comm)()))
        x = torch.full((4,), float(comm.rank))
        comm.all_gather(gathered := torch.zeros(4 * comm.size), x)
        for case, finish in reversed(list(zip(cases, finishes, strict=True))):
            wrong.append(case.wrong(comm, *finish()))
        work = comm.barrier(async_op=True)
        work.wait(timeout=5)
        work.wait()
        wrong.append("" if work.done() and gathered.view(-1, 4)[:, 0].tolist() == [*range(comm.size)] else "barrier")
    return [text for text in wrong if text]


@pytest.mark.parametrize("size", [2, 3])
def test_posted_calls_keep_order_among_blocking_ones(ranks, size):
    assert ranks(size).run(_posted) == [[]] * size


def _polled() -> list:
    with _world() as comm:
        peer, seen = 1 - comm.rank, []
        into = torch.zeros(2, 3).t()
        first = comm.irecv(into, peer)
        seen.append(any(first.done() for _ in range(500)))
        comm.barrier()
        works = [
            first,
            comm.isend(torch.ones(6), peer),
            comm.all_reduce(torch.ones(4), async_op=True),
        ]
        while not all(work.done() for work in works):
            dist.distributed_c10d._get_default_store().check(["anything"])
        seen.append(bool(into.any()))  # landed on the waiting thread only
        for work in works:
            work.wait()
        return [*seen, bool(into.all())]


def test_done_makes_no_caller_wait(ranks):
    assert ranks(2).run(_polled) == [[False, False, True]] * 2


# ---- messages and views


def _transfers() -> list[bool]:
    with _world() as comm:
        peer = 1 - comm.rank
        sizes = (1, 1001, 0, 300_000)
        outgoing = [torch.full((n,), float(10 * comm.rank + i)) for i, n in enumerate(sizes)]
        incoming = [torch.zeros(n) for n in sizes]
        works = [comm.isend(t, peer, tag=str(i)) for i, t in enumerate(outgoing)]
        works += [comm.irecv(t, peer, tag=str(i)) for i, t in enumerate(incoming)]
        for work in works:
            work.wait()
            work.wait()
        checks = [bool((t == 10 * peer + i).all()) for i, t in enumerate(incoming)]
        base = torch.arange(12.0).reshape(3, 4)
        if comm.rank == 0:
            comm.send(base.t(), 1)
            comm.send(torch.tensor([1 + 2j, 3j]), 1)
        else:
            into = torch.zeros(4, 6)
            comm.recv(into[:, ::2], 0)
            checks.append(torch.equal(into[:, ::2], base.t()) and not into[:, 1::2].any())
            checks.append(comm.recv(torch.zeros(2, dtype=torch.complex64), 0).tolist() == [1 + 2j, 3j])
        doubled = base.clone()
        comm.all_reduce(doubled.t())
        wide = torch.zeros(2, 6)
        comm.all_gather(wide[:, ::2], torch.full((3,), comm.rank + 1.0))
        checks.append(wide[:, ::2].tolist() == [[1.0] * 3, [2.0] * 3] and not wide[:, 1::2].any())
        return [*checks, torch.equal(doubled, 2 * base), all(work.done() for work in works), comm.seconds > 0]


def test_transfers_and_views(ranks):
    for checks in ranks(2).run(_transfers):
        assert all(checks), checks


def _forgotten() -> float:
    with _world() as comm:
        if comm.rank == 0:
            comm.isend(torch.full((100_000,), 7.0), 1)
            gc.collect()
        comm.barrier()
        return 7.0 if comm.rank == 0 else comm.recv(torch.zeros(100_000), 0).mean().item()


def test_a_message_whose_work_was_dropped_arrives(ranks):
    assert ranks(2).run(_forgotten) == [7.0] * 2


def _saved_for_backward() -> str:
    with _world() as comm:
        w = torch.ones(3, requires_grad=True)
        x = torch.ones(3)
        y = (w * x).sum()
        comm.all_reduce(x)
        try:
            y.backward()
        except RuntimeError as error:
            return str(error)
    return "no error"


def test_autograd_notices_a_changed_tensor(ranks):
    for text in ranks(2).run(_saved_for_backward):
        assert "modified by an inplace operation" in text


# ---- refusals


def _refusals() -> list:
    comm = _world()
    comm.barrier(tag="x")
    comm.all_reduce(torch.ones(4, 8), tag="a")
    calls = [
        lambda: comm.all_reduce(torch.ones(2), "mean"),
        lambda: comm.send(torch.ones(1), comm.rank),
        lambda: comm.all_reduce(torch.ones(2, dtype=torch.complex64)),
        lambda: comm.reduce(torch.ones(2, dtype=torch.bool), 0),
        lambda: comm.all_reduce(torch.ones(2, dtype=torch.int32), "avg"),
        lambda: comm.broadcast(torch.ones(2).to_sparse(), 0),
        lambda: comm.broadcast(torch.ones(2, device="meta"), 0),
        lambda: comm.send(torch.ones(2, dtype=torch.complex64).conj(), 1 - comm.rank),
        lambda: comm.all_reduce(torch.ones(1).expand(4)),
        lambda: comm.all_reduce([1.0]),
        lambda: comm.all_gather(torch.ones(3), torch.ones(2)),
    ]
    texts = []
    for call in calls:
        try:
            call()
        except (ValueError, TypeError) as error:
            texts.append(f"{type(error).__name__} {error}")
    comm.barrier()  # nothing had started
    ops = comm.last_ops()
    comm.close()
    comm.close()
    return [texts, caught(comm.barrier), ops]


def test_bad_arguments_are_refused_before_anything_starts(ranks):
    expected = (
        "ValueError all_reduce: op is 'mean'", "ValueError send: dst", "TypeError all_reduce: gloo cannot reduce",
        "TypeError reduce: gloo cannot reduce torch.bool", "TypeError all_reduce: avg", "ValueError broadcast: got a",
        "ValueError broadcast: got a torch.strided tensor on meta", "ValueError send: tensor is a lazy conj",
        "ValueError all_reduce: tensor of strides", "TypeError all_reduce: expected a plain", "ValueError all_gather",
    )  # fmt: skip
    for texts, (kind, _, text), ops in ranks(2).run(_refusals):
        assert len(texts) == len(expected)
        assert all(text.startswith(start) for text, start in zip(texts, expected, strict=True)), texts
        assert kind == "TransportError" and "closed" in text
        assert ops == ["barrier 'x' #1", "all_reduce sum float32[4,8] 'a' #2", "barrier #3"]
