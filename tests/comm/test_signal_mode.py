"""Mode "signal" end to end: the kernel in Triton's interpreter, its chunks reduced over the double of NCCL."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tpmp_kernels.comm._ext import C

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(C is None, reason="needs the compiled extension")

PROGRAM = """
import sys
import torch
from nccl_world import connected
from tpmp_kernels.comm import overlap
from tpmp_kernels.testing import RankPool

def both(rows, chunks):
    with connected() as comm:
        generator = torch.Generator().manual_seed(comm.rank)
        x = torch.randint(-3, 4, (rows, 48), generator=generator).float().requires_grad_()
        weight = torch.randint(-3, 4, (40, 48), generator=generator).float().requires_grad_()
        found = []
        for mode in ("signal", "chunked"):
            for call in (overlap.linear_all_reduce, overlap.copy_linear):
                x.grad = weight.grad = None
                y = call(x, weight, comm, mode=mode, chunks=chunks)
                y.backward(torch.ones_like(y))
                found.append([y.detach(), x.grad, weight.grad])
        half = len(found) // 2
        assert all(torch.equal(a, b) for s, c in zip(found[:half], found[half:]) for a, b in zip(s, c))
        text = str(overlap.explain("linear_all_reduce", x.shape, weight.shape, x.dtype, comm, mode="signal"))
        names = [line for line in comm.last_ops() if "linear_all_reduce[" in line]
        return text, len(names)

if __name__ == "__main__":
    for rows, chunks in ((300, 3), (1, 2)):
        for text, posted in RankPool(2).run(both, rows, chunks):
            print(rows, posted, " ".join(text.split()))
"""


def test_signal_mode_has_the_results_of_chunked(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    here = Path(__file__).parent
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{tmp_path}:{here}:{here.parents[1]}",
                   "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 4 and all("mode signal" in line for line in lines), done.stdout
