"""Every check of a Config that can be made before a process starts. Each refusal is one sentence with the remedy."""

import difflib
import math
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tpmp_kernels.errors import UsageError
from tpmp_kernels.pipeline.schedules import SCHEDULES
from tpmp_kernels.training.config import STDLIB, Config
from tpmp_kernels.training.plan import partition_of, schedule_of


def check(config: Config) -> None:
    """Refuse what cannot run, before any process starts. Raises UsageError with expected, got and remedy."""
    _check_numbers(config)
    _check_model(config)
    _check_tensor_parallel(config)
    _check_parallel(config)
    source = config.data.source
    if source != STDLIB and not Path(source).exists():
        raise UsageError(
            f"data.source: expected {STDLIB!r} or an existing file or folder, got {source!r}, which does not exist"
        )


def check_resumed(config: Config, saved: Config) -> None:
    """Refuse another model than the one whose checkpoint is to be read; dropout alone may change."""
    for key, value in asdict(replace(config.model, dropout=saved.model.dropout)).items():
        if value != (expected := getattr(saved.model, key)):
            raise UsageError(
                f"model.{key}: expected {expected}, as in the run that is resumed, got {value}; leave it out, or start "
                "a new run"
            )


_POSITIVE = [
    "model.vocab_size", "model.hidden", "model.layers", "model.heads", "model.kv_heads",
    "model.ffn", "model.rope_theta", "model.norm_eps", "data.sequence", "parallel.tp", "parallel.pp",
    "parallel.chunks", "parallel.microbatches",
    "training.steps", "training.batch", "training.threads", "training.timeout", "optimizer.lr",
    "optimizer.eps", "optimizer.clip_norm", "validation.batches", "proof.fp64_steps", "proof.fp64_tolerance",
    "proof.fp32_steps", "proof.fp32_tolerance", "output.log_every",
]  # fmt: skip
_NOT_NEGATIVE = [
    "model.vocab_multiple", "optimizer.warmup_steps", "optimizer.weight_decay", "validation.every", "checkpoint.every",
]  # fmt: skip


def _check_numbers(config: Config) -> None:
    for name in _POSITIVE:
        value = _value(config, name)
        if not (math.isfinite(value) and value > 0):
            raise UsageError(f"{name}: expected more than 0, got {value}")
    for name in _NOT_NEGATIVE:
        if not (math.isfinite(_value(config, name)) and _value(config, name) >= 0):
            raise UsageError(f"{name}: expected 0 or more, got {_value(config, name)}")
    if not 0 <= config.model.dropout < 1:
        raise UsageError(f"model.dropout: expected from 0 up to 1, got {config.model.dropout}; 0.1 drops a tenth")
    if not 0 <= config.training.seed < 2**63:
        raise UsageError(f"training.seed: expected from 0 to 2^63 - 1, got {config.training.seed}")
    if not 0 < config.data.validation_fraction < 1:
        raise UsageError(f"data.validation_fraction: expected between 0 and 1, got {config.data.validation_fraction}")
    if not all(0 <= beta < 1 for beta in config.optimizer.betas):
        raise UsageError(f"optimizer.betas: expected two numbers from 0 up to 1, got {list(config.optimizer.betas)}")


def _check_model(config: Config) -> None:
    model = config.model
    if model.hidden % model.heads:
        raise UsageError(
            f"model.hidden={model.hidden} is not divisible by model.heads={model.heads}; "
            f"use heads in {_divisors(model.hidden)}"
        )
    if model.head_size % 2:
        raise UsageError(
            f"model.hidden={model.hidden} gives {model.heads} heads of {model.head_size} features, expected an even "
            f"number because rotary positions turn pairs; use hidden={model.heads * (model.head_size + 1)}"
        )
    if model.heads % model.kv_heads:
        raise UsageError(
            f"model.heads={model.heads} is not divisible by model.kv_heads={model.kv_heads}; "
            f"use kv_heads in {_divisors(model.heads)}"
        )


def _check_tensor_parallel(config: Config) -> None:
    model, tp = config.model, config.parallel.tp
    axes = {"heads": model.heads, "ffn": model.ffn, "vocab_size": model.padded_vocab}
    allowed = _set(r for r in _divide(math.gcd(*axes.values())) if not (model.kv_heads % r and r % model.kv_heads))
    for name, size in axes.items():
        if size % tp:
            padded, what = (f", padded to {size},", "vocab_multiple") if name == "vocab_size" else ("", name)
            raise UsageError(
                f"model.{name}={getattr(model, name)}{padded} is not divisible by parallel.tp={tp}; use tp in "
                f"{allowed} or change {what}"
            )
    if model.kv_heads % tp and tp % model.kv_heads:
        raise UsageError(
            f"model.kv_heads={model.kv_heads} and parallel.tp={tp}: neither divides the other; use tp in {allowed} or "
            "change kv_heads"
        )


def _check_parallel(config: Config) -> None:
    parallel, training = config.parallel, config.training
    if training.batch % parallel.microbatches:
        raise UsageError(
            f"training.batch={training.batch} is not divisible by parallel.microbatches={parallel.microbatches}; "
            f"use microbatches in {_divisors(training.batch)}"
        )
    tokens = training.batch // parallel.microbatches * config.data.sequence
    if parallel.sequence_parallel and tokens % parallel.tp:
        raise UsageError(
            f"parallel.sequence_parallel: the {tokens} tokens of a microbatch are not divisible by "
            f"parallel.tp={parallel.tp}; use tp in {_divisors(tokens)} or change data.sequence"
        )
    _check_schedule(config)


def _check_schedule(config: Config) -> None:
    parallel, layers, names = config.parallel, config.model.layers, schedule_names()
    if parallel.schedule not in names:
        nearest = difflib.get_close_matches(parallel.schedule, names, n=1, cutoff=0.0)[0]
        raise UsageError(
            f"parallel.schedule: expected one of {', '.join(names)}, got {parallel.schedule!r}; "
            f"the nearest known one is {nearest!r}"
        )
    chunks = SCHEDULES[parallel.schedule].chunks or parallel.chunks
    if layers + 2 < parallel.pp * chunks:
        raise UsageError(
            f"model.layers={layers}: expected at least {parallel.pp * chunks - 2} for {chunks} stage"
            f"{'s' * (chunks > 1)} of {parallel.schedule} on each of parallel.pp={parallel.pp} ranks, embedding and "
            "head counted; use fewer ranks or more layers"
        )
    try:
        partition_of(config, schedule_of(config).placement)
    except ValueError as error:
        raise UsageError(f"parallel.begin={parallel.begin!r}: {error}") from None


def schedule_names() -> list[str]:
    """The schedules that a config can name: those with backwards."""
    return [name for name in SCHEDULES if name != "forward-only"]


def _value(config: Config, name: str) -> Any:
    section, key = name.split(".")
    return getattr(getattr(config, section), key)


def _divisors(number: int) -> str:
    return _set(_divide(number))


def _divide(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _set(numbers: Iterable[int]) -> str:
    return "{" + ", ".join(map(str, numbers)) + "}"
