"""The command line of `tpmp bench comm`, refused in one sentence wherever it is wrong. Loads no torch."""

import argparse
import os
import re

from tpmp_kernels.bench.parsing import Parser, each, nearest
from tpmp_kernels.errors import UsageError

CALLS = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "broadcast": "broadcast",
    "all_to_all": "all_to_all",
    "send": "send+recv there and back",
}
SIZES = "4KiB,64KiB,1MiB,16MiB,64MiB"
QUICK_SIZES = "64KiB,1MiB"
_UNITS = {"": 1, "b": 1, "k": 1 << 10, "kib": 1 << 10, "m": 1 << 20, "mib": 1 << 20, "g": 1 << 30, "gib": 1 << 30}
_MOST_BYTES = 1 << 30
_COPIES = 8  # tensors of one size that a rank holds at most while it is measured

_DESCRIPTION = """Measure, on this machine, torch.distributed on gloo against the same calls on the backend tpmp.

The ranks are processes that this command starts and stops, of one thread each. Contenders take turns in bursts of
calls back to back; what is shown is the median over the bursts, on the slowest rank, once every result was found right
to the last bit.

  gloo                 the call in a gloo group: ratios are speeds relative to it
  tpmp                 the same call in a group of the backend tpmp
  tpmp on comm.empty   the same, on tensors in shared memory: those of the group's comm.empty(...)
  memcpy               a bound, not a rival: every rank copies as many bytes as the call must move over its link
"""
_EPILOG = """examples:
  tpmp bench comm                                 a few minutes
  tpmp bench comm --quick                         half a minute
  tpmp bench comm --ranks 4 --calls all_reduce --sizes 4KiB,16MiB

Timings mean something on a machine that does nothing else. Exit code 0: measured; 1: a rank failed, or a contender's
result was wrong; 2: bad input."""


def parse(argv: list[str]) -> argparse.Namespace:
    """`ranks`, `sizes` in bytes, `calls` by their full names, `quick`. --help prints and exits. Raises UsageError."""
    options = _parser().parse(argv)
    if options.sizes is None:
        options.sizes = _sizes(QUICK_SIZES if options.quick else SIZES)
    _check_memory(options.ranks, max(options.sizes))
    return options


def _check_memory(ranks: int, largest: int) -> None:
    needed = _COPIES * ranks * largest
    here = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > here:
        raise UsageError(
            f"--sizes: {ranks} ranks need about {needed / 2**30:.3g} GiB for tensors of {largest / 2**20:.4g} MiB, "
            f"this machine has {here / 2**30:.3g}; take smaller ones or fewer ranks"
        )


def _parser() -> Parser:
    parser = Parser(
        "tpmp bench comm",
        usage="tpmp bench comm [--ranks R] [--sizes S,S] [--calls C,C] [--quick]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.add_argument("--ranks", metavar="R", type=_ranks, default=2, help="processes, from 2 to 64 (2)")
    parser.add_argument("--sizes", metavar="S,S", type=_sizes, help=f"of the larger tensor of a call ({SIZES})")
    names = ", ".join(CALLS)
    parser.add_argument(
        "--calls",
        metavar="C,C",
        type=_calls,
        default=[*CALLS.values()],
        help=f"of {names} (all); send is there and back",
    )
    parser.add_argument("--quick", action="store_true", help=f"fewer bursts, and sizes {QUICK_SIZES} unless given")
    return parser


def _ranks(text: str) -> int:
    if not re.fullmatch(r"\d{1,3}", text) or not 2 <= int(text) <= 64:
        raise argparse.ArgumentTypeError(f"expected a whole number from 2 to 64, got {text!r}; such as 2")
    return int(text)


def _sizes(text: str) -> list[int]:
    return each(text, _size, "sizes such as 4KiB,1MiB")


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d{1,12})\s*([A-Za-z]*)", text)
    if not found or found[2].lower() not in _UNITS:
        raise argparse.ArgumentTypeError(f"expected sizes such as 4KiB,1MiB, got {text!r}; units are B, KiB, MiB, GiB")
    nbytes = int(found[1]) * _UNITS[found[2].lower()]
    if not 256 <= nbytes <= _MOST_BYTES or nbytes % 256:
        raise argparse.ArgumentTypeError(
            f"expected a multiple of 256 bytes (an element for each of 64 ranks) up to 1GiB, got {text!r}; such as 4KiB"
        )
    return nbytes


def _calls(text: str) -> list[str]:
    return each(text, _call, "calls such as all_reduce,send")


def _call(name: str) -> str:
    if name not in CALLS:
        raise argparse.ArgumentTypeError(
            f"unknown call {name!r}; the nearest known one is {nearest(name, CALLS)!r} of {', '.join(CALLS)}"
        )
    return CALLS[name]
