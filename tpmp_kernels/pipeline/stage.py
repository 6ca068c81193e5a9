"""One pipeline stage on this rank: a module, and what it must remember of each microbatch between F and B."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Stage:
    """Runs a module forward and backward, a microbatch at a time.

    `loss(output, target) -> scalar` makes this the last stage: its forward computes the loss (a sum over tokens), its
    backward starts from `loss_scale`, so that the gradients of a step add up to those of loss_scale * total loss.
    Under torch.no_grad nothing is remembered and no backward follows. numbered: the module is called with step= and
    microbatch= as well, of which masks of dropout are a function.
    """

    def __init__(
        self, module: nn.Module, *, loss: Callable[[Tensor, Tensor], Tensor] | None = None, numbered: bool = False
    ):
        self.module, self.loss, self.numbered = module, loss, numbered
        self._live: dict[int, tuple[Tensor, Tensor]] = {}

    def forward(self, microbatch: int, x: Tensor, target: Tensor | None, step: int | None = None) -> Tensor:
        """x: tokens or hidden states; returns hidden states, or the loss in the last stage, detached."""
        if torch.is_grad_enabled() and x.is_floating_point():
            x.requires_grad_()
        output = self.module(x, step=step, microbatch=microbatch) if self.numbered else self.module(x)
        if self.loss is not None:
            output = self.loss(output, target)
        if torch.is_grad_enabled():
            self._live[microbatch] = (x, output)
        return output.detach()

    def backward(self, microbatch: int, grad: Tensor | None, loss_scale: float) -> Tensor | None:
        """grad: of this stage's output, None in the last stage; returns the gradient of its input, if it has one."""
        x, output = self._live.pop(microbatch)
        if self.loss is not None:
            grad = torch.full_like(output, loss_scale)
        torch.autograd.backward(output, grad)
        return x.grad

    @property
    def live(self) -> int:
        """Microbatches whose activations this stage holds now."""
        return len(self._live)
