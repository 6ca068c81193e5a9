"""One pipeline stage on this rank: a module, and what it must remember of each microbatch until its weight gradient."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.checkpoint import checkpoint as recomputed

from tpmp_kernels import ops


def _compiled(module: nn.Module, compile: bool | str) -> Callable[..., Tensor]:
    if not compile:
        return module
    return torch.compile(module, backend=compile) if isinstance(compile, str) else torch.compile(module)


class Stage:
    """Runs a module forward and backward, a microbatch at a time, the backward in one go (BW) or in two (B, then W).

    `loss(output, target) -> scalar` makes this the last stage: its forward computes the loss (a sum over tokens), its
    backward starts from `loss_scale`, so that the gradients of a step add up to those of loss_scale * total loss.
    Under torch.no_grad nothing is remembered and no backward follows. numbered: the module is called with step= and
    microbatch= as well, of which masks of dropout are a function.

    compile: through torch.compile, or a backend of it by name. recompute: keep the input alone between forward and
    backward, which then runs the forward again. Both go with W apart.

    W holds the weight gradients that our ops make (ops.linear, gated_linear, mlp, gated_mlp) for weights with a
    `main_grad`; fp32 and fp64 parameters get one here before the first forward. All other gradients, and those of any
    other module, are accumulated in B: `whole` names the matrices among them.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        numbered: bool = False,
        compile: bool | str = False,
        recompute: bool = False,
    ):
        self.module, self.loss, self.numbered = module, loss, numbered
        self._call = _compiled(module, compile)
        self._recompute = recompute
        self._parameters: list[nn.Parameter] | None = None  # once their main_grads are attached
        self._live: dict[int, tuple[Tensor, GradientEdge, Tensor | None]] = {}
        self._later: dict[int, ops.Later] = {}
        self._split: set[nn.Parameter] = set()

    def forward(self, microbatch: int, x: Tensor, target: Tensor | None, step: int | None = None) -> Tensor:
        """x: tokens, or hidden states that require grad. Returns hidden states, or at last the loss, detached."""
        run = partial(self._run, target=target, step=step, microbatch=microbatch)
        if not torch.is_grad_enabled():
            return run(x)
        self._attach()  # the ops look for a main_grad in forward
        output = recomputed(run, x, use_reentrant=False) if self._recompute else run(x)
        # The edge, not the output: its memory is free once it was sent.
        loss = None if self.loss is None else output.detach()
        self._live[microbatch] = x, get_gradient_edge(output), loss
        return output.detach()

    def _run(self, x: Tensor, *, target: Tensor | None, step: int | None, microbatch: int) -> Tensor:
        output = self._call(x, step=step, microbatch=microbatch) if self.numbered else self._call(x)
        return output if self.loss is None else self.loss(output, target)

    def backward(self, microbatch: int, grad: Tensor | None, loss_scale: float) -> Tensor | None:
        """BW. grad: of this stage's output, None in the last stage. Returns that of its input, if it takes one."""
        x, output, loss = self._live.pop(microbatch)
        torch.autograd.backward(output, grad if loss is None else torch.full_like(loss, loss_scale))
        return x.grad

    def backward_input(self, microbatch: int, grad: Tensor | None, loss_scale: float) -> Tensor | None:
        """B: the same but for the weight gradients of the ops, which are left to `backward_weight`."""
        with ops.split_backward(self._parameters) as later:
            grad = self.backward(microbatch, grad, loss_scale)
        self._later[microbatch] = later
        self._split |= later.parameters
        return grad

    def backward_weight(self, microbatch: int) -> None:
        """W: add what B has left."""
        self._later.pop(microbatch).run()

    def forget(self) -> None:
        """Drop what is remembered, after a step that failed."""
        self._live.clear()
        self._later.clear()

    @property
    def live(self) -> int:
        """Microbatches between forward and weight gradient."""
        return len(self._live) + len(self._later)

    @property
    def whole(self) -> list[str]:
        """Names of the matrices whose gradient was complete in B so far: they have no part in W."""
        named = self.module.named_parameters()
        return [name for name, p in named if p.requires_grad and p.dim() > 1 and p not in self._split]

    def _attach(self) -> None:
        """Give the parameters that can have a main_grad one."""
        if self._parameters is None:
            self._parameters = [p for p in self.module.parameters() if p.requires_grad]
            fresh = [p for p in self._parameters if p.grad is None]
            wide = (torch.float32, torch.float64)
            ops.attach_main_grad(
                p for p in self._parameters if p.dtype in wide and not is_traceable_wrapper_subclass(p)
            )
            for parameter in fresh:  # as behind zero_grad: optimizers skip what no backward reaches
                parameter.grad = None
