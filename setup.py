"""Builds the extension tpmp_kernels._C from csrc/: C++17, pybind11, no torch header. The rest is in pyproject.toml.

Without a compiler the package installs without the extension, and says so at import; TPMP_EXT=require makes that an
error here.
"""

import os
import re
import sys
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

ROOT = Path(__file__).parent
# The one place of the ABI string is the Python side, which compares it at import.
ABI = re.search(r'^ABI = "(.+)"', (ROOT / "tpmp_kernels/comm/_ext.py").read_text(), re.MULTILINE).group(1)

EXTENSION = Pybind11Extension(
    "tpmp_kernels._C",
    sources=sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cpp")),
    depends=sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.hpp")),
    include_dirs=["csrc"],
    define_macros=[("TPMP_ABI", f'"{ABI}"')],
    cxx_std=17,
    # -g0: debug information triples the build time of pybind11 code.
    # -ffp-contract=off: the same bits on every machine, with or without fused multiply-add.
    extra_compile_args=["-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra"],
    extra_link_args=["-pthread"],
    optional=os.environ.get("TPMP_EXT") != "require",
)

ParallelCompile("TPMP_BUILD_JOBS", default=os.cpu_count() or 1).install()
setup(ext_modules=[EXTENSION] if sys.platform == "linux" else [])
