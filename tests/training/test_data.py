"""Training data: the corpus from the standard library or a file, and batches that every rank draws alike."""

import math

import numpy as np
import pytest
import torch

from tpmp_kernels.errors import UsageError
from tpmp_kernels.training import data
from tpmp_kernels.training.config import DataConfig


def corpus(tmp_path, text: bytes, **fields):
    (tmp_path / "text").write_bytes(text)
    config = DataConfig(source=str(tmp_path / "text"), cache=str(tmp_path / "cache"), **fields)
    data.prepare(config)
    return data.load(config)


def test_batches_are_consecutive_bytes_and_depend_on_seed_and_step_alone(tmp_path):
    made = corpus(tmp_path, bytes(range(256)) * 8, sequence=16)
    tokens, targets = made.batch(3, seed=1, size=4, sequence=16)
    assert tokens.shape == targets.shape == (4, 16) and tokens.dtype == torch.int64
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    assert torch.equal((tokens + 1) % 256, targets)
    assert torch.equal(tokens, made.batch(3, seed=1, size=4, sequence=16)[0])
    assert not torch.equal(tokens, made.batch(4, seed=1, size=4, sequence=16)[0])
    assert not torch.equal(tokens, made.batch(3, seed=2, size=4, sequence=16)[0])


def test_validation_is_cut_from_the_end(tmp_path):
    made = corpus(tmp_path, b"a" * 900 + b"b" * 100, sequence=8, validation_fraction=0.1)
    assert bytes(made.train) == b"a" * 900 and bytes(made.validation) == b"b" * 100
    assert made.batch(0, seed=0, size=2, sequence=8, split="validation")[0].eq(ord("b")).all()


def test_unigram_entropy_is_that_of_the_bytes(tmp_path):
    made = corpus(tmp_path, b"aabc" * 500, sequence=8)
    assert math.isclose(made.unigram_entropy, 1.5 * math.log(2), rel_tol=1e-12)


def test_the_standard_library_is_read_once_and_cached(tmp_path):
    config = DataConfig(source="python-stdlib", cache=str(tmp_path))
    path = data.prepare(config)
    assert path.stat().st_size > 5_000_000 and list(tmp_path.iterdir()) == [path]
    stamp = path.stat().st_mtime_ns
    data.prepare(config)
    assert path.stat().st_mtime_ns == stamp
    made = data.load(config)
    assert isinstance(made.train, np.memmap)
    assert b"import" in bytes(made.validation)


def test_a_changed_file_is_read_again(tmp_path):
    import os

    corpus(tmp_path, b"old " * 300, sequence=8)
    os.utime(tmp_path / "text", ns=(1, 1))
    assert bytes(corpus(tmp_path, b"new " * 300, sequence=8).train).startswith(b"new")


def test_too_little_text_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(UsageError, match=r"one sample takes 130; use more text, a shorter data\.sequence"):
        corpus(tmp_path, b"short", sequence=128)
