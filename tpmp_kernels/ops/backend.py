"""Which implementation an op runs: `triton` for CUDA tensors, `cpu` for CPU tensors, `reference` when asked for.

    with use_backend("reference"):      # or TPMP_OPS=reference in the environment
        y = ops.linear(x, weight)

`cpu` also runs on CUDA tensors, as plain torch; `triton` runs on CPU tensors only in Triton's interpreter.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tpmp_kernels import env

BACKENDS = ("triton", "cpu", "reference")

# One value for the process. A context variable would be unseen by autograd's device threads, and torch.compile cannot
# trace one; it does guard on a module's global, so that a compiled function follows the switch.
_forced: str | None = None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op in this process with one backend: "triton", "cpu" or "reference"."""
    global _forced
    previous, _forced = _forced, _known(name, "use_backend")
    try:
        yield
    finally:
        _forced = previous


def choose(x: Tensor) -> str:
    """The backend for an op whose first tensor is x: the context's, the environment's, else the device's.

    fp64 is left to plain torch ("cpu"), which is exact enough to carry a proof and has fp64 everywhere.
    """
    name = _forced or env.ops()
    if name is None:
        name = "triton" if x.is_cuda else "cpu"
    if name == "triton" and x.dtype is torch.float64:
        return "cpu"
    if name == "triton" and not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"ops: backend triton needs CUDA tensors, got {x.device}; move them, use backend cpu, or set "
            "TRITON_INTERPRET=1 before importing triton"
        )
    return _known(name, "TPMP_OPS")


def _known(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{where}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name
