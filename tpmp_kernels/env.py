"""Every environment variable that this package reads, in one place. Each is read when it is needed, never at import.

TPMP_EXT=require        a missing or stale compiled extension is an error (CI), at build and at import
TPMP_TRANSPORT=NAME     shm | process_group | nccl: overrides the communicator's own choice
TPMP_OPS=NAME           triton | cpu | reference: overrides the choice of ops by device
TPMP_NCCL=PATH          the NCCL library to load, before torch's, the wheel's and the system's
TPMP_CUDA=PATH          the CUDA driver library to load, before the one that is loaded and the system's
TPMP_BUILD_JOBS=N       compilers at a time while the extension is built, by default one a core (setup.py)
TPMP_LAUNCHER           internal: the launcher's word to its own fork server, which reads it as it starts
                        (training/lifeline.py)
"""

import os


def extension_required() -> bool:
    return os.environ.get("TPMP_EXT") == "require"


def transport() -> str | None:
    return os.environ.get("TPMP_TRANSPORT") or None


def nccl_library() -> str:
    return os.environ.get("TPMP_NCCL", "")


def cuda_library() -> str:
    return os.environ.get("TPMP_CUDA", "")


def ops() -> str | None:
    return os.environ.get("TPMP_OPS") or None
