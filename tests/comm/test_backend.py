"""The torch.distributed backend "tpmp": every call of c10d against the same call on gloo, and what gloo cannot show."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from c10d_calls import ALL_GATHER, REDUCE_SCATTER, ROOT, Calls, tpmp_group

from tpmp_kernels.comm import backend
from tpmp_kernels.comm._ext import C
from tpmp_kernels.comm.alone import SelfCommunicator
from tpmp_kernels.errors import UsageError

pytestmark = pytest.mark.skipif(C is None, reason="needs the compiled extension")


def compared(names, asynchronous: bool, dtype=torch.float32, op=dist.ReduceOp.SUM) -> list[str]:
    """The calls that differ from gloo: bitwise, or in more than the order of a sum where three or more ranks add."""
    bad = []
    with tpmp_group() as mine:
        assert type(mine) is backend.TpmpGroup and dist.get_backend(mine) == "tpmp"
        ours, theirs = (Calls(each, asynchronous, dtype, op) for each in (mine, dist.group.WORLD))
        exact = ours.size == 2 or not dtype.is_floating_point or op in (dist.ReduceOp.MAX, dist.ReduceOp.MIN)
        for name in names:
            got, want = ours.run(name), theirs.run(name)
            if dtype is torch.bool:  # gloo adds their bytes up, and leaves 2 for true
                got, want = [x.view(torch.uint8) for x in got], [(x.view(torch.uint8) > 0).byte() for x in want]
            rtol, atol = (0, 0) if exact or name in Calls.MOVING else (1.6e-2, 2e-2)
            try:
                torch.testing.assert_close(got, want, rtol=rtol, atol=atol)
            except AssertionError as error:
                bad.append(f"{name}: {error}")
    return bad


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("size", [2, 3])
def test_every_call_is_gloos(ranks, size, asynchronous):
    assert ranks(size).run(compared, Calls.MOVING + Calls.REDUCING, asynchronous) == [[]] * size


def all_movement() -> list[str]:
    cases = [(dtype, Calls.MOVING) for dtype in (torch.bool, torch.int8, torch.bfloat16)]
    cases += [(torch.complex64, ("broadcast", "all_gather", "send_recv"))]  # what gloo has
    return [f"{dtype} {text}" for dtype, names in cases for text in compared(names, True, dtype)]


def test_movement_of_any_dtype(ranks):
    assert ranks(2).run(all_movement) == [[]] * 2


def all_reductions() -> list[str]:
    op = dist.ReduceOp
    cases = [(torch.bfloat16, (op.SUM, op.AVG, op.MAX, op.MIN, op.PRODUCT))]
    cases += [(torch.int64, (op.SUM, op.MAX, op.MIN, op.PRODUCT, op.BAND, op.BOR, op.BXOR))]
    cases += [(torch.bool, (op.SUM, op.MAX, op.MIN, op.PRODUCT))]
    names = ("all_reduce", "reduce", "reduce_scatter_tensor", "all_reduce_coalesced")
    bad = []
    for dtype, ops in cases:
        for each in ops:
            bad += [f"{dtype} {each} {text}" for text in compared(names, False, dtype, each)]
    return bad


def test_reductions_of_any_op(ranks):
    assert ranks(2).run(all_reductions) == [[]] * 2


def refused() -> list[str]:
    x = torch.ones(4)
    with tpmp_group() as mine:
        peer = 1 - dist.get_rank()
        calls = {
            "any source": lambda: dist.recv(x, group=mine),
            "sparse": lambda: dist.all_reduce(x.to_sparse(), group=mine),
            "dtype": lambda: dist.all_reduce(x.to(torch.float8_e4m3fn), group=mine),
            "premul": lambda: dist.all_reduce(x, dist._make_nccl_premul_sum(2.0), group=mine),
            "count": lambda: dist.all_gather([x, x[:2]], x, group=mine),
            "two": lambda: mine.allreduce([x, x]),
            "source": lambda: dist.isend(x, peer, group=mine).source_rank(),
        }
        texts = []
        for call in calls.values():
            with pytest.raises((UsageError, ValueError, TypeError, RuntimeError)) as info:
                call()
            texts.append(str(info.value))
        dist.recv(x, peer, group=mine)
        dist.all_reduce(x, group=mine)  # nothing of it reached the peers: the group lives
    return texts


def test_what_it_does_not_carry_is_refused_by_name(ranks):
    words = "any source", "sparse", "float8", "PREMUL_SUM", "one output for each", "one tensor", "no receive"
    for texts in ranks(2).run(refused):
        assert [word for word, text in zip(words, texts, strict=True) if word not in text] == []


class Beside:
    """In the place of the group that holds NCCL: says which of its methods was called."""

    def __getattr__(self, name: str):
        assert hasattr(dist.ProcessGroup, name)
        return lambda *args: name


def test_tensors_of_other_devices_go_beside():
    x = torch.ones(2, device="meta")
    mine = backend.TpmpGroup(dist.HashStore(), SelfCommunicator(), [], None)
    mine._beside = Beside()
    calls = {
        "allreduce": ([x],), "allreduce_coalesced": ([x, x],), "reduce": ([x],), "broadcast": ([x],),
        "_reduce_scatter_base": (x, x), "reduce_scatter": ([x], [[x]]), "reduce_scatter_tensor_coalesced": ([x], [x]),
        "_allgather_base": (x, x), "allgather": ([[x]], [x]), "allgather_coalesced": ([[x]], [x]),
        "allgather_into_tensor_coalesced": ([x], [x]), "gather": ([[x]], [x]), "scatter": ([x], [[x]]),
        "alltoall_base": (x, x, [], []), "alltoall": ([x], [x]), "send": ([x], 0, 0), "recv": ([x], 0, 0),
        "_start_coalescing": (x.device,), "_end_coalescing": (x.device,),
    }  # fmt: skip
    wrong = {name: args for name, args in calls.items() if getattr(mine, name)(*args) not in (name, None)}
    assert wrong == {}
    renamed = "all_gather_single", "reduce_scatter_single", "all_to_all_single"
    assert all(callable(getattr(mine, name)) for name in renamed)


# ---- works


def works() -> None:
    rank = dist.get_rank()
    with tpmp_group() as mine:
        x = torch.full((3,), 1.0 + rank)
        work = dist.all_reduce(x, group=mine, async_op=True)
        assert work.wait() and work.wait(timedelta(seconds=5)) and work.is_completed() and work.is_success()
        assert work.exception() is None and work.result()[0] is x and x.tolist() == [3.0] * 3
        work.synchronize()
        assert work.get_future().value()[0] is x

        doubled = dist.all_reduce(x, group=mine, async_op=True).get_future().then(lambda done: done.value()[0] * 2)
        assert doubled.wait().tolist() == [12.0] * 3

        # A receive whose future is asked for does not stand in the way of a later collective's.
        y = torch.zeros(3)
        late = dist.irecv(y, 1 - rank, group=mine).get_future()
        parts = [torch.zeros(3), torch.zeros(3)]
        assert dist.all_gather(parts, x, group=mine, async_op=True).get_future().wait()[1] is parts[1]
        assert not late.done()
        dist.barrier()  # gloo's
        sent = dist.isend(x, 1 - rank, group=mine)
        assert late.wait()[0] is y and y.tolist() == x.tolist()
        sent.wait()

        work = dist.barrier(group=mine, async_op=True)
        assert work.get_future().wait() is None and work.result() == []
        assert dist.recv(y, 1 - rank, group=mine, tag=3) == 1 - rank if rank else not dist.send(x, 1, group=mine, tag=3)


def test_works_and_futures(ranks):
    ranks(2).run(works)


def posted_is_not_waited_for() -> None:
    """Each rank starts what the other has not yet entered; a blocking call would stop both."""
    rank = dist.get_rank()
    with tpmp_group() as first, tpmp_group() as second:
        x, y = torch.ones(2), torch.ones(2)
        order = [(x, first), (y, second)]
        pending = [dist.all_reduce(t, group=g, async_op=True) for t, g in (order if rank else reversed(order))]
        for work in pending:
            work.wait()
        assert (x + y).tolist() == [4.0, 4.0]
        # The wait may come first where the partner is still to post.
        if rank == 0:
            future = dist.all_reduce(x, group=first, async_op=True).get_future()
            dist.barrier()  # gloo's
            future.wait()
        else:
            dist.barrier()
            dist.all_reduce(x, group=first)
        assert x.tolist() == [4.0, 4.0]


def test_an_async_call_returns_at_once(ranks):
    ranks(2).run(posted_is_not_waited_for)


def batched(numel: int, device: bool) -> None:
    rank = dist.get_rank()
    with tpmp_group() as mine:
        x, y = torch.full((numel,), float(rank)), torch.zeros(numel)
        opts = dist.BroadcastOptions()
        opts.rootRank, opts.asyncOp = 1, False
        if device:
            z, w = torch.ones(2), torch.ones(2)
            with dist.distributed_c10d._coalescing_manager(mine, torch.device("cpu"), async_ops=True) as works:
                dist.isend(x, 1 - rank, group=mine)
                dist.irecv(y, 1 - rank, group=mine)
                mine.allreduce([z])
                mine.broadcast([w.mul_(5) if rank else w], opts)
                assert rank == 0 or w.tolist() == [5.0, 5.0]
            works.wait()
            assert z.tolist() == [2.0, 2.0] and w.tolist() == [5.0, 5.0] and len(works.works[0].result()) == 3
        else:
            ops = [dist.P2POp(dist.isend, x, 1 - rank, group=mine), dist.P2POp(dist.irecv, y, 1 - rank, group=mine)]
            for work in dist.batch_isend_irecv(ops):
                work.wait()
        assert torch.equal(y, torch.full((numel,), 1.0 - rank))


@pytest.mark.parametrize("device", [False, True])
def test_both_send_before_they_receive(ranks, device):
    ranks(2).run(batched, 1 << 21, device)


def coalesced() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    manager = dist.distributed_c10d._coalescing_manager
    with tpmp_group() as mine:
        wholes, parts = [torch.zeros(size * n) for n in (2, 3)], [torch.full((n,), float(rank)) for n in (2, 3)]
        with manager(mine):
            for whole, part in zip(wholes, parts, strict=True):
                ALL_GATHER(whole, part, group=mine)
        assert [whole.tolist() for whole in wholes] == [[0.0] * n + [1.0] * n for n in (2, 3)]
        with manager(mine, async_ops=True) as works:
            for whole, part in zip(wholes, parts, strict=True):
                REDUCE_SCATTER(part, whole, group=mine)
        works.wait()
        assert [part.tolist() for part in parts] == [[2.0 * rank] * n for n in (2, 3)]


def test_the_coalescing_manager(ranks):
    ranks(2).run(coalesced)


def objects() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    with tpmp_group() as mine:
        everyone = [None] * size
        dist.all_gather_object(everyone, {"rank": rank, "text": "x" * rank}, group=mine)
        assert everyone == [{"rank": r, "text": "x" * r} for r in range(size)]
        told = ["from root", rank] if rank == ROOT else [None, None]
        dist.broadcast_object_list(told, ROOT, group=mine)
        assert told == ["from root", ROOT]
        gathered = [None] * size if rank == ROOT else None
        dist.gather_object(rank * 2, gathered, ROOT, group=mine)
        assert gathered == (list(range(0, 2 * size, 2)) if rank == ROOT else None)
        mine_only = [None]
        dist.scatter_object_list(mine_only, [f"for {r}" for r in range(size)] if rank == ROOT else None, ROOT, mine)
        assert mine_only == [f"for {rank}"]
        if rank == 0:
            dist.send_object_list(["a", 1], 1, group=mine)
        elif rank == 1:
            got = [None, None]
            dist.recv_object_list(got, 0, group=mine)
            assert got == ["a", 1]


def test_object_collectives(ranks):
    ranks(3).run(objects)
