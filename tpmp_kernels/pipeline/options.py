"""The command line of `tpmp schedule`, refused in one sentence wherever it is wrong."""

import argparse
import difflib
import importlib.util
import math
import os
import re
import reprlib
from collections.abc import Callable, Iterable
from pathlib import Path

from tpmp_kernels.errors import UsageError
from tpmp_kernels.pipeline.costs import Costs

_COSTS = ("F", "B", "W", "BW", "pair", "latency", "bandwidth", "message", "activation", "kept")
_COSTS_HELP = (
    "of one microbatch on one rank: times of F, B, W and BW (B + W if left out); pair: time of a joint step as a share "
    "of its two parts one after the other; latency, bandwidth and message of a transfer; activation: memory held from "
    "F to W; kept: the share of it that is still held from B to W; beside --model only pair, latency, bandwidth (in MB "
    "for a unit of its times) and kept"
)
_COMPARE_HELP = "more schedules of the same sizes, in one table and one picture"


def parse(argv: list[str]) -> argparse.Namespace:
    """NAME as `name`, and each option under its own name, None where it is left out. --help prints and exits.

    Raises UsageError.
    """
    options, rest = _parser().parse_known_args(argv)
    if not rest:
        return options
    flag = rest[0].partition("=")[0]
    if flag.startswith("-"):
        raise UsageError(f"unknown option {flag!r}; the nearest known one is {nearest(flag, _FLAGS)!r}")
    raise UsageError(f"expected one schedule, got {options.name!r} and {rest[0]!r}; use --compare to show several")


def nearest(word: str, known: Iterable[str]) -> str:
    lower = {each.lower(): each for each in known}
    return lower[difflib.get_close_matches(word.lower(), lower, n=1, cutoff=0.0)[0]]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """Called with a sentence of argparse, or of ours in its ArgumentTypeError and ArgumentError."""
        if message.startswith("the following arguments are required"):
            raise UsageError("expected a schedule, got nothing; 1f1b is one, and tpmp schedule --list shows them")
        option, _, text = message.removeprefix("argument ").partition(": ")
        if text == "expected one argument":
            text = "expected a value, got nothing; tpmp schedule --help shows one for each option"
        elif text.startswith("ignored explicit argument"):
            text = f"expected no value, got{text.removeprefix('ignored explicit argument')}; leave it out"
        raise UsageError(f"{option}: {text}")


class _Once(argparse.Action):
    """With two values, as in `--pp 4 --stages 8`, it is not clear what is meant."""

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest)
        if before is not None and before != values:
            raise argparse.ArgumentError(self, f"expected it once, got {before} and {values}; leave one out")
        setattr(namespace, self.dest, values)


def _parser() -> _Parser:
    parser = _Parser(
        prog="tpmp schedule",
        usage="tpmp schedule NAME --pp P --microbatches M [--chunks C] [option ...]\n"
        "       tpmp schedule NAME --model FILE.toml [--stages N] [option ...]\n       tpmp schedule --list",
        description="Prove a pipeline schedule free of deadlock, time it and draw it.",
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="NAME", help="a schedule of --list, or a .json or .csv file with one")
    for flags, metavar, read, text in _OPTIONS:
        if metavar is None:
            parser.add_argument(*flags, action="store_true", help=text)
        else:
            parser.add_argument(*flags, metavar=metavar, type=read, action=_Once, help=text)
    return parser


def _whole(lowest: int, highest: int, example: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = -1
        if not lowest <= value <= highest:
            raise argparse.ArgumentTypeError(
                f"expected a whole number from {lowest} to {highest:,}, got {reprlib.repr(text)}; such as {example}"
            )
        return value

    return read


def _names(what: str) -> Callable[[str], list[str]]:
    def read(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",")]
        if not all(names):
            raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}; remove the empty one")
        return names

    return read


def _megabytes(text: str) -> float:
    match = re.fullmatch(r"(\d{1,12}(?:\.\d*)?) ?(MB|GB)", text.strip())
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(
            f"expected a size in MB or GB (10^6, 10^9 bytes), got {reprlib.repr(text)}; such as 80GB"
        )
    return float(match[1]) * (1 if match[2] == "MB" else 1000)


def _costs(text: str) -> dict[str, float]:
    """What was given, by the names of Costs, which takes it."""
    given: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = (each.strip() for each in part.partition("="))
        if name not in _COSTS:
            raise argparse.ArgumentTypeError(
                f"unknown cost {name!r}; the nearest known one is {nearest(name, _COSTS)!r} of {', '.join(_COSTS)}"
            )
        if name in given:
            raise argparse.ArgumentTypeError(f"expected {name} once, got it again as {part!r}; leave one out")
        given[name] = _cost(name, number, part)
    try:
        Costs(**given)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("costs: ")) from None
    return given


def _cost(name: str, number: str, part: str) -> float:
    """Neither so small nor so large that sums of them are no numbers. Without F, nothing would take any time."""
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    lowest = 1e-9 if name == "F" else 0
    if not (lowest <= value <= 1e9 or (name == "bandwidth" and value == math.inf)):
        raise argparse.ArgumentTypeError(
            f"expected {name}=NUMBER from {lowest:g} to 1e9, got {part!r}; such as F=100,B=120,W=80"
        )
    return value


def _output(*suffixes: str) -> Callable[[str], Path]:
    """A file to write: refused now rather than when everything has been computed."""

    def check(text: str) -> Path:
        path = Path(text)
        if path.suffix.lower() not in suffixes:
            expected = " or ".join(suffixes)
            raise argparse.ArgumentTypeError(f"expected a file that ends in {expected}, got {text!r}; rename it")
        if not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"expected a file in a folder that exists, got {text!r}; make the folder")
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise argparse.ArgumentTypeError(f"expected a file that can be written, got {text!r}; give another path")
        if path.suffix.lower() == ".png" and importlib.util.find_spec("matplotlib") is None:
            raise argparse.ArgumentTypeError(f"expected matplotlib for {text!r}, got none; install it, or draw an .svg")
        return path

    return check


# Flags, what stands for the value (nothing: a switch), how it is read, and help.
_OPTIONS = [
    (["--pp", "--stages"], "P", _whole(1, 100_000, 4), "pipeline ranks"),
    (["--microbatches"], "M", _whole(1, 100_000, 8), "microbatches of one step"),
    (["--chunks"], "C", _whole(1, 1000, 2), "stages on each rank, where the schedule leaves the choice (2)"),
    (["--costs"], "F=1,B=1,W=1", _costs, _COSTS_HELP),
    (["--model"], "FILE.toml", Path, "cut the layers of this config into the stages; costs and sizes come from it"),
    (["--measured"], None, None, "profile the layers of --model on this machine; else their FLOP count"),
    (["--memory-limit"], "80GB", _megabytes, "of a rank, for parameters and activations of --model"),
    (["--begin"], "layers.2,lm_head", _names("layers such as layers.2,lm_head"), "layers of --model to begin a stage"),
    (["--compare"], "1f1b,zb-v", _names("schedules such as 1f1b,zb-v"), _COMPARE_HELP),
    (["--draw"], "out.svg|out.png", _output(".svg", ".png"), "draw everything that is shown on one sheet"),
    (["--trace"], "out.json", _output(".json"), "a trace of NAME, for ui.perfetto.dev or chrome://tracing"),
    (["--save"], "out.json|out.csv", _output(".json", ".csv"), "the order of NAME; torch loads the .csv"),
    (["--json"], None, None, "one JSON object with everything, and nothing else"),
    (["--width"], "N", _whole(40, 10_000, 120), "columns of the drawing in the terminal"),
    (["--no-color"], None, None, "no colour, as where NO_COLOR is set"),
    (["--list"], None, None, "list the known schedules"),
]
_FLAGS = ["--help", *(flag for flags, *_ in _OPTIONS for flag in flags)]
