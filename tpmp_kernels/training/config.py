"""The config of a training run: frozen dataclasses, and a strict TOML reader and writer for them.

    config = load(Path("examples/demo.toml"))
    text = to_toml(config)         # the config as run; reading it again gives an equal object

The docstring under a field is its help text. A key that is not known is an error that names the nearest known one: a
misspelt setting that is silently ignored costs a training run. Every error is a UsageError of one sentence. Checks
across fields are in config_check.py, overrides from the command line in overrides.py; none of them imports torch.
"""

import dataclasses
import difflib
import json
import tomllib
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tpmp_kernels.errors import UsageError
from tpmp_kernels.models.config import ModelConfig

STDLIB = "python-stdlib"


@dataclass(frozen=True)
class DataConfig:
    source: str = STDLIB
    """Text to train on: "python-stdlib" (the sources of the running interpreter's library), or a file or folder."""
    cache: str = "runs/data"
    """Folder for the memory-mapped tokens."""
    sequence: int = 128
    """Length of a training sequence, in tokens."""
    validation_fraction: float = 0.1
    """Share of the tokens kept for validation, between 0 and 1."""


@dataclass(frozen=True)
class ParallelConfig:
    tp: int = 1
    """Tensor-parallel ranks: every layer is cut into this many shards."""
    sequence_parallel: bool = False
    """Cut the tokens between tensor-parallel layers as well: norms and residuals take 1/tp of the memory."""
    pp: int = 1
    """Pipeline-parallel ranks."""
    schedule: str = "1f1b"
    """Pipeline schedule."""
    chunks: int = 2
    """Stages on each pipeline-parallel rank, where the schedule leaves the choice."""
    begin: str = ""
    """Layers that begin a stage, such as "layers.3, lm_head"; else the slowest rank is made the least slow."""
    microbatches: int = 1
    """Microbatches per step."""


@dataclass(frozen=True)
class TrainingConfig:
    steps: int = 100
    """Optimizer steps."""
    batch: int = 16
    """Sequences per step, over all microbatches."""
    seed: int = 0
    """Seed of the parameters, of the order of the data and of the masks of dropout."""
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    """Dtype of parameters and activations."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where ranks compute; auto takes CUDA where every local rank has a GPU."""
    transport: Literal["auto", "shm", "process_group", "nccl"] = "auto"
    """How ranks communicate; auto takes nccl on CUDA, and shared memory where all ranks of a group share it."""
    threads: int = 1
    """CPU threads per rank."""
    timeout: float = 60.0
    """Seconds that a rank waits for its peers before it gives up."""


@dataclass(frozen=True)
class OptimizerConfig:
    lr: float = 3e-3
    """Peak learning rate."""
    warmup_steps: int = 20
    """Steps over which the learning rate rises linearly from 0."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's first and second moment."""
    eps: float = 1e-8
    """Added to the root of AdamW's second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay, per step and unit of learning rate."""
    clip_norm: float = 1.0
    """Largest global gradient norm."""


@dataclass(frozen=True)
class ValidationConfig:
    every: int = 40
    """Steps between two validations."""
    batches: int = 8
    """Batches of `training.batch` sequences per validation."""


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 0
    """Steps between two checkpoints; 0 saves at the end alone."""


@dataclass(frozen=True)
class ProofConfig:
    enabled: bool = True
    """After training, repeat it unfused in one process from the same seed and compare the losses."""
    fp64_steps: int = 50
    """Steps compared in float64."""
    fp64_tolerance: float = 1e-9
    """Largest relative loss difference allowed in float64."""
    fp32_steps: int = 25
    """Steps judged in float32; rounding grows with training, so later ones are printed only."""
    fp32_tolerance: float = 1e-6
    """Largest relative loss difference allowed in float32."""


@dataclass(frozen=True)
class OutputConfig:
    run_dir: str = "runs/train"
    """Folder of metrics, pictures, config and checkpoints."""
    log_every: int = 1
    """Steps between two lines on the console."""


@dataclass(frozen=True)
class Config:
    """Everything that one `tpmp train` run depends on."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    proof: ProofConfig = field(default_factory=ProofConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    @property
    def ranks(self) -> int:
        """Processes that the run needs."""
        return self.parallel.tp * self.parallel.pp


# Sections by name, and the annotation of every "section.key".
SECTIONS: dict[str, type] = typing.get_type_hints(Config)
TYPES: dict[str, Any] = {
    f"{section}.{key}": kind for section, cls in SECTIONS.items() for key, kind in typing.get_type_hints(cls).items()
}
_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def load(path: Path) -> Config:
    """The config of a TOML file; keys that it leaves out keep their defaults."""
    if not path.is_file():
        raise UsageError(f"config: expected a TOML file, but {str(path)!r} is none; examples/demo.toml is one")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: expected TOML, got {error}; correct the file") from None
    return from_tables(tables, where=str(path))


def from_tables(tables: dict[str, Any], *, where: str = "config") -> Config:
    """A Config from nested dicts, as tomllib returns them. `where` names the source in errors."""
    fields = {}
    for section, table in tables.items():
        if section not in SECTIONS:
            raise unknown(f"{where}: unknown section", section, SECTIONS)
        if not isinstance(table, dict):
            raise UsageError(f"{where}: {section} is a section, expected a table, got {table!r}; write [{section}]")
        values = {}
        for key, value in table.items():
            name = f"{section}.{key}"
            if name not in TYPES:
                raise unknown(f"{where}: unknown key", name, TYPES)
            values[key] = typed(f"{where}: {name}", TYPES[name], value)
        fields[section] = SECTIONS[section](**values)
    return Config(**fields)


def to_toml(config: Config) -> str:
    """The config as TOML text, every key written out. `load` reads it back to an equal object."""
    lines = []
    for section in SECTIONS:
        lines += [f"[{section}]"]
        table = dataclasses.asdict(getattr(config, section))
        lines += [f"{key} = {_toml_value(value)}" for key, value in table.items()]
        lines += [""]
    return "\n".join(lines)


def unknown(what: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a name that is not among `known`."""
    (nearest,) = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    return UsageError(f"{what} {name!r}; the nearest known one is {nearest!r}")


def typed(name: str, kind: Any, value: Any) -> Any:
    """`value` as read from a file, checked against the annotation `kind`."""
    if typing.get_origin(kind) is Literal:
        if value in typing.get_args(kind):
            return value
        raise UsageError(f"{name}: expected one of {', '.join(typing.get_args(kind))}, got {value!r}")
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        if not isinstance(value, list | tuple) or len(value) != len(kinds):
            raise UsageError(f"{name}: expected {len(kinds)} numbers, got {value!r}; write [0.9, 0.95]")
        return tuple(typed(name, each, item) for each, item in zip(kinds, value, strict=True))
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is kind:
        return value
    raise UsageError(f"{name}: expected {_WORDS[kind]}, got {value!r}")


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, str):
        # JSON's escapes of quotes, backslashes and control characters are TOML's as well, but for DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
