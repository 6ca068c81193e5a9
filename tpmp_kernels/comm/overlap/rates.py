"""How fast the ranks multiply and their link is: what the cost rule is fed with, the same on every rank.

    rates = calibrate(comm, torch.bfloat16)             # once, on every rank; a second of measuring
    y = linear_all_reduce(x, weight, comm, rates=rates)

Without it DEFAULTS are taken: round figures of one core of a server and of one H100, whose only merit is that every
rank has the same.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from tpmp_kernels.comm.arguments import Collective
from tpmp_kernels.comm.communicator import Communicator
from tpmp_kernels.comm.emulated import EmulatedLink, bytes_moved
from tpmp_kernels.comm.overlap.plan import Link

_SIDE, _CHUNKS = 1024, 8  # of the GEMM that is timed, whole and in chunks
_SMALL, _LARGE = 1, 1 << 20  # elements of the all-reduces that are timed
_TURNS = 5


@dataclass(frozen=True)
class Rates:
    """FLOP/s of a GEMM by dtype, seconds that each chunk adds, and the link, None where the communicator's own figures
    or the default are to be taken."""

    flops: Mapping[torch.dtype, float]
    overhead: float
    link: Link | None = None
    source: str = "default rates"


DEFAULTS = {
    "cpu": Rates({torch.float64: 4e10, torch.float32: 8e10, torch.bfloat16: 8e10, torch.float16: 4e10}, 1e-4),
    "cuda": Rates({torch.float64: 4e13, torch.float32: 4e13, torch.bfloat16: 6e14, torch.float16: 6e14}, 1e-5),
}
DEFAULT_LINK = Link(latency=2e-5, bandwidth=2e11)  # NVLink 4 under NCCL, order of magnitude


def default_rates(device: str) -> Rates:
    return DEFAULTS.get(device, DEFAULTS["cuda"])


def link_of(comm: Communicator, rates: Rates) -> Link:
    """That of the rates, else what an emulated link says of itself, else DEFAULT_LINK."""
    if rates.link is not None:
        return rates.link
    return Link(comm.latency, comm.bandwidth) if isinstance(comm, EmulatedLink) else DEFAULT_LINK


def calibrate(comm: Communicator, dtype: torch.dtype, *, device: str = "cpu") -> Rates:
    """Rates for `dtype`, measured by all ranks at once, as they compute in training; rank 0's are everybody's.

    Collective. FLOP/s of a GEMM of 1024 x 1024 x 1024; what each chunk adds, from the same GEMM in 8; latency and
    bandwidth of the link from all-reduces of 1 and of 2**20 fp32 elements.
    """
    # Random: a GPU multiplies equal numbers at less power and higher clocks. From a generator of its own.
    generator = torch.Generator(device).manual_seed(0)
    x, weight = (torch.rand(_SIDE, _SIDE, generator=generator, device=device).to(dtype) for _ in range(2))
    small, large = (torch.zeros(n, device=device) for n in (_SMALL, _LARGE))
    comm.barrier(tag="calibrate")
    whole = _seconds(lambda: torch.mm(x, weight.t()), device)
    parts = _seconds(lambda: [torch.mm(part, weight.t()) for part in x.chunk(_CHUNKS)], device)
    few, many = (_seconds(lambda each=each: comm.all_reduce(each, tag="calibrate"), device) for each in (small, large))
    nbytes = bytes_moved(Collective("all_reduce", _LARGE, large, large), comm.rank, comm.size)
    bandwidth = nbytes / max(many - few, 1e-9) if nbytes else float("inf")
    found = [2 * _SIDE**3 / whole, max(0.0, parts - whole) / _CHUNKS, few, bandwidth]
    agreed = comm.broadcast(torch.tensor(found, dtype=torch.float64, device=device), 0, tag="calibrate").tolist()
    flops, overhead, latency, bandwidth = agreed
    known = {**default_rates(device).flops, dtype: flops}
    return Rates(known, overhead, Link(latency, bandwidth), f"calibrated for {dtype} on rank 0")


def _seconds(call: Callable[[], object], device: str) -> float:
    """The median; as many turns on every rank, for there are collectives among the calls."""
    turns = []
    for _ in range(_TURNS + 1):
        _finish(device)
        began = time.perf_counter()
        call()
        _finish(device)
        turns.append(time.perf_counter() - began)
    return statistics.median(turns[1:])


def _finish(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
