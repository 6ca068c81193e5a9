"""The command line of `tpmp compare`, refused in one sentence wherever it is wrong. Loads no torch."""

import argparse
import re

from tpmp_kernels.bench.parsing import Parser, each, nearest
from tpmp_kernels.errors import UsageError

# Op -> the axes of --shape, and a size that a laptop's core does in some milliseconds.
AXES = {
    "linear": ("MxNxK", (512, 3072, 768)),
    "gated_linear": ("MxNxK", (512, 2048, 768)),
    "mlp": ("MxFxH", (512, 3072, 768)),
    "gated_mlp": ("MxFxH", (512, 2048, 768)),
    "linear_cross_entropy": ("TxVxH", (512, 16000, 512)),
    "cross_entropy": ("TxV", (512, 16000)),
    "rms_norm": ("MxH", (2048, 1024)),
    "layer_norm": ("MxH", (2048, 1024)),
    "rope": ("BxSxQxKxD", (2, 512, 16, 4, 64)),
    "glu": ("MxF", (2048, 3072)),
}
ACTIVATIONS = {
    "linear": ("none", "gelu", "gelu_tanh", "silu", "relu", "relu2"),
    "mlp": ("gelu", "gelu_tanh", "silu", "relu", "relu2"),
    "gated_linear": ("silu", "gelu", "gelu_tanh"),
    "gated_mlp": ("silu", "gelu", "gelu_tanh"),
    "glu": ("silu", "gelu", "gelu_tanh"),
}
DTYPES = ("fp32", "bf16", "fp16", "fp64")
DEVICES = ("auto", "cpu", "cuda")
_MOST = 1 << 24  # of an axis

_DESCRIPTION = """Compare, on this machine, every backend of one op with plain torch, torch.compile and its peers.

Each contender gets the same fresh random inputs. Shown are the median of its time, taken in turns with the others,
its largest error against the same op in fp64, in units of the largest value, and that error over plain torch's.

axes of --shape: M tokens, N columns, K inner; F inner width of an MLP, H hidden; T tokens, V vocabulary;
B batch, S sequence, Q query heads, K key heads, D head size
"""
_EPILOG = """examples:
  tpmp compare linear
  tpmp compare linear --shape 512x3072x768 --dtype fp32,bf16 --activation gelu
  tpmp compare linear_cross_entropy --shape 2048x32000x1024 --backward --threads 1

Exit code 0: compared; 1: a contender was more than twice as far from fp64 as plain torch; 2: bad input."""


def parse(argv: list[str]) -> argparse.Namespace:
    """`op`, `shape`, `dtypes`, `activation`, `backward`, `threads`, `device`, `quick`. Raises UsageError."""
    if argv[:1] in (["-h"], ["--help"]):
        _parser("OP", "linear").parse(["--help"])
    op = argv[0] if argv else None
    if op not in AXES:
        hint = f"; the nearest is {nearest(op, AXES)!r}" if op else "; such as tpmp compare linear"
        got = repr(op) if op else "nothing"
        raise UsageError(f"expected an op ({', '.join(AXES)}), got {got}{hint}")
    options = _parser(op, op).parse(argv[1:])
    options.op = op
    options.activation = _activation(op, options.activation)
    return options


def _parser(title: str, op: str) -> Parser:
    axes, example = AXES[op]
    parser = Parser(
        f"tpmp compare {title}",
        usage=f"tpmp compare {title} [--shape {axes}] [--dtype D,D] [--backward] [--activation A] [--threads T]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    shown = "; ".join(f"{name} {axes}" for name, (axes, _) in AXES.items()) if title == "OP" else axes
    parser.add_argument(
        "--shape",
        metavar=axes if title != "OP" else "AxB",
        type=lambda text: _shape(text, axes, example),
        default=example,
        help=shown,
    )
    parser.add_argument(
        "--dtype",
        dest="dtypes",
        metavar="D,D",
        type=lambda text: each(text, _dtype, "dtypes such as fp32,bf16"),
        default=["fp32"],
        help=f"{', '.join(DTYPES)} (fp32)",
    )
    parser.add_argument("--backward", action="store_true", help="forward and backward instead of forward")
    parser.add_argument("--activation", metavar="A", help="of a linear, an MLP or glu; none for a plain linear")
    parser.add_argument("--threads", metavar="T", type=_threads, help="of the CPU (torch's default)")
    parser.add_argument("--device", metavar="D", type=_device, default="auto", help="cpu, cuda or auto (auto)")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    return parser


def _shape(text: str, axes: str, example: tuple[int, ...]) -> tuple[int, ...]:
    such = "x".join(map(str, example))
    if not re.fullmatch(r"\d{1,9}(x\d{1,9})*", text) or text.count("x") != axes.count("x"):
        raise argparse.ArgumentTypeError(f"expected {axes}, got {text!r}; such as {such}")
    sizes = tuple(map(int, text.split("x")))
    if not all(1 <= size <= _MOST for size in sizes):
        raise argparse.ArgumentTypeError(f"expected sizes from 1 to {_MOST}, got {text!r}; such as {such}")
    return sizes


def _dtype(name: str) -> str:
    if name not in DTYPES:
        raise argparse.ArgumentTypeError(f"expected dtypes of {', '.join(DTYPES)}, got {name!r}; such as bf16")
    return name


def _threads(text: str) -> int:
    if not re.fullmatch(r"\d{1,4}", text) or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}; such as 1")
    return int(text)


def _device(text: str) -> str:
    if text not in DEVICES:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(DEVICES)}, got {text!r}")
    return text


def _activation(op: str, name: str | None) -> str | None:
    if op not in ACTIVATIONS:
        if name is not None:
            raise UsageError(f"--activation: {op} has none, got {name!r}; leave it out")
        return None
    known = ACTIVATIONS[op]
    if name is None:
        name = "gelu" if op in ("linear", "mlp") else known[0]
    if name not in known:
        raise UsageError(f"--activation: expected one of {', '.join(known)} for {op}, got {name!r}")
    return None if name == "none" else name
