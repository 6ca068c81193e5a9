"""Every collective on shm gives the right bits: any dtype and size, blocking or posted, from plain memory or lent."""

import random

import pytest
import torch
from cases import KINDS, REDUCING, Case, same_bits
from shm_world import caught, refusals, world

from tpmp_kernels.comm._ext import C

pytestmark = pytest.mark.skipif(C is None, reason="needs the compiled extension")

REDUCIBLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16,
             torch.int8, torch.uint8)  # fmt: skip
MOVED = (*REDUCIBLE, torch.bool, torch.uint16, torch.complex64, torch.complex128, torch.float8_e4m3fn)
SLOT = 128 << 10  # bytes of payload


def _outcomes(cases: list[Case], heap: str, together: int) -> list[str]:
    """What is wrong on this rank. `together` calls are posted before the first is waited for; `heap` says whose
    tensors lie in the segment."""
    wrong = []
    with world() as comm:
        lends = heap == "all" or (heap == "some" and comm.rank % 2 == 1)
        memory = comm.empty if lends else torch.empty
        for at in range(0, len(cases), together):
            batch = cases[at : at + together]
            finishes = [case.post(comm, memory=memory, tag=str(case)) for case in batch]
            wrong += [
                text for case, finish in zip(batch, finishes, strict=True) if (text := case.wrong(comm, *finish()))
            ]
    return wrong


@pytest.mark.parametrize("heap", ["none", "some", "all"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_kind_dtype_and_op(ranks, size, heap):
    cases = [Case(kind, n, dtype) for kind in KINDS for n in (0, 1, 97)
             for dtype in (REDUCIBLE if kind in REDUCING else MOVED)]  # fmt: skip
    cases += [Case(kind, 31, dtype, op) for kind in REDUCING for dtype in REDUCIBLE for op in ("max", "min", "prod")]
    cases += [Case(kind, 31, dtype, "avg") for kind in REDUCING for dtype in REDUCIBLE[:4]]
    cases += [
        Case(kind, 17, root=root) for kind in ("reduce", "broadcast", "scatter", "gather") for root in range(size)
    ]
    cases += [Case("all_to_all", n, torch.int32, uneven=True) for n in (0, 1, 50)]
    assert ranks(size).run(_outcomes, cases, heap, 7) == [[]] * size


def _sizes(size: int) -> list[int]:
    """Bytes around every edge: the one-shot limit, lanes and slots, pieces of the two-shot all_reduce, several."""
    lane, piece = SLOT // size, SLOT * size // (size + 1)
    edges = (128 * 1024 // size, lane, piece, SLOT, 2 * piece, 3 * SLOT, 5 * piece)
    return sorted({edge + d for edge in edges for d in (-4096, -4, 0, 4, 260)})


@pytest.mark.parametrize("heap", ["none", "some", "all"])
@pytest.mark.parametrize("size", [2, 3])
def test_every_kind_at_the_edges_of_pieces(ranks, size, heap):
    draw = random.Random(f"{size} {heap}")
    sizes = _sizes(size)
    cases = [Case(kind, n // 4, uneven=uneven) for kind in KINDS for n in draw.sample(sizes, 5)
             for uneven in ((False, True) if kind == "all_to_all" else (False,))]  # fmt: skip
    cases += [Case("all_reduce", n // 2, torch.bfloat16) for n in draw.sample(sizes, 5)]
    assert ranks(size).run(_outcomes, cases, heap, 2) == [[]] * size


@pytest.mark.full
@pytest.mark.parametrize("heap", ["none", "some", "all"])
@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
def test_the_full_grid(ranks, size, heap):
    cases = [Case(kind, n // dtype.itemsize, dtype) for kind in KINDS for n in _sizes(size)
             for dtype in (torch.float32, torch.bfloat16, torch.int64)]  # fmt: skip
    cases += [Case(kind, n) for kind in KINDS for n in range(0, 4098, 3)]
    assert ranks(size).run(_outcomes, cases, heap, 3, timeout=600) == [[]] * size


# ---- order, views and aliases


def _order(rounds: int) -> bool:
    """Blocking and posted calls of every kind in one program order, waited for in another, over transfers."""
    draw, right = random.Random(1), True
    with world() as comm:
        peer = comm.rank ^ 1
        for i in range(rounds):
            cases = [Case(draw.choice(KINDS), draw.choice((1, 33, 5_000)), torch.int32) for _ in range(4)]
            incoming = torch.zeros(1 + 700 * (i % 3))
            works = [comm.irecv(incoming, peer, tag="m"), comm.isend(torch.full_like(incoming, i), peer, tag="m")]
            finishes = [case.post(comm, tag=str(case)) for case in cases]
            if i % 2:
                total = comm.all_reduce(torch.full((3,), i), tag="inline")
                right &= (total == i * comm.size).all().item()
            for j in draw.sample(range(4), 4):
                right &= not cases[j].wrong(comm, *finishes[j]())
            for work in works:
                work.wait()
            right &= (incoming == i).all().item()
    return right


@pytest.mark.parametrize("size", [2, 4])
def test_posted_and_blocking_calls_keep_their_order(ranks, size):
    assert all(ranks(size).run(_order, 40))


def _views() -> list[bool]:
    with world() as comm:
        base = torch.arange(24.0).reshape(4, 6) + comm.rank
        checks = []
        output = torch.zeros(12, 4)
        comm.all_gather(output.t()[:, ::2], base[:, :3].t())  # [4, 6] of [3, 4]
        flat = torch.cat([(torch.arange(24.0).reshape(4, 6) + r)[:, :3].t().flatten() for r in range(2)])
        checks.append(torch.equal(output.t()[:, ::2].flatten(), flat) and not output.t()[:, 1::2].any())
        whole = torch.zeros(2 * 5000)
        mine = whole.view(2, -1)[comm.rank]
        mine.fill_(comm.rank + 1)
        comm.all_gather(whole, mine)  # in place: the input is its part of the output
        checks.append((whole.view(2, -1) == torch.tensor([[1.0], [2.0]])).all().item())
        parts = torch.ones(2, 5000)
        comm.reduce_scatter(parts[comm.rank], parts)  # in place likewise
        checks.append((parts[comm.rank] == 2).all().item())
        saved = torch.ones(3, requires_grad=True)
        product = saved * (other := torch.ones(3))
        comm.all_reduce(other)
        try:
            product.sum().backward()
            checks.append(False)
        except RuntimeError as error:
            checks.append("modified by an inplace operation" in str(error))
        work = comm.all_reduce(base.t(), async_op=True)
        work.wait()
        work.wait()
        checks.append(torch.equal(base, 2 * torch.arange(24.0).reshape(4, 6) + 1) and work.done())
        return checks


def test_views_and_calls_in_place(ranks):
    for checks in ranks(2).run(_views):
        assert all(checks), checks


def _refusals() -> list[str]:
    with world() as comm:
        x = torch.ones(4)
        calls = [
            lambda: comm.all_gather(x, x),
            lambda: comm.reduce_scatter(x, x),
            lambda: comm.reduce_scatter(x[:2], x.double()),
            lambda: comm.reduce_scatter(x[:2].bool(), x.bool()),
            lambda: comm.broadcast(x, 2),
            lambda: comm.gather(x[:3], x[:2], comm.rank),
            lambda: comm.scatter(x, None, comm.rank),
            lambda: comm.all_to_all(x[:3], x[:3]),
            lambda: comm.all_to_all(x, x, [1, 2], [2, 2]),
            lambda: comm.all_to_all(x, x, [5, -1], [2, 2]),
            lambda: comm.all_gather(x[:1].expand(4), x[:2]),
            lambda: comm.all_reduce(x, async_op=True, op="mean"),
            lambda: comm.reduce(x.int(), 0, "avg"),
        ]
        texts = refusals(calls)
        comm.barrier()  # refused before anything reached the peers
        return texts


def test_bad_arguments_are_refused_by_name(ranks):
    parts = ("output is torch.float32[4] and input torch.float32[4]; pass output with 2 times", "input with 2 times",
             "torch.float64[4]", "torch.bool", "root is 2", "output is torch.float32[3]", "got NoneType",
             "that 2 ranks divide", "output_splits is [1, 2] for 4 rows", "[5, -1]", "expanded", "'mean'",
             "avg of torch.int32")  # fmt: skip
    for texts in ranks(2).run(_refusals):
        for part, text in zip(parts, texts, strict=True):
            assert part in text, text


def _uneven_mismatch() -> tuple:
    with world() as comm:
        x = torch.ones(4)
        sends = [2, 2] if comm.rank == 0 else [1, 3]
        return caught(lambda: comm.all_to_all(torch.zeros(4), x, [2, 2], sends))


def test_parts_that_do_not_meet_are_a_mismatch(ranks):
    for kind, _, text in ranks(2).run(_uneven_mismatch):
        assert kind == "CollectiveMismatch" and "differ in count" in text and "elements for rank" in text, text


# ---- memory in the segment


def _memory() -> list:
    with world() as comm:
        a = comm.empty(3, 4)
        b = comm.empty((5,), dtype=torch.bfloat16)
        place = a.data_ptr()
        view = a[1:]
        del a
        c = comm.empty(12)
        kept = c.data_ptr() != place  # a view keeps the memory
        del view
        d = comm.empty(12)
        again = d.data_ptr() == place
        too_much = caught(lambda: comm.empty(1 << 45))
        empty = comm.empty(0, 3)
        if comm.rank == 0:
            comm.send(c.fill_(3), 1, tag="lent")
            return [kept, again, too_much[0], b.dtype, tuple(empty.shape)]
        work = comm.irecv(d, 0, tag="lent")
        work.wait()
        outlives = (d == 3).all().item()
    comm.close()
    d.fill_(7)  # still mapped
    return [
        kept,
        again,
        too_much[0],
        b.dtype,
        tuple(empty.shape),
        outlives,
        d.sum().item(),
        caught(lambda: comm.empty(1))[0],
    ]


def test_memory_in_the_segment_is_reused_and_outlives_the_communicator(ranks):
    first, second = ranks(2).run(_memory)
    assert first == [True, True, "TransportError", torch.bfloat16, (0, 3)]
    assert second[:5] == first and second[5:] == [True, 84.0, "TransportError"]


def _lent_in_place(rounds: int) -> bool:
    """What was lent is overwritten as soon as the call returns: nobody may still read it."""
    with world() as comm:
        x, y = comm.empty(1 << 18), comm.empty(comm.size << 18)
        for i in range(rounds):
            comm.all_reduce(x.fill_(comm.rank + i))
            if not (x == sum(range(comm.size)) + comm.size * i).all():
                return False
            comm.all_gather(y, x.fill_(comm.rank + i))
            x.fill_(-1)
            if not same_bits(y.view(comm.size, -1), (torch.arange(comm.size) + i).float()[:, None].expand(-1, 1 << 18)):
                return False
        return True


@pytest.mark.parametrize("size", [2, 3])
def test_nobody_reads_what_was_lent_after_the_call(ranks, size):
    assert all(ranks(size).run(_lent_in_place, 60))
