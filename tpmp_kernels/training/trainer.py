"""One rank's share of training: its stages of the model, the runtime that executes the schedule, and the optimizer."""

import math
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tpmp_kernels.checkpoint import Placed
from tpmp_kernels.pipeline.measured import exposed_transfer
from tpmp_kernels.pipeline.runtime import Runtime, StepResult
from tpmp_kernels.pipeline.schedule import Schedule
from tpmp_kernels.pipeline.stage import Stage
from tpmp_kernels.tensor_parallel import reduce_partial_gradients
from tpmp_kernels.training.clock import clock_offset
from tpmp_kernels.training.config import Config
from tpmp_kernels.training.data import Corpus
from tpmp_kernels.training.layout import Layout
from tpmp_kernels.training.optimizer import Optimizer
from tpmp_kernels.training.plan import schedule_of
from tpmp_kernels.training.stages import TIED, parts_of

SET_CLOCK_EVERY = 50  # steps; clocks of two hosts part by some 10 us a second


@dataclass(frozen=True)
class StepStats:
    """Of one step, the same on every rank. loss: mean over tokens, nat. seconds: of the slowest rank.

    exposed: share of the step, mean over ranks, blocked in tensor-parallel collectives. bubble: share blocked on stage
    transfers or, at the end of the pipeline, on the slowest rank. transfer: the share of it in which the message was
    under way, so that waiting was for the link and not for a compute. With more ranks than cores all of them contain
    the time in which another rank had the core.
    """

    loss: float
    grad_norm: float
    seconds: float
    exposed: float
    bubble: float
    transfer: float


class Trainer:
    """parts: of the model, by stage. two_copies: whether this rank holds one of the two copies of a tied weight, each
    for a use of its own."""

    def __init__(self, config: Config, layout: Layout, corpus: Corpus, *, device: str = "cpu"):
        self.config, self.layout, self.corpus, self.device = config, layout, corpus, device
        self.dtype = getattr(torch, config.training.dtype)
        schedule = schedule_of(config)
        rank, ends = layout.pp.rank, (schedule.placement[0], schedule.placement[-1])
        self.parts = parts_of(config, schedule.placement, rank, layout.tp, dtype=self.dtype, device=device)
        self.two_copies = config.model.tie_embeddings and ends[0] != ends[1] and rank in ends
        self.other_copy = sum(ends) - rank  # the rank that holds it
        self.optimizer = Optimizer(
            self.parameters(),
            config.optimizer,
            counts_replicas=layout.tp.rank == 0,
            counted_elsewhere={TIED} if self.two_copies and rank == ends[1] else (),
        )
        self.runtime = self._runtime(schedule)
        self.forward_only = self._runtime(schedule.forwards())
        self.names = self._names()
        self.clock: float | None = None  # seconds that make times of this host those of rank 0's
        # Of the last step, by that clock: (start, end) of each step of its program, and of the optimizer.
        self.times: tuple[list[tuple[float, float]], tuple[float, float]] | None = None

    def _names(self) -> dict[str, int]:
        """A number for each parameter of the whole model, the same on every rank."""
        of_ranks: list = [None] * self.layout.world.size
        dist.all_gather_object(of_ranks, sorted(self.parameters()))
        return {name: number for number, name in enumerate(sorted(set().union(*of_ranks)))}

    def parameters(self) -> dict[str, nn.Parameter]:
        """Of all stages of this rank, by their names in the whole model."""
        return {name: p for part in self.parts.values() for name, p in part.named_parameters()}

    def _runtime(self, schedule: Schedule) -> Runtime:
        parallel, training = self.config.parallel, self.config.training
        stages = {
            number: Stage(part, loss=part.loss if part.last else None, numbered=True)
            for number, part in self.parts.items()
        }
        tokens = (training.batch // parallel.microbatches, self.config.data.sequence)
        if parallel.sequence_parallel:
            tokens = (math.prod(tokens) // self.layout.tp.size,)
        return Runtime(
            schedule,
            stages,
            self.layout.pp,
            shape=(*tokens, self.config.model.hidden),
            dtype=self.dtype,
            device=self.device,
            tensor_parallel=self.layout.tp,
        )

    def step(self, step: int) -> StepStats:
        """Train on the batch of `step` (0, 1, ...)."""
        if self.clock is None or step % SET_CLOCK_EVERY == 0:
            self.clock = clock_offset(self.layout.world)
        start, reduced = time.perf_counter(), self.layout.tp.seconds
        result = self._pass(self.runtime, step, "train")
        gradients = {name: main.grad for name, main in self.optimizer.main.items()}
        for part in self.parts.values():
            reduce_partial_gradients(part, self.layout.tp, gradients=gradients)
        exposed = self.layout.tp.seconds - reduced

        # Here the ranks that finished their part of the schedule wait for the slowest: the end of the bubble.
        idle = time.perf_counter()
        if self.two_copies:
            gradients[TIED].add_(self._of_other_copy(gradients[TIED]))
        norm, loss = self._norm_and_loss(result)
        idle = time.perf_counter() - idle

        began = time.perf_counter()
        self.optimizer.step(step, norm)
        end = time.perf_counter()
        self.times = [(a + self.clock, b + self.clock) for a, b in result.times], (began + self.clock, end + self.clock)
        return self._stats(loss, norm, end - start, exposed, result.waited + idle, self._exposed_transfer())

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over tokens, nat, on the same batches of the validation split each time, without dropout."""
        self._train(False)
        losses = [
            self._local_loss(self._pass(self.forward_only, batch, "validation"))
            for batch in range(self.config.validation.batches)
        ]
        self._train(True)
        return self.layout.world.all_reduce(torch.stack(losses).mean(), tag="validation loss").item()

    def _train(self, mode: bool) -> None:
        for part in self.parts.values():
            part.train(mode)

    def tensors(self) -> dict[str, Placed]:
        """What a checkpoint holds of this rank, by name: a tensor, and the parameter that is cut alike."""
        model = {f"model.{name}": (p, p) for name, p in self.parameters().items()}
        return model | {name: (t, owner) for name, t, owner in self.optimizer.tensors()}

    def copies_are_equal(self) -> bool:
        """Whether the two copies of a tied weight have the same bits. Collective over all ranks."""
        differ = False
        if self.two_copies:
            weight = self.parameters()[TIED].detach()
            differ = not torch.equal(weight, self._of_other_copy(weight))
        return not self.layout.world.all_reduce(torch.tensor([int(differ)]), "max", tag="copies differ").item()

    def _of_other_copy(self, mine: Tensor) -> Tensor:
        """What the rank with the other copy of a tied weight has in place of `mine`, its gradient or itself. A sum of
        two is the same bits in either order, so that both copies stay the same."""
        pp, other = self.layout.pp, torch.empty_like(mine)
        calls = [(pp.isend, mine), (pp.irecv, other)]
        # One sends first and the other receives first: NCCL runs the two calls of a pair one after the other.
        ordered = calls if pp.rank < self.other_copy else reversed(calls)
        works = [call(tensor, self.other_copy, tag=TIED) for call, tensor in ordered]
        for work in works:
            work.wait()
        return other

    def _pass(self, runtime: Runtime, step: int, split: str) -> StepResult:
        training, data = self.config.training, self.config.data
        tokens, targets = self.corpus.batch(
            step, seed=training.seed, size=training.batch, sequence=data.sequence, split=split
        )
        count = self.config.parallel.microbatches
        return runtime.step(
            tokens.to(self.device).chunk(count),
            targets.to(self.device).chunk(count),
            loss_scale=1.0 / tokens.numel(),
            step=step if split == "train" else None,
        )

    def _norm_and_loss(self, result: StepResult) -> tuple[float, float]:
        """Global gradient norm and mean loss. Squares add up parameter by parameter, in one order over the whole model,
        so that the norm is the same bits wherever the stages are cut."""
        squares = torch.zeros(len(self.names) + 1, dtype=torch.float64)
        for name, square in self.optimizer.square_norms().items():
            squares[self.names[name]] = square
        squares[-1] = self._local_loss(result)
        *squares, loss = self.layout.world.all_reduce(squares, tag="norms and loss").tolist()
        return sum(squares) ** 0.5, loss

    def _local_loss(self, result: StepResult) -> Tensor:
        """This rank's part, fp64, of the mean loss over tokens: of the ranks that hold the loss one counts it."""
        if not result.losses or self.layout.tp.rank != 0:
            return torch.zeros((), dtype=torch.float64)
        tokens = self.config.training.batch * self.config.data.sequence
        return torch.stack(result.losses).double().sum().cpu() / tokens

    def _exposed_transfer(self) -> float:
        """Seconds of this rank in the last step. The ranks of a pipeline show each other their times: what an end
        waited for is known from when the other end had posted."""
        pp, lowered = self.layout.pp, self.runtime.lowered
        if pp.size == 1:
            return 0.0
        mine = torch.zeros(max(map(len, lowered.programs)), 2, dtype=torch.float64)
        mine[: len(self.times[0])] = torch.tensor(self.times[0], dtype=torch.float64)
        of_all = pp.all_gather(torch.empty(pp.size, *mine.shape, dtype=mine.dtype), mine, tag="times").tolist()
        times = [row[: len(program)] for row, program in zip(of_all, lowered.programs, strict=True)]
        return exposed_transfer(lowered, times)[pp.rank]

    def _stats(
        self, loss: float, norm: float, seconds: float, exposed: float, idle: float, transfer: float
    ) -> StepStats:
        world = self.layout.world
        slowest = world.all_reduce(torch.tensor([seconds], dtype=torch.float64), "max", tag="step time").item()
        shares = torch.tensor([exposed, idle, transfer], dtype=torch.float64) / seconds
        return StepStats(loss, norm, slowest, *world.all_reduce(shares, "avg", tag="shares").tolist())
