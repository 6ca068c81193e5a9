"""Probes: hooks on every module that show an observer each tensor that goes in or out, and each gradient on its way
back, and that put in its place what the observer gives for it.

A gradient is that of one edge of the graph: of this module's input, without what other readers of the same tensor add.
So each module's own backward is seen, in the reference and in the parallel model alike.
"""

import hashlib
from collections import Counter
from collections.abc import Container
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from tpmp_kernels.prover.sites import Site

SLOTS = ("in", "out")


class Observer(Protocol):
    def seen(self, site: Site, x: Tensor) -> Tensor | None:
        """Look at `x`; returns what is to take its place (it is copied), or None for x itself."""


class Probes:
    """gradients: show gradients and put tensors in place; otherwise values are shown and the graph stays as it is.

    slots: which of a module's tensors. Under recomputation in backward nothing is shown.
    """

    def __init__(self, observer: Observer, *, gradients: bool, slots: Container[str] = SLOTS, seed: int = 0):
        self.observer, self.gradients, self.slots, self.seed = observer, gradients, slots, seed
        self.microbatch = 0
        self.called: set[str] = set()
        self._calls: Counter[tuple[int, str]] = Counter()
        self._open: list[tuple[str, int]] = []

    def attach(self, module: nn.Module, *, root: Container[str] = SLOTS) -> None:
        """root: which tensors of the root module itself are shown; a pipeline stage's borders are no module's."""
        for name, each in module.named_modules():
            slots = [slot for slot in self.slots if name or slot in root]
            # In front of hooks that change the input's layout, and behind those that change the output's.
            each.register_forward_pre_hook(self._before(name, "in" in slots), prepend=True, with_kwargs=True)
            each.register_forward_hook(self._behind(name, "out" in slots))

    def _before(self, name: str, show: bool):
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]):
            if _in_backward():
                return None
            call = self._calls[self.microbatch, name]
            self._calls[self.microbatch, name] += 1
            self.called.add(name)
            self._open.append((name, call))
            _seed(self.seed, self.microbatch, name, call, "in")
            return self._shown(name, call, "in", (args, kwargs)) if show else None

        return hook

    def _behind(self, name: str, show: bool):
        def hook(module: nn.Module, args: tuple, outputs: Any):
            if _in_backward():
                return None
            opened, call = self._open.pop()
            while opened != name:  # one that raised, and was caught
                opened, call = self._open.pop()
            _seed(self.seed, self.microbatch, name, call, "out")
            return self._shown(name, call, "out", outputs) if show else None

        return hook

    def _shown(self, name: str, call: int, slot: str, tree: Any) -> Any:
        # A module's arguments are (args, kwargs), of which the first part of the path says nothing.
        skip = 1 if slot == "in" else 0

        def show(path: tuple, leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or leaf.is_complex():
                return leaf
            words = [slot, *(str(getattr(key, "idx", getattr(key, "key", key))) for key in path[skip:])]
            return self.show(Site("forward", self.microbatch, name, call, ".".join(words)), leaf)

        return pytree.tree_map_with_path(show, tree)

    def show(self, site: Site, x: Tensor) -> Tensor:
        if isinstance(x, DTensor) or not self.gradients:
            # A DTensor's own layout says what its parts are; it is looked at, and left alone.
            self.observer.seen(site, x.detach().to_local() if isinstance(x, DTensor) else x.detach())
            return x
        if torch.is_grad_enabled() and x.requires_grad:
            return _Probe.apply(x, self.observer, site)
        other = self.observer.seen(site, x.detach())
        return x if other is None else torch.empty_like(x).copy_(other)


class _Probe(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, observer: Observer, site: Site) -> Tensor:
        ctx.observer, ctx.site = observer, site
        other = observer.seen(site, x)
        # A copy: a view from a Function could not be written in place by the code that follows.
        return torch.empty_like(x).copy_(x if other is None else other)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        other = ctx.observer.seen(ctx.site._replace(pass_="backward"), grad)
        return grad if other is None else torch.empty_like(grad).copy_(other), None, None


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _seed(seed: int, microbatch: int, name: str, call: int, end: str) -> None:
    """Masks of stock dropout are a function of where it stands, so that they are the same for every tp and pp where
    what they fall on is whole."""
    digest = hashlib.blake2b(f"{seed} {microbatch} {name} {call} {end}".encode(), digest_size=7).digest()
    torch.default_generator.manual_seed(int.from_bytes(digest))
