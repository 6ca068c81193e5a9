"""Modules that no hook sees, each called by itself: column layers that read one input together, for the most part.

What the code around them computed was compared as one piece. Where that was wrong, this says whether one of them is.
"""

from collections.abc import Container

import torch
from torch import Tensor, nn

from tpmp_kernels.prover.judge import Judge
from tpmp_kernels.prover.sites import Site, of_parameter
from tpmp_kernels.prover.subject import Part
from tpmp_kernels.tensor_parallel import RowParallelLinear, replicas_of


def alone(part: Part, judge: Judge, called: Container[str], microbatches: int) -> None:
    """Feed each module with parameters of its own that the reference called, but the parallel step did not, the
    reference's input and gradient, and compare what it makes of them. Collective."""
    for stage in part.stages.values():
        for name, module in stage.module.named_modules():
            parameters = dict(module.named_parameters(recurse=False))
            if name in called or name not in judge.reference.called or not parameters:
                continue
            judge.modules[name] = module
            for microbatch in range(microbatches):
                _call(name, module, parameters, judge, microbatch)


def _call(name: str, module: nn.Module, parameters: dict[str, Tensor], judge: Judge, microbatch: int) -> None:
    whole = judge.reference.tape.get(Site("forward", microbatch, name, 0, "in.0"))
    if whole is None:
        return
    x = _given(module, whole, judge)
    if x.is_floating_point():
        x = x.to(next(iter(parameters.values())).dtype).requires_grad_()
    site = Site("forward", microbatch, name, 0, "out")
    y = module(x)
    if not isinstance(y, Tensor) or site not in judge.reference.tape:
        return
    judge.seen(site, y.detach())
    upstream = judge.reference.tape.get(site._replace(pass_="backward"))
    if site not in judge.checks or upstream is None:
        return
    layout = judge.checks[site].layout
    grad = torch.zeros_like(y)
    layout.real(grad).copy_(layout.cut(upstream) * _share(max(map(replicas_of, parameters.values())), judge.rank))
    y.backward(grad)
    if x.grad is not None:
        judge.seen(Site("backward", microbatch, name, 0, "in.0"), x.grad)
    for slot, parameter in parameters.items():
        if parameter.grad is not None:
            full = f"{name}.{slot}" if name else slot
            if judge.reference.uses[judge.reference.owners.get(full)] == 1:
                judge.seen(of_parameter("backward", full, microbatch), parameter.grad)
            parameter.grad = None


def _share(ranks: int, rank: int) -> float:
    """Of a gradient, where `ranks` neighbours hold the same columns: each a part of its own size, as readers of their
    own would leave it to them, and never the same, so that what they make of it is known for partial sums."""
    return 2 * (rank % ranks + 1) / (ranks * (ranks + 1))


def _given(module: nn.Module, whole: Tensor, judge: Judge) -> Tensor:
    """The input as this kind of layer takes it, in memory of its own."""
    if isinstance(module, RowParallelLinear) and module.input_is_parallel:
        return whole.chunk(judge.ranks, dim=-1)[judge.rank].clone()
    if getattr(module, "sequence_parallel", False) and whole.is_floating_point():  # tokens are whole everywhere
        return whole.reshape(-1, whole.shape[-1]).chunk(judge.ranks)[judge.rank].clone()
    return whole.clone()
