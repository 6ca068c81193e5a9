"""Byte-level training data, memory-mapped, and the batch of any step as a function of (seed, step) alone.

The source is a file, a folder, or "python-stdlib": the .py sources of the running interpreter's standard library, real
text that every machine has. The bytes are the tokens (vocabulary 256).
"""

import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tpmp_kernels.errors import UsageError
from tpmp_kernels.training.config import DataConfig


@dataclass(frozen=True)
class Corpus:
    """Two arrays of bytes, memory-mapped: `train` and `validation`, cut from the end of the text."""

    train: np.ndarray
    validation: np.ndarray

    @cached_property
    def unigram_entropy(self) -> float:
        """Entropy in nat of the distribution of single bytes over the whole corpus: what a model without context
        could reach at best."""
        count = np.bincount(self.train, minlength=256) + np.bincount(self.validation, minlength=256)
        p = count[count > 0] / count.sum()
        return float(-(p * np.log(p)).sum())

    def batch(self, step: int, *, seed: int, size: int, sequence: int, split: str = "train") -> tuple[Tensor, Tensor]:
        """(tokens, targets), each [size, sequence] int64: the same for every rank, layout and process."""
        source = self.train if split == "train" else self.validation
        generator = np.random.Generator(np.random.Philox(key=[seed, step]))
        starts = generator.integers(0, len(source) - sequence - 1, size)
        rows = np.stack([source[s : s + sequence + 1] for s in starts]).astype(np.int64)
        rows = torch.from_numpy(rows)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def prepare(config: DataConfig) -> Path:
    """Write the tokens of the source as one file, unless it is there, and return its path. One process calls this."""
    path = _cache_path(config)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written aside and renamed: a killed run never leaves a half file that the next one would take for whole.
        partial = path.with_suffix(f".{os.getpid()}.partial")
        try:
            with partial.open("wb") as out:
                for file in _files(config.source):
                    out.write(file.read_bytes())
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)
    return path


def load(config: DataConfig) -> Corpus:
    """The corpus that `prepare` wrote. UsageError where either part is shorter than one sequence."""
    tokens = np.memmap(_cache_path(config), dtype=np.uint8, mode="r")
    cut = len(tokens) - int(len(tokens) * config.validation_fraction)
    corpus = Corpus(tokens[:cut], tokens[cut:])
    shortest = min(len(corpus.train), len(corpus.validation))
    if shortest < config.sequence + 2:
        raise UsageError(
            f"data.source {config.source!r} leaves {shortest} bytes in its shorter part, but one sample takes "
            f"{config.sequence + 2}; use more text, a shorter data.sequence or another data.validation_fraction"
        )
    return corpus


def _files(source: str) -> Iterator[Path]:
    if source == "python-stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        for file in sorted(root.rglob("*.py")):
            if "site-packages" not in file.parts:  # installed packages lie inside the standard library's folder
                yield file
    elif Path(source).is_dir():
        yield from sorted(p for p in Path(source).rglob("*") if p.is_file())
    else:
        yield Path(source)


def _cache_path(config: DataConfig) -> Path:
    """Named by what the tokens depend on, so that another interpreter or a changed file is another cache."""
    if config.source == "python-stdlib":
        name = f"python-stdlib-{sysconfig.get_config_var('py_version')}"
    else:
        newest = max(p.stat().st_mtime_ns for p in _files(config.source))
        name = f"{Path(config.source).resolve().as_posix().strip('/').replace('/', '-')}-{newest:x}"
    return Path(config.cache) / f"{name}.bytes"
