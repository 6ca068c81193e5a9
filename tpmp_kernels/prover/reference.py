"""The unsharded step, recorded once on each host, and what its own rounding is at each site."""

import math
import os
import socket
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tpmp_kernels.prover.bounds import Bounds, Noise
from tpmp_kernels.prover.probes import Observer, Probes
from tpmp_kernels.prover.sites import LOSS, OPTIMIZER, PASSES, WHOLE_STEP, Site, of_parameter
from tpmp_kernels.prover.subject import Subject, Whole
from tpmp_kernels.prover.tape import Tape, can_be_shared

_WAYS = 4  # gradients are moved one way each, of which another may move an update further


@dataclass(frozen=True)
class Reference:
    """called: the modules that ran. owners: every name of a parameter -> the first of those it has."""

    tape: Tape
    bounds: Bounds
    called: frozenset[str]
    owners: dict[str, str]

    def order(self, site: Site) -> tuple[int, int, float]:
        """Sorts sites by execution: by pass, in it by microbatch, in that as the reference did."""
        entry = self.tape.index.get(site)
        order: float = entry.order if entry else -1
        if site.pass_ == "backward" and site.parameter is not None:  # recorded when all were there
            order = self._left.get((site.microbatch, site.module), order) + 0.5
        return PASSES.index(site.pass_), site.microbatch, order

    @cached_property
    def uses(self) -> Counter[str]:
        """How many names the parameter of that first name has."""
        return Counter(self.owners.values())

    @cached_property
    def _left(self) -> dict[tuple[int, str], int]:
        """When the backward of a module was through, by microbatch and module."""
        sites = (site for site in self.tape.sites("backward") if site.parameter is None)
        return {(site.microbatch, site.module): self.tape.index[site].order for site in sites}


class _Recorder:
    def __init__(self, tape: Tape):
        self.tape = tape

    def seen(self, site: Site, x: Tensor) -> None:
        self.tape.put(site, x)


def share(subject: Subject) -> Reference:
    """The reference, run by one rank of each host and mapped by the others. Collective over all ranks."""
    host, local = socket.gethostname(), int(os.environ.get("LOCAL_RANK", dist.get_rank()))
    leads = local == 0 or not can_be_shared()
    own = record(subject) if leads else None
    mine = (host, own.tape.path, own.tape.index, own.bounds, own.called, own.owners) if local == 0 else None
    every: list = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    if leads:
        return own
    _, path, index, bounds, called, owners = next(each for each in every if each is not None and each[0] == host)
    return Reference(Tape(path, index), bounds, called, owners)


def record(subject: Subject) -> Reference:
    """Run the step in fp64 on the tape, then in the judged dtype from the tape to see how it rounds."""
    tape = Tape()
    whole = subject.whole(torch.float64)
    owners = _owners(whole.module)
    called = _run(whole, _Recorder(tape), subject.seed)
    bounds = Bounds(subject.dtype, _terms(whole))
    noise = Noise(tape, bounds)
    _run(subject.whole(subject.dtype), noise, subject.seed)
    _travelled(subject.whole(torch.float64), noise)
    for name, owner in owners.items():
        _name_again(name, owner, tape, bounds)
    return Reference(tape, bounds, frozenset(called), owners)


def _run(whole: Whole, observer: Observer, seed: int) -> set[str]:
    """One step, shown to the observer, which may put other tensors in place; returns the names of modules called."""
    module = whole.module
    probes = Probes(observer, gradients=True, seed=seed)
    probes.attach(module)
    parameters = dict(module.named_parameters())
    for name, parameter in parameters.items():
        parameter.data = _through(observer, of_parameter("weights", name), parameter.data)
    totals: dict[str, Tensor] = {}
    for m, (x, target) in enumerate(zip(whole.inputs, whole.targets, strict=True)):
        probes.microbatch = m
        loss = whole.loss(whole.forward(x.clone().requires_grad_(x.is_floating_point()), m), target)
        observer.seen(Site("forward", m, LOSS, 0, "out"), loss)
        loss.backward(torch.full_like(loss, whole.loss_scale))
        for name, parameter in parameters.items():
            grad, parameter.grad = parameter.grad, None
            if grad is not None:
                observer.seen(of_parameter("backward", name, m), grad)
                totals[name] = grad if name not in totals else totals[name] + grad
    squares = [total.double().square().sum() for total in totals.values()]
    norm = torch.stack(squares).sum().sqrt() if squares else torch.zeros(())
    observer.seen(Site("gradients", WHOLE_STEP, OPTIMIZER, 0, "norm"), norm)
    for name, total in totals.items():
        parameters[name].grad = _through(observer, of_parameter("gradients", name), total)
    whole.update()
    for name, parameter in parameters.items():
        observer.seen(of_parameter("update", name), parameter)
    return probes.called


def _through(observer: Observer, site: Site, x: Tensor) -> Tensor:
    other = observer.seen(site, x)
    return x if other is None else other.to(x.dtype)


@torch.no_grad()
def _travelled(whole: Whole, noise: Noise) -> None:
    """Bound what the optimizer makes of gradients that are off by as much as they may be."""
    bounds, tape = noise.bounds, noise.tape
    for name, parameter in whole.module.named_parameters():
        total = tape.get(of_parameter("gradients", name))
        if total is not None:
            bound = bounds.step(of_parameter("gradients", name))
            parameter.grad = total + bound * noise.signs(total)
    whole.update()
    for name, parameter in whole.module.named_parameters():
        site = of_parameter("update", name)
        moved = float((parameter - tape.get(site)).abs().max()) if parameter.numel() else 0.0
        bounds.travelled[site] = _WAYS * moved + bounds.replay(site)


def _name_again(name: str, owner: str, tape: Tape, bounds: Bounds) -> None:
    """Let a tied parameter be found by its other name."""
    if name == owner:
        return
    for site in [site for site in tape.index if site.parameter == owner]:
        other = of_parameter(site.pass_, name, site.microbatch)
        tape.alias(other, site)
        bounds.alias(other, site)


def _owners(module: nn.Module) -> dict[str, str]:
    first = {id(parameter): name for name, parameter in module.named_parameters()}
    return {name: first[id(p)] for name, p in module.named_parameters(remove_duplicate=False)}


def _terms(whole: Whole) -> int:
    """The longest sum: over a dimension of a parameter, or over the tokens of a microbatch."""
    sizes = [size for parameter in whole.module.parameters() for size in parameter.shape]
    tokens = [math.prod(x.shape[:-1] if x.is_floating_point() else x.shape) for x in whole.inputs]
    return max([1, *sizes, *tokens])
