"""Models assembled from the rooms below, and the plain-torch references they are proved against.

Names load on first use: a config can be read and checked without importing torch.
"""

import importlib

_NAMES = {
    "Decoder": "decoder",
    "ModelConfig": "config",
    "ReferenceDecoder": "reference",
    "initialize": "weights",
}
__all__ = ["Decoder", "ModelConfig", "ReferenceDecoder", "initialize"]


def __getattr__(name: str):
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
