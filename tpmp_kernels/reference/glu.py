"""The gate of a gated linear unit."""

from torch import Tensor

from tpmp_kernels.reference.activations import activate


def glu(gate: Tensor, up: Tensor, *, activation: str = "silu") -> Tensor:
    """act(gate) * up, elementwise."""
    return activate(gate, activation) * up
