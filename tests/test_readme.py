"""The README tells the truth: its tables are those of the committed rows, and its Python examples run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks import report
from tpmp_kernels.comm import communicator
from tpmp_kernels.comm._ext import C
from tpmp_kernels.errors import CollectiveMismatch

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
USE_A_KERNEL, COMMUNICATE, ASSEMBLE_A_MODEL = re.findall(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def test_what_the_demo_prints_is_what_it_printed():
    """docs/demo.txt is the output of one `make demo`, whole; the README quotes its end."""
    (quoted,) = re.findall(r"^```\n(validation loss .*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    assert (ROOT / "docs/demo.txt").read_text().endswith(quoted)


def run(*command: str) -> None:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_tables_agree_with_the_rows():
    assert report.main(["--check"]) == 0


def test_the_kernel_example_runs():
    run("-c", USE_A_KERNEL)


@pytest.mark.full
@pytest.mark.parametrize("example", [COMMUNICATE, ASSEMBLE_A_MODEL], ids=["communicate", "model"])
def test_the_examples_for_two_ranks_run(tmp_path, monkeypatch, example):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "example.py").write_text(example)
    run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "example.py"))


def _differ() -> str:
    with communicator(dist.group.WORLD, transport="shm") as comm, pytest.raises(CollectiveMismatch) as caught:
        comm.all_reduce(torch.ones(8, dtype=(torch.float32, torch.bfloat16)[comm.rank]), tag="layer7.mlp")
    return str(caught.value)


@pytest.mark.skipif(C is None, reason="needs the compiled extension")
def test_a_mismatch_is_told_as_it_says(ranks):
    (quoted,) = re.findall(r"^```\nCollectiveMismatch: (.*?)\n```$", TEXT, re.DOTALL | re.MULTILINE)
    for text in ranks(2).run(_differ):
        assert text.startswith(quoted)


def test_pictures_and_files_that_it_names_exist():
    quoted = re.findall(r"`((?:examples|benchmarks|tests|docs)/[\w/.]+)`", TEXT)
    for path in [*re.findall(r"\]\(([^)]+)\)", TEXT), *quoted]:
        assert (ROOT / path).exists(), path
