"""The examples run as a reader would run them, and say what their text promises."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.full
def test_four_layers_equals_one_process():
    start = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "examples/four_layers.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    print(f"\nexamples/four_layers.py: {time.monotonic() - start:.1f} s")
    assert (run.returncode, run.stderr) == (0, "")
    off = re.search(r"blocks: +largest absolute difference (\S+)", run.stdout)
    assert 0 < float(off[1]) <= 1e-6
    assert "pipeline:  0 bits differ" in run.stdout
    blocks = re.findall(r"layer (\d), processor (\d):   (W\d\d) .*   (W\d\d) ", run.stdout)
    assert blocks == [
        *(("1", "0", "W11", "W12"), ("1", "1", "W21", "W22"), ("2", "0", "W11", "W21"), ("2", "1", "W12", "W22")),
        *(("3", "0", "W11", "W12"), ("3", "1", "W21", "W22"), ("4", "0", "W11", "W21"), ("4", "1", "W12", "W22")),
    ]
    losses = [line.split()[1:] for line in run.stdout.splitlines() if re.match(r" +\d+ +\d", line)]
    assert len(losses) == 11
    assert all(alone == pipeline for alone, _, pipeline in losses)
    assert float(losses[-1][0]) < float(losses[0][0]) / 4
