"""That chunks really travel under products: wall times over an emulated link, whose time costs no core.

Products are replaced by sleeps of a length that does not depend on the machine, so that only the schedule is timed; one
case has real ones. A call may never be faster than its pipeline; upper bounds leave room for a busy machine.
"""

import math
import time
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from tpmp_kernels.comm import EmulatedLink, communicator, overlap
from tpmp_kernels.comm.overlap import chunks, functions

ROWS, SIDE = 64, 8
GEMM = 0.2  # seconds of a whole product, and of the communication of its result
CHUNKS = 8
BUSY = 0.16  # seconds that a busy machine may add: less than what any of the calls here hides


@contextmanager
def sleeping_products():
    """Every product of the overlapped linears also takes its share of GEMM, by rows; a weight gradient takes all."""
    real, weight_grad = chunks.sum_of_products, functions.weight_grad

    def product(terms, out):
        time.sleep(GEMM * out.shape[:-1].numel() / ROWS)
        real(terms, out)

    def wgrad(*args):
        time.sleep(GEMM)
        return weight_grad(*args)

    with ExitStack() as stack:
        for module in (chunks, functions):
            stack.enter_context(patch.object(module, "sum_of_products", product))
        stack.enter_context(patch.object(functions, "weight_grad", wgrad))
        yield


def fastest(comm, call, turns: int) -> float:
    seconds = []
    for _ in range(turns):
        comm.barrier()
        began = time.monotonic()
        call()
        seconds.append(time.monotonic() - began)
    return min(seconds)


def run_slept(name: str, mode: str) -> tuple[float, float]:
    """Seconds of forward and of backward, where a whole result takes GEMM seconds on the link."""
    with communicator(dist.group.WORLD, name="timed") as plain:
        with_rows = {"linear_reduce_scatter": ROWS, "all_gather_linear": ROWS // plain.size}
        x = torch.ones(with_rows.get(name, ROWS), SIDE, requires_grad=True)
        weight = torch.ones(SIDE, SIDE, requires_grad=True)
        free = EmulatedLink(plain, latency=0.0, bandwidth=math.inf)
        nbytes = overlap.plan_of(name, x.shape, [weight.shape], x.dtype, free).costs.nbytes
        link = EmulatedLink(plain, latency=0.0, bandwidth=nbytes / GEMM)
        how = {"mode": mode} | ({"chunks": CHUNKS} if mode == "chunked" else {})
        run, outputs = getattr(overlap, name), []
        with sleeping_products():
            turns = 1 if mode == "none" else 2
            forward = fastest(link, lambda: outputs.append(run(x, weight, link, **how)), turns)
            backward = fastest(link, lambda: torch.autograd.grad(outputs.pop().sum(), [x, weight]), turns)
        return forward, backward


# In mode none, forward and backward.
SERIAL = {
    "linear_all_reduce": (2 * GEMM, GEMM),
    "copy_linear": (GEMM, 3 * GEMM),
    "linear_reduce_scatter": (2 * GEMM, 3 * GEMM),
    "all_gather_linear": (2 * GEMM, 4 * GEMM),
}
PIPELINE = GEMM + GEMM / CHUNKS  # r = 1: one chunk is left when the last product is made


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        ("linear_all_reduce", PIPELINE, GEMM),  # dgrad is a plain product, which does not sleep
        ("copy_linear", GEMM, 2 * GEMM),
        ("linear_reduce_scatter", PIPELINE, PIPELINE + GEMM),
        # x, gathered again, goes first on the link; all of dX follows, under the weight gradient.
        ("all_gather_linear", PIPELINE, 2 * GEMM),
    ],
)
def test_communication_hides_under_products(ranks, name, forward, backward):
    serial = SERIAL[name]
    hidden, whole = (ranks(2).run(run_slept, name, mode) for mode in ("chunked", "none"))
    for took, least in zip(zip(*hidden, strict=True), (forward, backward), strict=True):
        assert least - 1e-3 <= max(took) < least + BUSY
    for took, least in zip(zip(*whole, strict=True), serial, strict=True):
        assert max(took) >= least - 1e-3


def run_real() -> dict[str, float]:
    """Seconds that a call waits for the link, on which a whole result takes 30 ms: about as long as its product."""
    with communicator(dist.group.WORLD, name="timed") as plain:
        x, weight = torch.randn(1024, 1024), torch.randn(1024, 1024)
        link = EmulatedLink(plain, latency=0.0, bandwidth=4 * 1024 * 1024 / 0.03)
        waited = {}
        for how in ({"mode": "none"}, {"mode": "chunked", "chunks": 4}):
            turns = []
            for _ in range(5):
                link.barrier()
                before = link.seconds
                overlap.linear_all_reduce(x, weight, link, **how)
                turns.append(link.seconds - before)
            waited[how["mode"]] = min(turns)
        return waited


def test_real_products_leave_little_to_wait_for(ranks):
    """Of 4 chunks the last. Waits are compared, not whole calls: what a busy machine adds to products hides more."""
    waited = ranks(2).run(run_real)
    none, chunked = (max(each[mode] for each in waited) for mode in ("none", "chunked"))
    assert none >= 0.03 and chunked < 0.6 * none, waited
