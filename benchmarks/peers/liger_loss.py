"""Liger-Kernel's fused linear cross entropy, where it is installed: `make peers`."""

import importlib.util
from collections.abc import Callable


def liger_loss() -> Callable | str:
    """A call on (x [T, D], weight [V, D], target [T]) that returns the mean loss, or the reason why there is none."""
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger_kernel is not installed"
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return lambda x, weight, target: LigerFusedLinearCrossEntropyFunction.apply(x, weight, target)[0]
