"""Triton kernels on CPU tensors in Triton's interpreter: numbers, odd shapes, strides, and no access out of range."""

import json
import os
import subprocess
import sys
from pathlib import Path

import interpreter_cases  # noqa: F401
import pytest
from interpreter import CASES, sampled

PROGRAM = Path(__file__).parent / "interpreter_cases.py"
SAMPLE = sampled()
REST = [name for name in CASES if name not in SAMPLE]


def interpret(names: list[str]) -> dict[str, str]:
    """The outcome of each case, from one process with the interpreter switched on."""
    pytest.importorskip("triton")
    # One BLAS thread is 4-10 times faster here: the interpreter multiplies one small tile after the other.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, PROGRAM, *names], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def sample() -> dict[str, str]:
    return interpret(SAMPLE)


@pytest.fixture(scope="module")
def rest() -> dict[str, str]:
    return interpret(REST)


@pytest.mark.parametrize("name", SAMPLE)
def test_interpreter(sample, name):
    assert sample[name] == "ok", sample[name]


@pytest.mark.full
@pytest.mark.parametrize("name", REST)
def test_interpreter_full(rest, name):
    assert rest[name] == "ok", rest[name]
