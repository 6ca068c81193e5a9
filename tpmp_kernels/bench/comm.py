"""Transports against each other: calls of torch.distributed on gloo and on tpmp, in turns, on the ranks of a pool.

    rows = measure(RankPool(2), "all_reduce", 16 << 20, provenance(threads=1))

gloo                 the call in a gloo group: the baseline
tpmp                 the same in a group of the backend "tpmp"
tpmp on comm.empty   the same on tensors from `group.comm.empty`, in shared memory
memcpy               the ceiling: every rank, all at once, copies as many bytes as cross its link (`bus_bytes`: all n of
                     an all_reduce between two ranks) from one tensor of its own to another with torch's `copy_`; for
                     a message, rank 0 copies it once a way while the others wait

A sample is the time of one call in a burst of calls back to back, on the slowest rank. Tensors are fp32, and the same
in each call of a burst, so that small ones stay in a cache. Each contender's result is checked, to the last bit, on the
very tensors that are then timed.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from tpmp_kernels.bench.provenance import Provenance
from tpmp_kernels.bench.rows import Row, rows_of
from tpmp_kernels.bench.timing import Timing, interleave, slowest
from tpmp_kernels.bench.work import bus_bytes
from tpmp_kernels.testing import RankPool

ON_EMPTY = "tpmp on comm.empty"
MESSAGE = "send+recv there and back"
_TIMEOUT = 300.0  # seconds for all that one case takes


# Their names from torch 2.13 on, which warns of the older ones.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


@dataclass(frozen=True)
class Call:
    """A collective of torch.distributed: `run(output, input, group)`, and what `output` is to hold afterwards.

    `gives` and `takes` say whether input and output are whole (n elements) or one rank's part (n / R).
    """

    run: Callable
    expected: Callable[[Iterator[torch.Tensor], int, int], torch.Tensor]  # (inputs of all ranks, rank, ranks)
    gives: str = "whole"
    takes: str = "whole"
    in_place: bool = False


CALLS = {
    "all_reduce": Call(
        lambda output, input, group: dist.all_reduce(output, group=group),
        lambda inputs, rank, ranks: sum(inputs),
        in_place=True,
    ),
    "all_gather": Call(
        lambda output, input, group: _all_gather(output, input, group=group),
        lambda inputs, rank, ranks: torch.cat([*inputs]),
        gives="part",
    ),
    "reduce_scatter": Call(
        lambda output, input, group: _reduce_scatter(output, input, group=group),
        lambda inputs, rank, ranks: sum(inputs).view(ranks, -1)[rank],
        takes="part",
    ),
    "broadcast": Call(
        lambda output, input, group: dist.broadcast(output, 0, group=group),
        lambda inputs, rank, ranks: next(inputs),
        in_place=True,
    ),
    "all_to_all": Call(
        lambda output, input, group: dist.all_to_all_single(output, input, group=group),
        lambda inputs, rank, ranks: torch.cat([each.view(ranks, -1)[rank] for each in inputs]),
    ),
}
NAMES = (*CALLS, MESSAGE)


def measure(pool: RankPool, call: str, nbytes: int, where: Provenance, *, quick: bool = False) -> list[Row]:
    """The rows of one case: `call` of NAMES on tensors of `nbytes`, the larger of them where they differ."""
    return rows_of(timings(pool, call, nbytes, quick=quick), where, suite="comm", **labels(call, nbytes, pool.size))


def timings(pool: RankPool, call: str, nbytes: int, *, quick: bool = False) -> dict[str, Timing | str]:
    """By contender; where ours cannot run, why. AssertionError where a rank fails or a result is wrong."""
    results = pool.run(time_call, call, nbytes, quick, timeout=_TIMEOUT)
    obstacle = results[0][1]
    ours = dict.fromkeys(("tpmp", ON_EMPTY), obstacle) if obstacle else {}
    return slowest([timed for timed, _ in results]) | ours


def labels(call: str, nbytes: int, ranks: int) -> dict:
    """The arguments of rows_of that name a case, and what it is compared with."""
    work = 2 * bus_bytes("send", nbytes, ranks) if call == MESSAGE else bus_bytes(call, nbytes, ranks)
    case = call if call == MESSAGE else f"{call} {ranks} ranks"
    shared = {"dtype": "fp32", "baseline": "gloo", "ceiling": "memcpy", "unit": "B/s"}
    return {"case": case, "shape": show_size(nbytes), "work": work} | shared


def show_size(nbytes: int) -> str:
    for scale, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if nbytes % scale == 0:
            return f"{nbytes // scale} {unit}"
    return f"{nbytes} B"


def counts(nbytes: int, ranks: int, *, quick: bool = False) -> dict[str, int]:
    """Many calls in a burst where one is short, so that the clock and the barrier before it do not show.

    No more of them than sums stay finite for: each call of an all_reduce adds up what the last one left.
    """
    most = min(50, int(180 / math.log2(ranks)))
    if quick:
        return {"rounds": 5, "iterations": max(2, min(most, (1 << 20) // nbytes)), "warmup": 1}
    return {"rounds": 15 if nbytes < 8 << 20 else 9, "iterations": max(3, min(most, (4 << 20) // nbytes)), "warmup": 2}


def data(rank: int, numel: int) -> torch.Tensor:
    """Random multiples of one power of two, whose sums are exact in any order; tiny, see counts."""
    generator = torch.Generator().manual_seed(rank)
    return 2.0**-100 * torch.randint(1, 1000, (numel,), generator=generator, dtype=torch.float32)


# ---- what each rank runs


def time_call(call: str, nbytes: int, quick: bool) -> tuple[dict[str, Timing], str]:
    """The timings of this rank, and why there are none of ours, where that is so."""
    tpmp = tpmp_group()
    obstacle = "" if hasattr(tpmp, "comm") else "the ranks do not share memory, where tpmp is gloo"
    places = {"gloo": (dist.group.WORLD, torch.empty)}
    if not obstacle:
        places |= {"tpmp": (tpmp, torch.empty), ON_EMPTY: (tpmp, tpmp.comm.empty)}
    prepare = _messages if call == MESSAGE else functools.partial(_collective, call)
    contenders, restore = prepare(places, nbytes)

    def before():
        restore()
        dist.barrier(group=tpmp)

    return interleave(contenders, before=before, **counts(nbytes, dist.get_world_size(), quick=quick)), obstacle


@functools.cache
def tpmp_group() -> dist.ProcessGroup:
    """The group of the backend "tpmp" over all ranks, made once in this process."""
    import tpmp_kernels.comm  # noqa: F401  registers the backend

    return dist.new_group(backend="tpmp")


def _collective(name: str, places: dict, nbytes: int) -> tuple[dict[str, Callable], Callable[[], None]]:
    """Contenders by name, each checked, and what puts their tensors back before a turn."""
    call, rank, ranks = CALLS[name], dist.get_rank(), dist.get_world_size()
    numel = max(1, nbytes // 4 // ranks) * ranks
    sizes = {"whole": numel, "part": numel // ranks}
    source = data(rank, sizes[call.gives])
    expected = call.expected((data(each, source.numel()) for each in range(ranks)), rank, ranks)
    contenders, outputs = {}, []
    for contender, (group, empty) in places.items():
        input = empty(source.numel()).copy_(source)
        output = input if call.in_place else empty(sizes[call.takes]).fill_(float("nan"))
        contenders[contender] = functools.partial(call.run, output, input, group)
        contenders[contender]()
        _check(contender, output, expected)
        outputs.append(output)
    contenders["memcpy"] = _copy(bus_bytes(name, 4 * numel, ranks))

    def restore():
        for output in outputs if call.in_place else ():
            output.copy_(source)

    return contenders, restore


def _messages(places: dict, nbytes: int) -> tuple[dict[str, Callable], Callable[[], None]]:
    """The same for a message from rank 0 to rank 1 and back; other ranks have nothing to do."""
    rank = dist.get_rank()
    source = data(0, max(1, nbytes // 4))
    contenders = {}
    for contender, (group, empty) in places.items():
        outgoing, incoming = empty(source.numel()).copy_(source), empty(source.numel()).fill_(float("nan"))
        contenders[contender] = functools.partial(_there_and_back, rank, outgoing, incoming, group)
        contenders[contender]()
        _check(contender, incoming if rank < 2 else source, source)
    copy = _copy(4 * source.numel())
    contenders["memcpy"] = lambda: [copy() for _ in range(2 if rank == 0 else 0)]
    return contenders, lambda: None


def _there_and_back(rank: int, outgoing: torch.Tensor, incoming: torch.Tensor, group: dist.ProcessGroup) -> None:
    if rank == 0:
        dist.send(outgoing, group=group, group_dst=1)
        dist.recv(incoming, group=group, group_src=1)
    elif rank == 1:
        dist.recv(incoming, group=group, group_src=0)
        dist.send(incoming, group=group, group_dst=0)


def _copy(nbytes: float) -> Callable[[], object]:
    source = data(0, int(nbytes) // 4)
    return functools.partial(torch.zeros_like(source).copy_, source)


def _check(contender: str, output: torch.Tensor, expected: torch.Tensor) -> None:
    """Raises on every rank where the output of any is wrong: one alone would leave the others waiting for it."""
    wrong = [0] * dist.get_world_size()
    dist.all_gather_object(wrong, (output != expected).sum().item())
    if any(wrong):
        rank = next(rank for rank, count in enumerate(wrong) if count)
        raise AssertionError(f"{contender} is wrong on rank {rank}: {wrong[rank]} of {output.numel()} elements")
