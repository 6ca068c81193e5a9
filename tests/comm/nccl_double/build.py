"""Compiles the test double of NCCL and the CUDA driver: `cuda, nccl = libraries()`."""

import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = ("cuda.hpp", "cuda.cpp", "nccl.cpp")
COMMAND = ("g++", "-std=c++17", "-O0", "-Wall", "-Wextra", "-shared", "-fPIC", "-pthread")


@functools.cache
def libraries() -> tuple[str, str]:
    """The paths of libcuda.so.1 and libnccl.so.2, made once for each state of the sources."""
    made_of = [" ".join(COMMAND).encode(), *((FOLDER / name).read_bytes() for name in SOURCES)]
    digest = hashlib.sha256(b"".join(made_of)).hexdigest()[:16]
    folder = Path(tempfile.gettempdir(), f"tpmp-nccl-double-{os.getuid()}-{digest}")
    if not folder.exists():
        made = Path(tempfile.mkdtemp(prefix=folder.name))
        cuda, nccl = made / "libcuda.so.1", made / "libnccl.so.2"
        subprocess.run([*COMMAND, FOLDER / "cuda.cpp", "-Wl,-soname,libcuda.so.1", "-o", cuda], check=True)
        subprocess.run([*COMMAND, FOLDER / "nccl.cpp", cuda, "-Wl,-rpath,$ORIGIN", "-o", nccl], check=True)
        try:
            made.rename(folder)
        except OSError:  # another process was faster
            assert folder.exists()
    return str(folder / "libcuda.so.1"), str(folder / "libnccl.so.2")
