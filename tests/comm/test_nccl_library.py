"""Where NCCL and the CUDA driver are found, what they may lack, and what is said where they are missing."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from nccl_double.build import libraries

from tpmp_kernels.comm._ext import C

pytestmark = pytest.mark.skipif(C is None, reason="needs the compiled extension")

# The first call decides for a process: each in one of its own.
PROGRAM = """
from tpmp_kernels.comm.nccl import library
try:
    found = library.load()
    print(found.path, found.release, *found.absent, sep="|")
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""


def loaded(before: str = "", **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TPMP_", "FAKE_"))}
    done = subprocess.run(
        [sys.executable, "-c", before + PROGRAM], env=clean | environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_override_comes_first():
    cuda, nccl = libraries()
    assert loaded(TPMP_CUDA=cuda, TPMP_NCCL=nccl) == f"{nccl}|2.28.9"


def of_wheel(path: str) -> str:
    return f"from tpmp_kernels.comm.nccl import library; library.wheels = lambda: [{path!r}]\n"


def test_then_the_copy_that_is_loaded_and_then_the_wheels(tmp_path):
    cuda, nccl = libraries()
    wheel = shutil.copy(nccl, tmp_path)
    shutil.copy(cuda, tmp_path)  # which it needs beside it
    already = f"import ctypes; ctypes.CDLL({cuda!r}); ctypes.CDLL({nccl!r})\n"
    assert loaded(already + of_wheel(wheel)) == f"{nccl}|2.28.9"
    assert loaded(of_wheel(wheel), TPMP_CUDA=cuda) == f"{wheel}|2.28.9"


def test_a_bad_override_is_no_fallback():
    cuda, nccl = libraries()
    text = loaded(f"import ctypes; ctypes.CDLL({nccl!r})\n", TPMP_CUDA=cuda, TPMP_NCCL="/no/such/libnccl.so")
    assert text.startswith("TransportError: NCCL: the library asked for cannot be loaded: /no/such/libnccl.so: ")


@pytest.mark.full
def test_what_is_missing_is_said_with_the_reason():
    cuda, nccl = libraries("-DWITHOUT_LAST_ERROR")
    text = loaded(TPMP_CUDA=cuda, TPMP_NCCL=nccl)
    assert text == f"{nccl}|2.28.9|ncclGetLastError: NCCL 2.28.9 at {nccl} has none (it came with 2.13)"


@pytest.mark.full
def test_an_old_one_is_refused():
    cuda, nccl = libraries()
    text = loaded(TPMP_CUDA=cuda, TPMP_NCCL=nccl, FAKE_NCCL_VERSION="21706")
    assert text == (
        f"TransportError: NCCL at {nccl} is 2.17.6; expected 2.18 or later, whose communicators do not block"
    )


@pytest.mark.full
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA driver")
def test_none_at_all():
    nccl = libraries()[1]
    text = loaded(TPMP_NCCL=nccl)
    assert text.startswith("TransportError: the CUDA driver is not on this machine (libcuda.so.1: ")
