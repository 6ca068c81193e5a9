"""`tpmp compare OP`: one table for each dtype, written as soon as it is measured."""

import sys
from argparse import Namespace
from collections.abc import Mapping

from tpmp_kernels.bench.compare.options import AXES, parse
from tpmp_kernels.bench.provenance import device_slug
from tpmp_kernels.bench.rows import OURS
from tpmp_kernels.bench.table import aligned, show_mebibytes, show_rate, show_seconds
from tpmp_kernels.errors import UsageError, WrongResult

_COLUMNS = ("contender", "median", "p20 - p80", "speed", "rate", "memory beside", "error", "of eager's")


def run(argv: list[str]) -> None:
    """Compare and print. Raises UsageError for bad input, WrongResult where a contender of ours is."""
    options = parse(argv)
    from tpmp_kernels.bench.compare import measure

    device = _device(options.device)
    with measure.threads(options.threads):
        print(_heading(options, device), flush=True)
        wrong = [line for dtype in options.dtypes for line in _compare(options, dtype, device)]
    if wrong:
        raise WrongResult("; ".join(wrong))


def _device(asked: str) -> str:
    import torch

    if asked == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device: expected a CUDA device, torch finds none; use --device cpu")
    return asked if asked != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _heading(options: Namespace, device: str) -> str:
    import torch

    axes = ", ".join(f"{axis} {size}" for axis, size in zip(AXES[options.op][0].split("x"), options.shape, strict=True))
    passes = "forward and backward" if options.backward else "forward"
    threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
    return f"{options.op}: {axes}; {passes}; {device_slug(device)}{threads}, torch {torch.__version__}"


def _compare(options: Namespace, dtype: str, device: str) -> list[str]:
    """Print the table of one dtype; sentences about contenders of ours that are wrong."""
    from tpmp_kernels.bench.compare import measure
    from tpmp_kernels.bench.compare.problems import DTYPES, problem
    from tpmp_kernels.bench.memory import extra_bytes

    asked = problem(options.op, options.shape, options.activation)
    every = measure.contenders(asked, device)
    draws = measure.draws_of(asked, DTYPES[dtype], device)
    calls = {name: call for name, call in every.items() if not isinstance(call, str)}
    reasons = {name: call for name, call in every.items() if isinstance(call, str)}
    errors = measure.errors(asked, calls, draws[0], backward=options.backward)
    memory = {
        name: extra_bytes(measure.step(call, backward=options.backward), draws[0]) for name, call in calls.items()
    }
    rounds, iterations = (5, 1) if options.quick else (12, 2)
    timings = measure.times(calls, draws, backward=options.backward, rounds=rounds, iterations=iterations)
    flop = asked.flop and asked.flop * (3 if options.backward else 1)
    lines = [_line(name, timings, errors, memory, flop) for name in calls]
    lines += [(name, f"cannot run: {reason}", "", "", "", "", "", "") for name, reason in reasons.items()]
    _show(f"\n{asked.case}, {dtype}", lines)
    return [
        f"{name} in {dtype} is {error.of_torch:.3g} times as far from fp64 as eager"
        for name, error in errors.items()
        if error.wrong and _ours(name)
    ]


def _line(name: str, timings: Mapping, errors: Mapping, memory: Mapping, flop: int | None) -> tuple[str, ...]:
    from tpmp_kernels.bench.compare.measure import EAGER

    timing, error = timings[name], errors[name]
    return (
        name,
        show_seconds(timing.median),
        f"{show_seconds(timing.quantile(0.2))} - {show_seconds(timing.quantile(0.8))}",
        f"{timings[EAGER].median / timing.median:.2f}x",
        show_rate(flop / timing.median, "FLOP/s") if flop else "-",
        "-" if memory[name] is None else show_mebibytes(memory[name]),
        f"{error.relative:.1e}",
        f"{error.of_torch:.2f}x" + " WRONG" * (error.wrong and _ours(name)),
    )


def _ours(name: str) -> bool:
    return name.split(" ")[0] == OURS


def _show(title: str, lines: list[tuple[str, ...]]) -> None:
    print(title)
    print(aligned([_COLUMNS, *lines], reason=1))
    sys.stdout.flush()
