"""Compiles the test double of NCCL and the CUDA driver: `cuda, nccl = libraries()`."""

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = ("build.py", "cuda.hpp", "cuda.cpp", "faults.hpp", "reductions.hpp", "nccl.cpp")
COMMAND = ("g++", "-std=c++17", "-O0", "-Wall", "-Wextra", "-shared", "-fPIC", "-pthread")


@functools.cache
def libraries(*flags: str) -> tuple[str, str]:
    """The paths of libcuda.so.1 and libnccl.so.2, made once for each state of the sources. -DWITHOUT_LAST_ERROR: of an
    NCCL that lacks an optional function. A folder `worlds` beside them is for FAKE_NCCL_DIR."""
    command = [*COMMAND, *flags]
    made_of = [" ".join(command).encode(), *((FOLDER / name).read_bytes() for name in SOURCES)]
    digest = hashlib.sha256(b"".join(made_of)).hexdigest()[:16]
    folder = Path(tempfile.gettempdir(), f"tpmp-nccl-double-{os.getuid()}-{digest}")
    if not folder.exists():
        made = Path(tempfile.mkdtemp(prefix=folder.name))
        cuda, nccl = made / "libcuda.so.1", made / "libnccl.so.2"
        subprocess.run([*command, FOLDER / "cuda.cpp", "-Wl,-soname,libcuda.so.1", "-o", cuda], check=True)
        subprocess.run(
            [*command, FOLDER / "nccl.cpp", cuda, "-Wl,-rpath,$ORIGIN,-soname,libnccl.so.2", "-o", nccl], check=True
        )
        (made / "worlds").mkdir()
        try:
            made.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(made)
            assert folder.exists()
    return str(folder / "libcuda.so.1"), str(folder / "libnccl.so.2")
