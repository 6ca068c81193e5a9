"""All-reduce on shm gives the right bits: every op, dtype and size against a tree written in Python."""

import math
import threading

import pytest
import torch
import torch.distributed as dist
from cases import OPS, same_bits, tree
from shm_world import refusals, world

from tpmp_kernels.comm import communicator
from tpmp_kernels.comm._ext import C

pytestmark = pytest.mark.skipif(C is None, reason="needs the compiled extension")

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
CHUNK = 128 << 10  # bytes of a collective slot


def _inputs(size: int, shape, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """What each rank contributes; every rank draws all of them."""
    generator = torch.Generator().manual_seed(seed)
    if dtype in INTEGERS:
        low = 0 if dtype == torch.uint8 else -(2**30)
        return [torch.randint(low, 2**30, shape, generator=generator).to(dtype) for _ in range(size)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(size)]


def _all_reduce_cases(cases) -> list[str]:
    """Run the cases on this rank and return those whose bits are not the tree's."""
    wrong = []
    with world() as comm:
        for seed, (shape, dtype, op) in enumerate(cases):
            parts = _inputs(comm.size, shape, dtype, seed)
            mine = parts[comm.rank].clone()
            result = comm.all_reduce(mine, op, tag=f"case{seed}")
            if result is not mine or not same_bits(mine, tree(parts, op)):
                wrong.append(f"{op} {dtype} {shape}")
    return wrong


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_op_and_dtype_gives_the_bits_of_the_tree(ranks, size):
    cases = [((n,), dtype, op) for dtype in FLOATS + INTEGERS for op in OPS for n in (1, 97, 1031)]
    cases = [(s, d, op) for s, d, op in cases if op != "avg" or d in FLOATS]
    assert ranks(size).run(_all_reduce_cases, cases) == [[]] * size


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_size_around_the_edges_gives_the_bits_of_the_tree(ranks, size):
    edges = [128 * 1024 // size, CHUNK, 3 * CHUNK]  # one-shot limit, one chunk, several
    cases = [((0,), torch.float32, "sum"), ((0, 4), torch.bfloat16, "max"), ((), torch.float64, "sum")]
    for dtype in (torch.float32, torch.bfloat16, torch.uint8):
        for edge in edges:
            n = edge // dtype.itemsize
            cases += [((n + d,), dtype, "sum") for d in (-1, 0, 1, 65)]
    assert ranks(size).run(_all_reduce_cases, cases) == [[]] * size


def _thread(rank: int, core, parts: list, op: str, results: list) -> None:
    mine = parts[rank].clone()
    code = C.DTYPES[str(mine.dtype).removeprefix("torch.")]
    data, kind = mine.data_ptr(), C.KINDS["all_reduce"]
    core.run(C.Collective(kind, data, data, mine.numel(), code, C.REDUCE_OPS[op], -1, "", [], []), 30.0)
    results[rank] = mine


@pytest.mark.parametrize("size", [5, 12, 64])
def test_trees_of_more_ranks_which_are_threads_here(size):
    server = C.SegmentServer(size)
    cores = [server.transport(), *[None] * (size - 1)]

    def attach(rank: int) -> None:
        cores[rank] = C.attach(server.address, server.nonce, size, rank)

    for rank in range(1, size):
        attaching = threading.Thread(target=attach, args=(rank,))
        attaching.start()
        server.serve(10)
        attaching.join()
    for n, dtype, op in [(3, torch.float32, "sum"), (70_001, torch.bfloat16, "avg"), (300_000, torch.float64, "sum")]:
        parts, results = _inputs(size, (n,), dtype, seed=n), [None] * size
        threads = [
            threading.Thread(target=_thread, args=(rank, core, parts, op, results)) for rank, core in enumerate(cores)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        want = tree(parts, op)
        assert all(same_bits(result, want) for result in results)
    for core in cores:
        core.close()


def _special_values() -> dict:
    bad = {}
    every_half = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    with world() as comm:
        for dtype in (torch.float16, torch.bfloat16):
            values = every_half.view(dtype)
            parts = [values, values.flip(0)]
            result = comm.all_reduce(parts[comm.rank].clone())
            want = (parts[0].float() + parts[1].float()).to(dtype)
            same = (result.view(torch.int16) == want.view(torch.int16)) | (result.isnan() & want.isnan())
            bad[str(dtype)] = int((~same).sum())
        row = torch.tensor([1.0, math.nan, math.inf, -math.inf, math.nan])
        parts = [row, row.flip(0)]
        for op in ("max", "min"):
            got, want = comm.all_reduce(parts[comm.rank].clone(), op), OPS[op](*parts)
            bad[op] = int((~torch.isclose(got, want, rtol=0, atol=0, equal_nan=True)).sum())
    return bad


def test_every_half_value_infinities_and_nan(ranks):
    for bad in ranks(2).run(_special_values):
        assert set(bad.values()) == {0}, bad


def _views() -> list[bool]:
    with world() as comm:
        checks = []
        base = torch.arange(24, dtype=torch.float32).reshape(4, 6) + comm.rank
        want = 2 * torch.arange(24, dtype=torch.float32).reshape(4, 6) + 1
        views = {"transposed": lambda t: t.t(), "stepped": lambda t: t[:, ::2], "offset": lambda t: t.view(-1)[1:]}
        for view in views.values():
            t = base.clone()
            comm.all_reduce(view(t))
            untouched = torch.ones_like(t, dtype=torch.bool)
            view(untouched).fill_(False)
            checks.append(torch.equal(view(t), view(want)) and torch.equal(t[untouched], base[untouched]))
        if comm.rank == 0:
            comm.send(base.t(), 1)
            comm.send(base[:, ::2], 1)
        else:
            into = torch.zeros(6, 4)
            checks.append(torch.equal(comm.recv(into, 0), base.t() - 1))
            stepped = torch.zeros(4, 6)
            comm.recv(stepped[:, ::2], 0)
            checks.append(torch.equal(stepped[:, ::2], base[:, ::2] - 1) and not stepped[:, 1::2].any())
        leaf = torch.nn.Parameter(torch.ones(3))
        version = leaf._version
        comm.all_reduce(leaf)
        checks.append(leaf.tolist() == [2, 2, 2] and leaf.requires_grad and leaf._version > version)
        with torch.inference_mode():
            checks.append(comm.all_reduce(torch.ones(2)).tolist() == [2, 2])
        return checks


def test_views_parameters_and_inference_tensors(ranks):
    for checks in ranks(2).run(_views):
        assert all(checks), checks


def _soak(rounds: int) -> bool:
    """Collectives of changing size and algorithm with transfers of a ring of ranks under them."""
    with world() as comm:
        right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
        total = comm.size * (comm.size + 1) // 2
        for i in range(rounds):
            incoming = torch.zeros(1 + 37 * (i % 200), dtype=torch.int32)
            works = [comm.irecv(incoming, left, tag="ring")]
            works.append(comm.isend(torch.full_like(incoming, i * 8 + comm.rank), right, tag="ring"))
            n = (i * 7919) % 40_000 if i % 10 == 0 else i % 50
            x = torch.full((n,), comm.rank + 1 + i, dtype=torch.int64)
            comm.all_reduce(x, tag=str(i))
            for work in works:
                work.wait()
            if not (x == total + comm.size * i).all() or not (incoming == i * 8 + left).all():
                return False
        return True


@pytest.mark.parametrize("size", [2, 4])
def test_many_rounds_of_collectives_over_transfers(ranks, size):
    assert all(ranks(size).run(_soak, 400))


def _groups() -> list:
    halves = [dist.new_group([0, 1]), dist.new_group([3, 2])]
    mine = halves[dist.get_rank() // 2]
    with communicator(mine) as half, communicator(mine, name="again") as again, world() as both:
        a, b, c = torch.ones(3), torch.ones(3), torch.ones(3)
        half.all_reduce(a), both.all_reduce(b), again.all_reduce(c, "prod")
        other = torch.full((1,), dist.get_rank(), dtype=torch.int64)
        if half.rank == 0:
            half.send(other, 1)
        else:
            half.recv(other, 0)
        spent = half.seconds
        return [half.transport, a[0].item(), b[0].item(), c[0].item(), other.item(), spent > 0, again.name]


def test_subgroups_and_several_communicators_at_once(ranks):
    want = ["shm", 2.0, 4.0, 1.0]
    assert ranks(4).run(_groups) == [[*want, sender, True, "again"] for sender in (0, 0, 2, 2)]


def _refusals() -> list[str]:
    with world() as comm:
        ones = torch.ones(2, 3)
        calls = [
            lambda: comm.all_reduce(ones, "mean"),
            lambda: comm.all_reduce(ones.int(), "avg"),
            lambda: comm.all_reduce(ones.to(torch.complex64)),
            lambda: comm.all_reduce(ones.bool()),
            lambda: comm.all_reduce(ones[0, 0].expand(4)),
            lambda: comm.all_reduce(ones.to("meta")),
            lambda: comm.all_reduce(ones.to_sparse()),
            lambda: comm.all_reduce(torch.nn.parameter.UninitializedParameter()),
            lambda: comm.all_reduce([1.0]),
            lambda: comm.send(ones, comm.rank),
            lambda: comm.irecv(ones, 2),
            lambda: comm.send(ones, -1),
        ]
        texts = refusals(calls)
        comm.barrier()  # refused before anything reached the peers
        return texts


def test_bad_arguments_are_refused_by_name_before_anything_is_sent(ranks):
    parts = ("'mean'", "avg of torch.int32", "complex64", "torch.bool", "expanded", "on meta", "sparse",
             "UninitializedParameter", "got list", "another group rank", "src is 2", "dst is -1")  # fmt: skip
    for texts in ranks(2).run(_refusals):
        assert all(part in text for part, text in zip(parts, texts, strict=True)), texts


def _many(rounds: int) -> bool:
    with world() as comm:
        x = torch.zeros(1 << 15)
        return all((comm.all_reduce(x.fill_(i), tag=str(i)) == comm.size * i).all() for i in range(rounds))


def test_more_ranks_than_cores_make_progress(ranks):
    assert all(ranks(8).run(_many, 50, timeout=30))
