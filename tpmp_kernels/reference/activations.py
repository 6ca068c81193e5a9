"""Activations by name, and the derivative that autograd gives: the oracle for hand-written ones."""

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "relu2": lambda z: F.relu(z).square(),
}
GATES = ("silu", "gelu", "gelu_tanh")


def activate(z: Tensor, activation: str | None) -> Tensor:
    """act(z), elementwise; None is the identity."""
    return z if activation is None else ACTIVATIONS[activation](z)


def activation_derivative(z: Tensor, activation: str | None) -> Tensor:
    """act'(z), elementwise, from autograd: the oracle for hand-written derivatives."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        (derivative,) = torch.autograd.grad(activate(leaf, activation).sum(), leaf)
    return derivative
