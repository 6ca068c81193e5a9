"""The GEMM that signals on a GPU, bf16: what the signals cost, what reserved multiprocessors cost, and what they hide.

The wire is a stand-in on one GPU, labelled "gated copies": a second stream waits for each chunk with the wait kernel
and writes it COPIES times into device memory, which takes about as long as an all-reduce over NVLink. Unlike a link it
takes bandwidth of memory from the GEMM.

cuBLAS GEMM      the unsplit product alone; so does "tpmp kernel", ours without signals
copies alone     the wire, with nothing beside it
serial           cuBLAS, then the copies
chunk GEMMs      cuBLAS in 8 chunks of rows, each copied under the next
tpmp signal      one GEMM, each chunk copied when its counter says that it is stored; also with 16 reserved SMs

E = 1 - (T_overlap - T_gemm) / (T_serial - T_gemm), with the faster of the unsplit GEMMs (Flux, arXiv 2406.06858).
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from benchmarks.chosen import chosen
from benchmarks.suites.test_kernels_gpu import operands, race, text
from tpmp_kernels import reference
from tpmp_kernels.bench import Bar, Row, gemm_flop
from tpmp_kernels.kernels import gemm, linear, tiles
from tpmp_kernels.kernels.signal_linear import signal_linear, wait

SUITE = "signal"
# Row-parallel layers per rank (M, N, K), each more than 1 ms, so that launches are no part of what is timed: Llama-3
# 70B down at TP8, Llama-3 8B down at TP2; then GPT-3 o_proj at TP4, Llama-3 70B down at TP4.
SHAPES = chosen(SUITE, 2, [(16384, 8192, 3584), (16384, 4096, 7168), (16384, 12288, 3072), (8192, 8192, 7168)])
CHUNKS, COPIES, RESERVED = 8, 8, (0, 8, 16, 32)
CUBLAS, KERNEL, SIGNAL = "cuBLAS GEMM", "tpmp kernel", "tpmp signal"
SIGNAL_16 = f"{SIGNAL}, 16 reserved"
COPIES_ALONE, SERIAL, PARTS = "copies alone", "serial", f"{CHUNKS} chunk GEMMs"


def case(reserved: int) -> str:
    return f"GEMM that signals, {reserved} SMs reserved"


BARS = [Bar(case(reserved), text(shape), SIGNAL, KERNEL, 1 / 1.03) for shape in SHAPES for reserved in (0, 16)]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def plain(x: torch.Tensor, weight: torch.Tensor, reserved: int = 0) -> torch.Tensor:
    """Our kernel without signals, on the same grid."""
    tile = gemm.own_tile("linear", x, weight, epilogue=tiles.Epilogue(), reserved_sms=reserved)
    y = x.new_empty(len(x), len(weight))
    named = linear.arguments(x, weight, None, None, y, None, None, tile)
    gemm.launch(linear.linear_kernel, named, tile, x.device, reserved_sms=reserved)
    return y


def signalling(reserved: int = 0) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The GEMM that signals, to nobody: its counters are never set back."""
    counters = torch.zeros(CHUNKS, dtype=torch.int32, device="cuda")

    def call(x, weight):
        out = x.new_empty(len(x), len(weight))
        signal_linear(x, weight, out, counters, chunks=CHUNKS, reserved_sms=reserved)
        return out

    return call


@pytest.mark.parametrize("reserved", [0, 16])
@pytest.mark.parametrize("shape", SHAPES, ids=text)
def test_signals(compare, shape, reserved):
    m, n, k = shape
    contenders = {KERNEL: lambda x, weight: plain(x, weight, reserved), SIGNAL: signalling(reserved)}
    inputs = operands((m, k), (n, k))
    compare(
        lambda: race(contenders, {}, reference.linear, inputs),
        device="cuda", case=case(reserved), shape=text(shape), dtype="bf16", baseline=KERNEL,
        work=gemm_flop(m, n, k), unit="FLOP/s",
    )  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=text)
def test_reserved(compare, shape):
    m, n, k = shape
    contenders = {f"{SIGNAL}, {reserved} reserved": signalling(reserved) for reserved in RESERVED}
    inputs = operands((m, k), (n, k))
    compare(
        lambda: race(contenders, {CUBLAS: F.linear}, reference.linear, inputs),
        device="cuda", case="GEMM that signals", shape=text(shape), dtype="bf16", baseline=next(iter(contenders)),
        ceiling=CUBLAS, work=gemm_flop(m, n, k), unit="FLOP/s",
    )  # fmt: skip


class Wire:
    """A second stream, of high priority, that copies rows of a result once it may."""

    def __init__(self, m: int, n: int):
        self.stream, self.copied = torch.cuda.Stream(priority=-1), torch.cuda.Event()
        self.events = [torch.cuda.Event() for _ in range(CHUNKS)]
        self.counters = torch.zeros(CHUNKS, dtype=torch.int32, device="cuda")
        self.out = torch.randn(m, n, device="cuda").bfloat16()
        self.copies = torch.empty(COPIES, m, n, dtype=torch.bfloat16, device="cuda")

    def send(self, rows: slice = slice(None)) -> None:
        self.copies[:, rows].copy_(self.out[rows])

    def arrived(self) -> torch.Tensor:
        """The last copy, for which the stream of the GEMM waits."""
        self.copied.record(self.stream)
        self.copied.wait()
        return self.copies[-1]

    def serial(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        torch.mm(x, weight.t(), out=self.out)
        self.send()
        return self.copies[-1]

    def in_chunks(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        height = len(x) // CHUNKS
        for i, stored in enumerate(self.events):
            rows = slice(i * height, (i + 1) * height)
            torch.mm(x[rows], weight.t(), out=self.out[rows])
            stored.record()
            with torch.cuda.stream(self.stream):
                stored.wait()
                self.send(rows)
        return self.arrived()

    def gated(self, x: torch.Tensor, weight: torch.Tensor, *, reserved: int = 0) -> torch.Tensor:
        self.counters.zero_()
        self.events[0].record()
        chunks = signal_linear(x, weight, self.out, self.counters, chunks=CHUNKS, reserved_sms=reserved)
        with torch.cuda.stream(self.stream):
            self.events[0].wait()
            for i, (rows, count) in enumerate(chunks):
                wait(self.counters, i, count)
                self.send(rows)
        return self.arrived()


@pytest.mark.parametrize("shape", SHAPES, ids=text)
def test_gated_copies(compare, capsys, shape):
    m, n, k = shape
    wire = Wire(m, n)
    contenders = {
        SERIAL: wire.serial, PARTS: wire.in_chunks, SIGNAL: wire.gated, SIGNAL_16: partial(wire.gated, reserved=16),
    }  # fmt: skip
    alone = {CUBLAS: F.linear, KERNEL: plain, COPIES_ALONE: lambda x, weight: wire.send()}
    inputs = operands((m, k), (n, k))
    rows = compare(
        lambda: race(contenders, alone, reference.linear, inputs),
        device="cuda", case="GEMM, gated copies", shape=text(shape), dtype="bf16", baseline=SERIAL, ceiling=CUBLAS,
        work=gemm_flop(m, n, k), unit="FLOP/s",
    )  # fmt: skip
    with capsys.disabled():
        print(f"\ngated copies, {text(shape)}: {figures(rows)}")


def figures(rows: list[Row]) -> str:
    """E of each way of hiding, and r = T_comm / T_gemm."""
    seconds = {row.contender: row.median for row in rows}
    alone = min(seconds[CUBLAS], seconds[KERNEL])
    hidden = {name: 1 - (seconds[name] - alone) / (seconds[SERIAL] - alone) for name in (SIGNAL, SIGNAL_16, PARTS)}
    shares = ", ".join(f"E = {e:.2f} {name}" for name, e in hidden.items())
    return f"{shares}; r = {seconds[COPIES_ALONE] / alone:.2f}"
