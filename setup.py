"""Builds the extension tpmp_kernels._C from csrc/: C++17, pybind11, no torch header. The rest is in pyproject.toml.

Without a compiler the package installs without the extension and says so; TPMP_EXT=require makes that an error.
"""

import os
import re
import sys
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError

ROOT = Path(__file__).parent
# The one place of the ABI string is the Python side, which compares it at import.
ABI = re.search(r'^ABI = "(.+)"', (ROOT / "tpmp_kernels/comm/_ext.py").read_text(), re.MULTILINE).group(1)


class OptionalBuild(build_ext):
    def build_extension(self, ext) -> None:
        try:
            super().build_extension(ext)
        except (CCompilerError, ExecError, PlatformError, OSError) as error:
            if os.environ.get("TPMP_EXT") == "require":
                raise
            print(
                f"tpmp_kernels: installed without the compiled extension ({error}); ranks will use "
                "torch.distributed. Install a C++17 compiler (g++) and install again to get it.",
                file=sys.stderr,
            )


ParallelCompile("TPMP_BUILD_JOBS", default=os.cpu_count() or 1).install()

setup(
    ext_modules=[
        Pybind11Extension(
            "tpmp_kernels._C",
            sources=sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cpp")),
            include_dirs=["csrc"],
            define_macros=[("TPMP_ABI", f'"{ABI}"')],
            cxx_std=17,
            # -g0: debug information triples the build time of pybind11 code.
            extra_compile_args=["-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra"],
            extra_link_args=["-pthread"],
        )
    ]
    if sys.platform == "linux"
    else [],
    cmdclass={"build_ext": OptionalBuild},
)
