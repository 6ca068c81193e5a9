"""Where NCCL and the CUDA driver are looked for: TPMP_NCCL and TPMP_CUDA, what is loaded, the wheel, the system.

`import torch` with CUDA loads a copy of NCCL; using that one keeps one NCCL in the process.
"""

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from tpmp_kernels import env
from tpmp_kernels.comm._ext import C
from tpmp_kernels.errors import TransportError


class Library(NamedTuple):
    """`version` as NCCL codes it: 22809 for 2.28.9. `absent`: a line for each optional function that it lacks."""

    path: str
    version: int
    absent: list[str]

    @property
    def release(self) -> str:
        return f"{self.version // 10000}.{self.version // 100 % 100}.{self.version % 100}"


@cache
def load() -> Library:
    """NCCL and the CUDA driver, loaded; TransportError with the reason where either is missing or too old."""
    if C is None:
        raise TransportError("the compiled extension tpmp_kernels._C is missing or stale; run `pip install -e .` again")
    C.load_cuda(env.cuda_library())
    return Library(*C.load_nccl(env.nccl_library(), wheels()))


def wheels() -> list[str]:
    """The libraries of installed NCCL wheels (nvidia-nccl-cu12, nvidia-nccl-cu13)."""
    try:
        spec = find_spec("nvidia.nccl")
    except ModuleNotFoundError:
        return []
    folders = spec.submodule_search_locations if spec else []
    return [str(path) for folder in folders or [] for path in Path(folder, "lib").glob("libnccl.so.2")]
