"""Fused Triton GEMM kernels and an overlapped communication engine for tensor- and pipeline-parallel training.

Importing this package imports neither torch nor Triton; the rooms below load on first use. On a machine without
GPU, Triton or the compiled extension everything works on the CPU path and torch.distributed.
"""

import importlib
import importlib.util
import warnings

from tpmp_kernels import env

__version__ = "0.1.0"

_ROOMS = (
    "bench", "checkpoint", "comm", "errors", "kernels", "models", "ops", "patching", "pipeline", "prover",
    "reference", "tensor_parallel", "testing", "training",
)  # fmt: skip
_CALLS = {"patch": "patching", "verify": "prover"}
__all__ = [*_ROOMS, *_CALLS, "__version__"]


def __getattr__(name: str):
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _CALLS:
        return getattr(importlib.import_module(f"{__name__}.{_CALLS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)


def _warn_without_extension() -> None:
    if importlib.util.find_spec("tpmp_kernels._C") is not None:
        return
    text = (
        "the compiled extension tpmp_kernels._C is missing, so ranks fall back to torch.distributed; "
        "install a C++17 compiler (g++) and run `pip install -e .` again"
    )
    if env.extension_required():
        raise ImportError(f"{text} (TPMP_EXT=require makes this an error)")
    warnings.warn(text, stacklevel=3)


_warn_without_extension()
