"""The command line of `tpmp verify`, refused in one sentence wherever it is wrong. Loads no torch."""

import argparse
import re
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from tpmp_kernels.bench.parsing import Parser
from tpmp_kernels.errors import UsageError
from tpmp_kernels.training.config import Config, ParallelConfig, TrainingConfig, load
from tpmp_kernels.training.config_check import check, schedule_names

DTYPES = {"fp64": "float64", "fp32": "float32"}
_MOST = 1 << 16

# examples/demo.toml, whose model and data are the defaults.
_DEMO = Config(parallel=ParallelConfig(tp=2, pp=2, microbatches=8), training=TrainingConfig(batch=16))

_DESCRIPTION = """Prove that a training step is the same unsharded and at tp x pp, or say where they first differ.

The step is that of tpmp train, its runtime, schedule and optimizer, on local processes that this command starts and
stops, with random tokens. The reference is a decoder in stock torch, in one process. Compared are the loss, the results
of all modules, every gradient and every parameter behind the optimizer; then each module by itself, forward and
backward, on the reference's tensors, so that no rounding but its own is between them.
"""
_EPILOG = """examples:
  tpmp verify                                      the demo's model, tp=2 x pp=2
  tpmp verify --tp 4 --pp 1 --sequence-parallel --quick
  tpmp verify --config examples/demo.toml --dtype fp32

Exit code 0: equal; 1: different; 2: bad input."""


def parse(argv: list[str]) -> Config:
    """The training config whose first step is to be proved. --help prints and exits. Raises UsageError."""
    options = _parser().parse(argv)
    config = _DEMO if options.config is None else load(options.config)
    parallel = {
        name: given
        for name in ("tp", "pp", "schedule", "microbatches")
        if (given := getattr(options, name)) is not None
    }
    if options.sequence_parallel:
        parallel["sequence_parallel"] = True
    config = replace(
        config,
        parallel=replace(config.parallel, **parallel),
        training=replace(config.training, dtype=DTYPES[options.dtype], device="cpu"),
        data=replace(config.data, source=_DEMO.data.source),  # tokens are random
    )
    if options.config is None:
        config = _sized(config, 2 * config.parallel.microbatches, config.data.sequence)
    if options.quick:
        config = _sized(config, config.parallel.microbatches, min(32, config.data.sequence))
    check(config)
    _check_room(config)
    return config


def _check_room(config: Config) -> None:
    """Refuse what would fill the folder of temporary files, where the reference's tensors go."""
    model, tokens = config.model, config.training.batch * config.data.sequence
    values = tokens * (model.layers * (10 * model.hidden + 4 * model.ffn) + 2 * model.vocab_size)
    parameters = model.layers * model.hidden * (4 * model.hidden + 3 * model.ffn) + 2 * model.vocab_size * model.hidden
    needed = 16 * values + 8 * parameters * (config.parallel.microbatches + 3)
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UsageError(
            f"the reference's tensors take about {needed / 2**30:.3g} GiB in {folder}, which has {free / 2**30:.3g} "
            "free; use fewer microbatches, a smaller model, --quick, or set TMPDIR"
        )


def _sized(config: Config, batch: int, sequence: int) -> Config:
    return replace(config, training=replace(config.training, batch=batch), data=replace(config.data, sequence=sequence))


def _parser() -> Parser:
    parser = Parser(
        "tpmp verify",
        usage="tpmp verify [--tp T] [--pp P] [--schedule S] [--microbatches M] [--dtype D] [--sequence-parallel] "
        "[--config FILE.toml] [--quick]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.add_argument("--tp", metavar="T", type=_count, help="tensor-parallel ranks (2)")
    parser.add_argument("--pp", metavar="P", type=_count, help="pipeline-parallel ranks (2)")
    parser.add_argument("--schedule", metavar="S", help=f"{', '.join(schedule_names())} (1f1b)")
    parser.add_argument("--microbatches", metavar="M", type=_count, help="of a step (8)")
    parser.add_argument("--dtype", metavar="D", type=_dtype, default="fp64", help=f"{' or '.join(DTYPES)} (fp64)")
    parser.add_argument("--sequence-parallel", action="store_true", help="cut tokens between the layers as well")
    parser.add_argument("--config", metavar="FILE.toml", type=Path, help="of tpmp train; options change what it says")
    parser.add_argument("--quick", action="store_true", help="a sequence of 32 tokens in each microbatch")
    return parser


def _count(text: str) -> int:
    if not re.fullmatch(r"\d{1,6}", text) or not 1 <= int(text) <= _MOST:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to {_MOST}, got {text!r}; such as 2")
    return int(text)


def _dtype(name: str) -> str:
    if name not in DTYPES:
        raise argparse.ArgumentTypeError(f"expected {' or '.join(DTYPES)}, got {name!r}; such as fp64")
    return name
