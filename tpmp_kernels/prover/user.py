"""A module of one's own as a subject: how it is built whole, how it is made parallel, and a step around both."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tpmp_kernels.comm.communicator import Communicator
from tpmp_kernels.pipeline.runtime import Runtime
from tpmp_kernels.pipeline.schedule import Schedule
from tpmp_kernels.pipeline.schedules import build
from tpmp_kernels.pipeline.stage import Stage
from tpmp_kernels.prover.subject import Part, Subject, Whole, nudge
from tpmp_kernels.tensor_parallel import parallelize
from tpmp_kernels.tensor_parallel.plans import Plan
from tpmp_kernels.training.layout import Layout

adamw = partial(torch.optim.AdamW, lr=1e-3)


def mean_loss(output: Tensor, target: Tensor) -> Tensor:
    """Cross entropy with ids, mean squared error with anything else."""
    if target.is_floating_point():
        return F.mse_loss(output, target)
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


@dataclass(frozen=True)
class UserModule(Subject):
    """The arguments of `verify`."""

    model_fn: Callable[[], nn.Module]
    batch: tuple[Tensor, Tensor]
    plan: Plan | Callable[..., nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    parallel_loss: Callable[[Tensor, Tensor, Communicator], Tensor] | None
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    reduce_gradients: Callable[[nn.Module, Communicator], None]
    tp: int
    pp: int
    schedule: str
    microbatches: int
    dtype: torch.dtype
    seed: int
    timeout: float

    @property
    def title(self) -> str:
        name = getattr(self.model_fn, "__qualname__", type(self.model_fn).__name__)
        schedule = f", {self.schedule}" if self.pp > 1 else ""
        return (
            f"{name}: tp={self.tp} x pp={self.pp}{schedule}, {self.microbatches} microbatches of "
            f"{list(self._chunks(self.dtype)[0][0].shape)}, {str(self.dtype).removeprefix('torch.')}"
        )

    @property
    def tokens(self) -> int:
        return self.batch[1].numel() // self.microbatches

    def whole(self, dtype: torch.dtype) -> Whole:
        module = self._module(dtype)
        optimizer = self.optimizer(module.parameters())
        chunks = self._chunks(dtype)
        return Whole(module, lambda x, _: module(x), *chunks, self.loss, 1 / self.microbatches, optimizer.step)

    def part(self, where: Layout) -> Part:
        schedule = self.built_schedule()
        last = len(schedule.placement) - 1
        stages = {
            number: Stage(self._stage(where, number, last + 1), loss=self._loss(where.tp) if number == last else None)
            for number, rank in enumerate(schedule.placement)
            if rank == where.pp.rank
        }
        shape = self._border(where, schedule) if last else ()
        runtime = Runtime(schedule, stages, where.pp, shape=shape, dtype=self.dtype, tensor_parallel=where.tp)
        parameters = {id(p): p for stage in stages.values() for p in stage.module.parameters()}
        optimizer = self.optimizer(list(parameters.values()))
        inputs, targets = self._chunks(self.dtype)

        def step(before: Callable[[float | None], None]) -> None:
            runtime.step([x.clone() for x in inputs], targets, loss_scale=1 / self.microbatches)
            for stage in stages.values():
                self.reduce_gradients(stage.module, where.tp)
            before(None)
            optimizer.step()

        return Part(stages, last, step)

    def built_schedule(self) -> Schedule:
        return build(self.schedule, ranks=self.pp, microbatches=self.microbatches)

    def _chunks(self, dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
        """Inputs and targets by microbatch."""
        return [
            (tensor.to(dtype) if tensor.is_floating_point() else tensor).chunk(self.microbatches)
            for tensor in self.batch
        ]

    def _module(self, dtype: torch.dtype) -> nn.Module:
        torch.manual_seed(self.seed)
        module = self.model_fn()
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                size = float(parameter.double().square().mean().sqrt()) if parameter.numel() else 0.0
                # Not so far that a model's scale changes: a tenth of what it holds.
                parameter.add_(nudge(name, parameter.shape, 0.1 * size if size > 0 else 0.1).to(parameter.dtype))
        # Not .to(dtype), which would make complex buffers real.
        return module._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)

    def _stage(self, where: Layout, stage: int, stages: int) -> nn.Module:
        module = self._module(self.dtype)
        if not callable(self.plan):
            return parallelize(module, where.mesh, self.plan, src_data_rank=None)
        numbers = {"stage": stage, "stages": stages} if stages > 1 else {}
        made = self.plan(module, where.tp, **numbers)
        if not isinstance(made, nn.Module):
            raise TypeError(f"verify: plan must return the module that it made parallel, got {type(made).__name__}")
        return made

    def _loss(self, comm: Communicator) -> Callable[[Tensor, Tensor], Tensor]:
        return self.loss if self.parallel_loss is None else partial(self.parallel_loss, comm=comm)

    @torch.no_grad()
    def _border(self, where: Layout, schedule: Schedule) -> tuple[int, ...]:
        """The shape of what goes from stage to stage, from one forward of modules that are then thrown away."""
        x, shapes, stages = self._chunks(self.dtype)[0][0], set(), len(schedule.placement)
        for number, holder in enumerate(schedule.placement[:-1]):
            told: list = [None]
            if holder == where.pp.rank:
                told[0] = tuple(self._stage(where, number, stages)(x).shape)
            group = where.mesh.get_group("pp")
            dist.broadcast_object_list(told, src=dist.get_global_rank(group, holder), group=group)
            shapes.add(told[0])
            x = torch.zeros(told[0], dtype=self.dtype)
        if len(shapes) > 1:
            raise ValueError(f"verify: stages hand on tensors of different shapes, {sorted(shapes)}; make them alike")
        return shapes.pop()
