"""Where and when rows were measured: device, threads, commit and versions."""

import importlib.metadata
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tpmp_kernels import __version__

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "triton", "numpy")


@dataclass(frozen=True)
class Provenance:
    """Where and when rows were measured: one object for each device of a run."""

    device: str
    threads: int
    commit: str
    date: str
    versions: dict[str, str]


def provenance(device: str = "cpu", *, threads: int, date: str | None = None) -> Provenance:
    """Describe this machine and source tree; `device` is "cpu" or "cuda", `date` that of the run, by default now."""
    return Provenance(
        device=device_slug(device),
        threads=threads,
        commit=commit(),
        date=date or datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        versions=versions(),
    )


def device_slug(device: str = "cpu") -> str:
    """A name for a folder: cpu-<model>-<n>core, or the name of the current GPU."""
    if device != "cpu":
        import torch

        return _slug(torch.cuda.get_device_name())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"cpu-{_slug(_cpu_model())}-{cores}core"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1) if found else platform.processor() or platform.machine()


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", text.lower())).strip("-")


def commit(root: Path = _ROOT) -> str:
    """The short commit of the source tree with -dirty where it differs, or "unknown" outside of a checkout.

    Rows and the tables made from them do not count as a difference: writing them must not taint the next suite.
    """
    if _git(root, "rev-parse", "--show-toplevel") != str(root):
        return "unknown"  # installed into some other project's tree
    head = _git(root, "rev-parse", "--short=10", "HEAD")
    changes = _git(root, "status", "--porcelain", "--", ".", ":!benchmarks/results", ":!README.md")
    return head + ("-dirty" if changes else "") if head else "unknown"


def _git(root: Path, *args: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "tpmp_kernels": __version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found
