"""The parallel step: once as it is, with every result of a module looked at; once with every module fed from the tape.

In both the same runtime runs the same schedule over real pipeline transfers and collectives. In the replay the code of
the model runs too, with the tensors between its modules put in their places: what is compared at a site holds the
rounding and the mistakes of the code since the sites before it, and of no other.
"""

import hashlib
from collections.abc import Callable

import torch
import torch.distributed as dist

from tpmp_kernels.pipeline.stage import Stage
from tpmp_kernels.prover.judge import Judge
from tpmp_kernels.prover.probes import SLOTS, Probes
from tpmp_kernels.prover.sites import LOSS, OPTIMIZER, WHOLE_STEP, Site, of_parameter
from tpmp_kernels.prover.subject import Part
from tpmp_kernels.training.layout import Layout


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
    forward, backward = stage.forward, stage.backward

    def watched_forward(microbatch: int, *args):
        probes.microbatch = microbatch
        output = forward(microbatch, *args)
        if stage.loss is not None:
            judge.seen(Site("forward", microbatch, LOSS, 0, "out"), output)
        return output

    stage.forward = watched_forward
    if judge.run == "replay":
        stage.backward = lambda microbatch, *args: _one_microbatch(stage, judge, microbatch, backward, args)


def _one_microbatch(stage: Stage, judge: Judge, microbatch: int, backward: Callable, args: tuple):
    """Backward of a microbatch, with the gradients of the parameters that are its own looked at before they are added
    to those of the others."""
    parameters = _untied(stage, judge)
    held = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    for name in held:
        parameters[name].grad.zero_()
    result = backward(microbatch, *args)
    for name, parameter in parameters.items():
        if parameter.grad is None:
            continue
        judge.seen(of_parameter("backward", name, microbatch), parameter.grad)
        if name in held:
            parameter.grad.add_(held[name])
    return result


def _untied(stage: Stage, judge: Judge) -> dict[str, torch.nn.Parameter]:
    """The parameters of which this module has all the uses that the reference has: of a tied one that stands in several
    stages or tensors, each has a part of the gradient until the step brings them together."""
    owners = judge.reference.owners
    names: dict[int, list[str]] = {}
    found = dict(stage.module.named_parameters(remove_duplicate=False))
    for name, parameter in found.items():
        names.setdefault(id(parameter), []).append(name)
    every = {first: sum(owner == first for owner in owners.values()) for first in owners.values()}
    return {each[0]: found[each[0]] for each in names.values() if len(each) == every.get(owners.get(each[0]), 0)}


@torch.no_grad()
def _before_update(part: Part, judge: Judge, norm: float | None) -> None:
    if norm is not None:
        judge.seen(Site("gradients", WHOLE_STEP, OPTIMIZER, 0, "norm"), torch.tensor(norm, dtype=torch.float64))
    parameters, owners = part.parameters(), judge.reference.owners
    names = [name for name in parameters if name in owners]
    for name in names:
        grad, site = parameters[name].grad, of_parameter("gradients", name)
        if grad is not None:
            other = judge.seen(site, grad)
            if other is not None:
                grad.copy_(other)  # the optimizer is replayed on the reference's gradients
        elif site in judge.reference.tape and not _has_twin(name, parameters, owners):
            judge.missing(site)


def _has_twin(name: str, parameters: dict, owners: dict[str, str]) -> bool:
    """Whether the reference ties it to another: then that one may have the gradient of both."""
    return sum(owner == owners[name] for owner in owners.values()) > 1


def replicas(part: Part, where: Layout, layouts: dict[str, int]) -> dict[str, list[int]]:
    """Ranks of the tensor-parallel group whose bits differ from those of the first that holds the same part of a
    parameter. layouts: the number of the part that this rank holds, by name. Collective."""
    mine = {
        name: (layouts[name], hashlib.blake2b(_bytes(parameter), digest_size=16).hexdigest())
        for name, parameter in part.parameters().items()
        if name in layouts
    }
    every: list = [None] * where.tp.size
    dist.all_gather_object(every, mine, group=where.mesh.get_group("tp"))
    first: dict[tuple[str, int], str] = {}
    drifted: dict[str, list[int]] = {}
    for rank, theirs in enumerate(every):
        for name, (block, digest) in theirs.items():
            if first.setdefault((name, block), digest) != digest:
                drifted.setdefault(name, []).append(rank)
    return drifted


def _bytes(parameter: torch.Tensor) -> memoryview:
    return memoryview(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
