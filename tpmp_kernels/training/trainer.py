"""One rank's share of training: its stage of the model, the runtime that executes the schedule, and the optimizer."""

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from tpmp_kernels.checkpoint import Placed
from tpmp_kernels.models.decoder import Decoder
from tpmp_kernels.models.weights import initialize
from tpmp_kernels.pipeline.runtime import Runtime, StepResult
from tpmp_kernels.pipeline.schedule import Event
from tpmp_kernels.pipeline.schedules import build
from tpmp_kernels.pipeline.stage import Stage
from tpmp_kernels.tensor_parallel import reduce_partial_gradients
from tpmp_kernels.training.config import Config
from tpmp_kernels.training.data import Corpus
from tpmp_kernels.training.layout import Layout
from tpmp_kernels.training.optimizer import Optimizer

TIED = "embed_tokens.weight"


@dataclass(frozen=True)
class StepStats:
    """Of one step, the same on every rank. loss: mean over tokens, nat. seconds: of the slowest rank.

    exposed: share of the step, mean over ranks, blocked in tensor-parallel collectives. bubble: share blocked on stage
    transfers or, at the end of the pipeline, on the slowest rank. With more ranks than cores both contain the time in
    which another rank had the core.
    """

    loss: float
    grad_norm: float
    seconds: float
    exposed: float
    bubble: float


class Trainer:
    """two_copies: whether this stage is one of the two that hold a tied weight, each for a use of its own."""

    def __init__(self, config: Config, layout: Layout, corpus: Corpus, *, device: str = "cpu"):
        self.config, self.layout, self.corpus, self.device = config, layout, corpus, device
        dtype = getattr(torch, config.training.dtype)
        self.model = Decoder(
            config.model,
            layout.tp,
            layout.layers(config.model.layers),
            sequence_parallel=config.parallel.sequence_parallel,
            sequence=config.data.sequence,
            dropout_seed=config.training.seed,
            dtype=dtype,
            device=device,
        )
        self.two_copies = config.model.tie_embeddings and self.model.first != self.model.last
        initialize(self.model, seed=config.training.seed, layers=config.model.layers, comm=layout.tp)
        self.optimizer = Optimizer(
            self.model,
            config.optimizer,
            counts_replicas=layout.tp.rank == 0,
            counted_elsewhere={TIED} if self.two_copies and self.model.last else (),
        )
        self.runtime = self._runtime(config.parallel.schedule, dtype)
        self.forward_only = self._runtime("forward-only", dtype)
        self.events: list[Event] = []

    def _runtime(self, schedule: str, dtype: torch.dtype) -> Runtime:
        parallel, training = self.config.parallel, self.config.training
        stage = Stage(self.model, loss=self.model.loss if self.model.last else None, numbered=True)
        tokens = (training.batch // parallel.microbatches, self.config.data.sequence)
        if parallel.sequence_parallel:
            tokens = (math.prod(tokens) // self.layout.tp.size,)
        return Runtime(
            build(schedule, ranks=parallel.pp, microbatches=parallel.microbatches),
            {self.layout.pp.rank: stage},
            self.layout.pp,
            shape=(*tokens, self.config.model.hidden),
            dtype=dtype,
            device=self.device,
            tensor_parallel=self.layout.tp,
        )

    def step(self, step: int) -> StepStats:
        """Train on the batch of `step` (0, 1, ...)."""
        start, reduced = time.perf_counter(), self.layout.tp.seconds
        result = self._pass(self.runtime, step, "train")
        gradients = {name: main.grad for name, main in self.optimizer.main.items()}
        reduce_partial_gradients(self.model, self.layout.tp, gradients=gradients)
        exposed = self.layout.tp.seconds - reduced

        # Here the ranks that finished their part of the schedule wait for the slowest: the end of the bubble.
        idle = time.perf_counter()
        if self.two_copies:
            gradients[TIED].add_(self._of_other_copy(gradients[TIED]))
        square_norm, loss = self.layout.world.all_reduce(
            torch.stack([self.optimizer.local_square_norm(), self._local_loss(result)]), tag="norm and loss"
        )
        idle = time.perf_counter() - idle

        norm, began = square_norm.item() ** 0.5, time.perf_counter()
        self.optimizer.step(step, norm)
        end = time.perf_counter()
        self.events = [*result.events, Event("opt", self.layout.pp.rank, None, began, end)]
        return self._stats(loss.item(), norm, end - start, exposed, result.waited + idle)

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over tokens, nat, on the same batches of the validation split each time, without dropout."""
        self.model.eval()
        losses = [
            self._local_loss(self._pass(self.forward_only, batch, "validation"))
            for batch in range(self.config.validation.batches)
        ]
        self.model.train()
        return self.layout.world.all_reduce(torch.stack(losses).mean(), tag="validation loss").item()

    def tensors(self) -> dict[str, Placed]:
        """What a checkpoint holds of this rank, by name: a tensor, and the parameter that is cut alike."""
        model = {f"model.{name}": (p, p) for name, p in self.model.named_parameters()}
        return model | {name: (t, owner) for name, t, owner in self.optimizer.tensors()}

    def copies_are_equal(self) -> bool:
        """Whether the two copies of a tied weight have the same bits. Collective over all ranks."""
        differ = False
        if self.two_copies:
            weight = self.model.get_parameter(TIED).detach()
            differ = not torch.equal(weight, self._of_other_copy(weight))
        return not self.layout.world.all_reduce(torch.tensor([int(differ)]), "max", tag="copies differ").item()

    def _of_other_copy(self, mine: Tensor) -> Tensor:
        """What the stage with the other copy of a tied weight has in place of `mine`, its gradient or itself. A sum of
        two is the same bits in either order, so that both copies stay the same."""
        pp, other = self.layout.pp, torch.empty_like(mine)
        peer = pp.size - 1 if self.model.first else 0
        calls = [(pp.isend, mine), (pp.irecv, other)]
        # One sends first and the other receives first: NCCL runs the two calls of a pair one after the other.
        works = [call(tensor, peer, tag=TIED) for call, tensor in (calls if self.model.first else reversed(calls))]
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

    def _local_loss(self, result: StepResult) -> Tensor:
        """This rank's part, fp64, of the mean loss over tokens: of the ranks that hold the loss one counts it."""
        if not result.losses or self.layout.tp.rank != 0:
            return torch.zeros((), dtype=torch.float64)
        tokens = self.config.training.batch * self.config.data.sequence
        return torch.stack(result.losses).double().sum().cpu() / tokens

    def _stats(self, loss: float, norm: float, seconds: float, exposed: float, idle: float) -> StepStats:
        world = self.layout.world
        slowest = world.all_reduce(torch.tensor([seconds], dtype=torch.float64), "max", tag="step time").item()
        shares = torch.tensor([exposed / seconds, idle / seconds], dtype=torch.float64)
        exposed_share, bubble = world.all_reduce(shares, "avg", tag="shares").tolist()
        return StepStats(loss, norm, slowest, exposed_share, bubble)
