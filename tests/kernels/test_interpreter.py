"""Triton kernels on CPU tensors in Triton's interpreter: numbers, odd shapes, strides, and no access out of range."""

from pathlib import Path

import interpreter_cases  # noqa: F401
import pytest
from interpreted import outcomes
from interpreter import CASES, sampled

PROGRAM = Path(__file__).parent / "interpreter_cases.py"
SAMPLE = sampled()
REST = [name for name in CASES if name not in SAMPLE]


@pytest.fixture(scope="module")
def sample() -> dict[str, str]:
    return outcomes(PROGRAM, SAMPLE)


@pytest.fixture(scope="module")
def rest() -> dict[str, str]:
    return outcomes(PROGRAM, REST)


@pytest.mark.parametrize("name", SAMPLE)
def test_interpreter(sample, name):
    assert sample[name] == "ok", sample[name]


@pytest.mark.full
@pytest.mark.parametrize("name", REST)
def test_interpreter_full(rest, name):
    assert rest[name] == "ok", rest[name]
