"""Runs the checks of a program of cases in Triton's interpreter, in a process of their own, since it is chosen when
triton is imported."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest


def outcomes(program: Path, names: Sequence[str]) -> dict[str, str]:
    """ "ok" or what went wrong, by the name of the case."""
    pytest.importorskip("triton")
    # One BLAS thread is 4-10 times faster here: the interpreter multiplies one small tile after the other.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, program, *names], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
