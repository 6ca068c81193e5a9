"""The README tells the truth: its tables are those of the committed rows, and its Python examples run."""

import re
import subprocess
import sys
from pathlib import Path

from benchmarks import report

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
USE_A_KERNEL, ASSEMBLE_A_MODEL = re.findall(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


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


def test_the_model_example_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "example.py").write_text(ASSEMBLE_A_MODEL)
    run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "example.py"))


def test_pictures_and_files_that_it_names_exist():
    quoted = re.findall(r"`((?:examples|benchmarks|tests|docs)/[\w/.]+)`", TEXT)
    for path in [*re.findall(r"\]\(([^)]+)\)", TEXT), *quoted]:
        assert (ROOT / path).exists(), path
