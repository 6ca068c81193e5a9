"""The process_group transport offers the communicator's calls over gloo."""

import os

import torch
import torch.distributed as dist
from shm_world import caught

from tpmp_kernels.comm import communicator


def _world(timeout: float = 20):
    return communicator(dist.group.WORLD, transport="process_group", timeout=timeout)


def _reductions() -> list[str]:
    wrong = []
    numbers = {"sum": 6, "avg": 2, "max": 3, "min": 1, "prod": 6}  # of 1, 2, 3
    with _world() as comm:
        assert (comm.transport, comm.size) == ("process_group", 3)
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32):
            for op, want in numbers.items():
                if op == "avg" and not dtype.is_floating_point:
                    continue
                for n in (0, 1, 1003):
                    x = torch.full((n,), comm.rank + 1, dtype=dtype)
                    if comm.all_reduce(x, op, tag="t") is not x or not (x == want).all():
                        wrong.append(f"{op} {dtype} {n}: {x[:1]}")
        comm.barrier()
    return wrong


def test_every_op_and_dtype(ranks):
    assert ranks(3).run(_reductions) == [[]] * 3


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
        else:
            into = torch.zeros(4, 6)
            comm.recv(into[:, ::2], 0)
            checks.append(torch.equal(into[:, ::2], base.t()) and not into[:, 1::2].any())
        doubled = base.clone()
        comm.all_reduce(doubled.t())
        return [*checks, torch.equal(doubled, 2 * base), all(work.done() for work in works), comm.seconds > 0]


def test_transfers_and_views(ranks):
    for checks in ranks(2).run(_transfers):
        assert all(checks), checks


def _refusals() -> list:
    comm = _world()
    comm.barrier(tag="x")
    ops = comm.last_ops()
    texts = []
    for call in (lambda: comm.all_reduce(torch.ones(2), "mean"), lambda: comm.send(torch.ones(1), comm.rank)):
        try:
            call()
        except ValueError as error:
            texts.append(str(error))
    comm.close()
    return [*texts, caught(comm.barrier), ops]


def test_bad_arguments_and_calls_after_close(ranks):
    for op, peer, (kind, _, text), ops in ranks(2).run(_refusals):
        assert "'mean'" in op and "another group rank" in peer
        assert kind == "TransportError" and "closed" in text
        assert ops == ["barrier #1 'x'"]


def _late() -> tuple | None:
    comm = _world(timeout=0.3)
    if comm.rank == 1:
        return None
    first = caught(lambda: comm.recv(torch.ones(2, 3), 1, tag="F3"))
    return first, caught(comm.barrier)


def test_a_timeout_names_the_call_and_ends_the_communicator(ranks):
    (kind, _, text), again = ranks(2).outcomes(_late)[0].value
    assert kind == "TransportTimeout" and "recv from rank 1 #1 'F3' float32[2, 3]" in text and "do: " in text
    assert again[0] == kind
    ranks(2).close()  # gloo aborted the pair of ranks


def _died() -> tuple:

    comm = _world()
    comm.barrier()
    if comm.rank == 1:
        os._exit(3)
    return caught(lambda: comm.recv(torch.ones(2), 1))


def test_a_lost_peer_is_named(ranks):
    outcomes = ranks(2).outcomes(_died)
    assert outcomes[1].exitcode == 3
    assert outcomes[0].value[:2] == ("PeerDied", 1)
