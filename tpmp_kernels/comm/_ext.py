"""The compiled extension, or None where it was not built. Nothing else in the package imports tpmp_kernels._C."""

import importlib
import warnings

from tpmp_kernels import env

# Raised whenever bindings.cpp or the layout of the shared segment changes; setup.py compiles it into the extension.
ABI = "tpmp-8"


def load():
    """The module `tpmp_kernels._C`, or None where it is missing or stale (an ImportError under TPMP_EXT=require)."""
    try:
        module = importlib.import_module("tpmp_kernels._C")
    except ModuleNotFoundError:
        return None  # the package already warned at import
    except ImportError as error:
        return _refuse(f"tpmp_kernels._C cannot be loaded ({error})")
    if module.ABI != ABI:
        return _refuse(f"tpmp_kernels._C is stale: expected ABI {ABI!r}, got {module.ABI!r}")
    return module


def _refuse(reason: str) -> None:
    text = f"{reason}; run `pip install -e .` again to rebuild it"
    if env.extension_required():
        raise ImportError(text)
    warnings.warn(f"{text}; ranks fall back to torch.distributed", stacklevel=3)


C = load()
