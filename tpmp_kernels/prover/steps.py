"""The parallel step: once as it is, with every result of a module looked at; once with every module fed from the tape.

In both the same runtime runs the same schedule over real pipeline transfers and collectives. In the replay the code of
the model runs too, with the tensors between its modules put in their places: what is compared at a site holds the
rounding and the mistakes of the code since the sites before it, and of no other.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tpmp_kernels.pipeline.stage import Stage
from tpmp_kernels.prover.judge import Judge
from tpmp_kernels.prover.layouts import Layout
from tpmp_kernels.prover.probes import SLOTS, Probes
from tpmp_kernels.prover.reference import Reference
from tpmp_kernels.prover.sites import LOSS, OPTIMIZER, WHOLE_STEP, Site, of_parameter
from tpmp_kernels.prover.subject import Part


def weights(part: Part, judge: Judge) -> None:
    """Compare what the step starts from."""
    for name, parameter in part.parameters().items():
        judge.seen(of_parameter("weights", name), parameter)


def run(part: Part, judge: Judge, seed: int) -> set[str]:
    """The whole step; returns the names of the modules that were called."""
    replays = judge.run == "replay"
    probes = Probes(judge, gradients=replays, slots=SLOTS if replays else ("out",), seed=seed)
    for number, stage in part.stages.items():
        judge.modules.update(stage.module.named_modules())
        borders = ("in",) * (number == 0) + ("out",) * (number == part.last)
        probes.attach(stage.module, root=borders)
        _watch(stage, probes, judge)
    part.step(lambda norm: _before_update(part, judge, norm))
    for name, parameter in part.parameters().items():
        judge.seen(of_parameter("update", name), parameter)
    return probes.called


def _watch(stage: Stage, probes: Probes, judge: Judge) -> None:
    forward = stage.forward

    def watched_forward(microbatch: int, *args, **options):
        probes.microbatch = microbatch
        output = forward(microbatch, *args, **options)
        if stage.loss is not None:
            judge.seen(Site("forward", microbatch, LOSS, 0, "out"), output)
        return output

    stage.forward = watched_forward
    if judge.run == "replay":
        _Apart(stage, judge)


class _Apart:
    """Stands around a stage's backward, in one go or in two: the gradients of the parameters that are one microbatch's
    own are looked at before they are added to those of the others."""

    def __init__(self, stage: Stage, judge: Judge):
        self.stage, self.judge = stage, judge
        self.whole, self.input, self.weight = stage.backward, stage.backward_input, stage.backward_weight
        self.of_input: dict[int, dict[str, Tensor]] = {}  # by microbatch, between B and W
        stage.backward, stage.backward_input, stage.backward_weight = self.bw, self.b, self.w

    def bw(self, microbatch: int, *args):
        result, own = self._own(self.whole, microbatch, *args)
        self._judge(microbatch, own)
        return result

    def b(self, microbatch: int, *args):
        self.stage.backward = self.whole  # which B is made of
        result, self.of_input[microbatch] = self._own(self.input, microbatch, *args)
        self.stage.backward = self.bw
        return result

    def w(self, microbatch: int) -> None:
        _, own = self._own(self.weight, microbatch)
        first = self.of_input.pop(microbatch)
        self._judge(microbatch, {name: grad + first[name] if name in first else grad for name, grad in own.items()})

    def _own(self, call: Callable, microbatch: int, *args) -> tuple[Any, dict[str, Tensor]]:
        """What the call returns, and what it adds to the gradients."""
        parameters = _untied(self.stage, self.judge)
        held = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
        for name in held:
            parameters[name].grad.zero_()
        result = call(microbatch, *args)
        own = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
        for name in held:
            parameters[name].grad.add_(held[name])
        return result, own

    def _judge(self, microbatch: int, own: dict[str, Tensor]) -> None:
        for name, grad in own.items():
            self.judge.seen(of_parameter("backward", name, microbatch), grad)


def _untied(stage: Stage, judge: Judge) -> dict[str, torch.nn.Parameter]:
    """The parameters of which this module has all the uses that the reference has."""
    reference = judge.reference
    names: dict[int, list[str]] = {}
    found = dict(stage.module.named_parameters(remove_duplicate=False))
    for name, parameter in found.items():
        names.setdefault(id(parameter), []).append(name)
    return {
        each[0]: found[each[0]]
        for each in names.values()
        if len(each) == reference.uses[reference.owners.get(each[0])] and each[0] not in judge.split
    }


@torch.no_grad()
def _before_update(part: Part, judge: Judge, norm: float | None) -> None:
    if norm is not None:
        judge.seen(Site("gradients", WHOLE_STEP, OPTIMIZER, 0, "norm"), torch.tensor(norm, dtype=torch.float64))
    reference = judge.reference
    for name, parameter in part.parameters().items():
        grad, site = parameter.grad, of_parameter("gradients", name)
        if grad is not None:
            other = judge.seen(site, grad)
            if other is not None:
                grad.copy_(other)  # the optimizer is replayed on the reference's gradients
        elif site in reference.tape and reference.uses[reference.owners[name]] == 1:  # a tied one may have that of both
            judge.missing(site)


def unclear(part: Part, reference: Reference) -> frozenset[str]:
    """Modules that the reference calls several times in a microbatch, and that stand in several stages: which of its
    calls a stage makes is not to be told. Collective over all ranks."""
    counts = _stages_with(part, lambda module: module.named_modules())
    again = {site.module for site in reference.tape.sites("forward") if site.call > 0}
    return frozenset(name for name in again if counts[name] > 1)


def split(part: Part, reference: Reference) -> frozenset[str]:
    """Names of tied parameters that stand in several stages: each of these has a part of the gradient until the step
    brings them together. Collective over all ranks."""
    counts = _stages_with(part, lambda module: module.named_parameters(remove_duplicate=False))
    tied = (name for name, owner in reference.owners.items() if reference.uses[owner] > 1)
    return frozenset(name for name in tied if counts[name] > 1)


def _stages_with(part: Part, named: Callable[[nn.Module], Iterable[tuple[str, object]]]) -> Counter[str]:
    """In how many stages each name stands. Collective over all ranks."""
    mine = {number: [name for name, _ in named(stage.module)] for number, stage in part.stages.items()}
    stages = {number: names for theirs in _of_all_ranks(mine) for number, names in theirs.items()}
    return Counter(name for names in stages.values() for name in names)


def replicas(part: Part, reference: Reference, layouts: dict[str, Layout]) -> dict[str, list[int]]:
    """Of each parameter of which several ranks hold the same part, those of one stage or of two that hold a tied one,
    the ranks whose bits differ from the first's. layouts: of this rank's parts, by name. Collective over all ranks."""
    mine, known = [], set()
    for name, parameter in part.parameters().items():
        if name in layouts and id(parameter) not in known:
            known.add(id(parameter))
            layout = layouts[name]
            held = (reference.owners[name], layout.dim, layout.start, layout.size)
            mine.append((held, hashlib.blake2b(_bytes(layout.real(parameter)), digest_size=16).hexdigest()))
    first: dict[tuple, str] = {}
    drifted: dict[str, list[int]] = {}
    for rank, theirs in enumerate(_of_all_ranks(mine)):
        for held, digest in theirs:
            if held in first:
                drifted.setdefault(held[0], [])
            if first.setdefault(held, digest) != digest:
                drifted[held[0]].append(rank)
    return drifted


def _of_all_ranks(mine: Any) -> list:
    every: list = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    return every


def _bytes(parameter: torch.Tensor) -> memoryview:
    return memoryview(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
