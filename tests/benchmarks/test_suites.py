"""What stands around the suites: inputs are checked before they are timed; a session ends with its table and rows."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.oracle import assert_correct
from tpmp_kernels.bench import read_rows

ROOT = Path(__file__).resolve().parents[2]
SUITE = """
from tpmp_kernels.bench import Timing

SUITE = "toy"


def test_case(compare):
    timings = {"eager": Timing((2.0, 2.0)), "tpmp": Timing((1.0, 1.0)), "peer": "not installed"}
    compare(lambda: timings, case="add", shape="8x8", dtype="fp32", baseline="eager", threads=1)


def test_other(compare, one_thread):
    compare(lambda: {"eager": Timing((1.0,))}, case="sub", shape="8x8", dtype="fp32", baseline="eager")
"""


@pytest.mark.full
def test_session_ends_with_table_and_rows(tmp_path):
    shutil.copy(ROOT / "benchmarks" / "conftest.py", tmp_path)
    (tmp_path / "test_toy.py").write_text(SUITE)
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"OUT": str(out)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *_, header, eager, ours, peer, other, passed = done.stdout.splitlines()
    assert header.split()[:4] == ["case", "shape", "dtype", "contender"] and passed.startswith("2 passed")
    assert "1.00x" in eager and "2.00x" in ours and "cannot run: not installed" in peer and "sub" in other
    (path,) = out.glob("*/toy.json")
    rows = read_rows(path)
    assert {row.contender for row in rows if row.case == "add"} == {"eager", "tpmp", "peer"}
    assert {row.threads for row in rows} == {1} and len({row.date for row in rows}) == 1


def double(x):
    return x * 2


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda x: x * 2.001, "wrong: largest error"),
        (lambda x: x * float("nan"), "wrong: largest error nan"),
        (lambda x: (x * 2)[:1], r"returned shape \(1, 64\), not \(64, 64\)"),
    ],
)
def test_contender_that_is_wrong_is_not_timed(wrong, message):
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    assert_correct({"eager": double, "right": lambda x: x + x}, double, (x,), baseline="eager")
    with pytest.raises(AssertionError, match=message):
        assert_correct({"eager": double, "wrong": wrong}, double, (x,), baseline="eager")


def test_contender_may_be_twice_as_far_off_as_the_baseline():
    x = torch.ones(8)  # exact in fp32, so the errors are the ones made on purpose
    off = {"eager": lambda x: x * 2 + 2**-10, "fair": lambda x: x * 2 + 2**-9, "worse": lambda x: x * 2 + 2**-8}
    with pytest.raises(AssertionError, match=r"worse: largest error 0\.00391 against fp64; the bound is 0\.00195"):
        assert_correct(off, double, (x,), baseline="eager")


def test_reading_rows_and_reporting_import_no_torch():
    code = "import sys, benchmarks.report, tpmp_kernels.bench; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
