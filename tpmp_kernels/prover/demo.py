"""A training config as a subject: the step of `tpmp train`, the Trainer's own, against models/reference.py."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tpmp_kernels.models.reference import ReferenceDecoder
from tpmp_kernels.models.weights import initialize
from tpmp_kernels.prover.layouts import layout_of
from tpmp_kernels.prover.subject import Part, Subject, Whole, nudge
from tpmp_kernels.tensor_parallel import DropoutKey
from tpmp_kernels.training.config import Config
from tpmp_kernels.training.data import Corpus
from tpmp_kernels.training.layout import Layout
from tpmp_kernels.training.optimizer import learning_rate
from tpmp_kernels.training.trainer import Trainer


class _Reference(ReferenceDecoder):
    """Ends where the parallel decoder does: its head belongs to the loss."""

    forward = ReferenceDecoder.hidden

    def loss(self, hidden: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.lm_head(hidden).flatten(0, 1), target.flatten(), reduction="sum")


@dataclass(frozen=True)
class Demo(Subject):
    """The first step of a run of `config`, on random tokens."""

    config: Config

    @property
    def tp(self) -> int:
        return self.config.parallel.tp

    @property
    def pp(self) -> int:
        return self.config.parallel.pp

    @property
    def schedule(self) -> str:
        return self.config.parallel.schedule

    @property
    def microbatches(self) -> int:
        return self.config.parallel.microbatches

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.config.training.dtype)

    @property
    def seed(self) -> int:
        return self.config.training.seed

    @property
    def timeout(self) -> float:
        return max(600.0, self.config.training.timeout)  # ranks wait for the reference, which one of them runs

    @property
    def title(self) -> str:
        model, parallel, training = self.config.model, self.config.parallel, self.config.training
        sequence_parallel = " with sequence parallelism" if parallel.sequence_parallel else ""
        dropout = f", dropout {model.dropout}" if model.dropout else ""
        tied = ", tied embeddings" if model.tie_embeddings else ""
        return (
            f"decoder of {model.layers} layers, hidden {model.hidden}{dropout}{tied}: "
            f"tp={self.tp} x pp={self.pp}{sequence_parallel}, {self.schedule}, {self.microbatches} microbatches of "
            f"{training.batch // self.microbatches} x {self.config.data.sequence} tokens, {training.dtype}"
        )

    @property
    def tokens(self) -> int:
        return self.config.training.batch // self.microbatches * self.config.data.sequence

    def whole(self, dtype: torch.dtype) -> Whole:
        config = self.config
        model = _Reference(config.model)
        initialize(model, seed=self.seed, layers=config.model.layers)
        model.to(dtype)
        for name, parameter in model.named_parameters():
            parameter.data.add_(_nudge(name, parameter.shape))
        tokens, targets = self._corpus.batch(
            0, seed=self.seed, size=config.training.batch, sequence=config.data.sequence
        )
        parts = (tokens.chunk(self.microbatches), targets.chunk(self.microbatches))

        def forward(x: Tensor, microbatch: int) -> Tensor:
            return model(x, [DropoutKey(self.seed, 0, 0, microbatch)])

        return Whole(model, forward, *parts, model.loss, 1 / tokens.numel(), lambda: self._update(model))

    def _update(self, model: torch.nn.Module) -> None:
        """The first step of torch's own AdamW and clipping."""
        wanted = self.config.optimizer
        decays = [[p for p in model.parameters() if (p.dim() > 1) == decayed] for decayed in (True, False)]
        groups = [
            {"params": parameters, "weight_decay": decay}
            for parameters, decay in zip(decays, (wanted.weight_decay, 0.0), strict=True)
        ]
        torch.nn.utils.clip_grad_norm_(model.parameters(), wanted.clip_norm)
        torch.optim.AdamW(groups, lr=learning_rate(wanted, 0), betas=wanted.betas, eps=wanted.eps).step()

    def part(self, where: Layout) -> Part:
        trainer = Trainer(self.config, where, self._corpus)
        stages = trainer.runtime.stages
        for name, parameter in trainer.parameters().items():
            shape = self._shapes[name]
            layout = layout_of(
                parameter.shape, shape, where.tp.rank, where.tp.size, padded=hasattr(parameter, "tp_unpadded")
            )
            layout.real(parameter.data).add_(layout.cut(_nudge(name, shape)))
        update = trainer.optimizer.step

        def step(before: Callable[[float | None], None]) -> None:
            def watched(number: int, norm: float) -> None:
                before(norm)
                update(number, norm)

            trainer.optimizer.step = watched
            trainer.step(0)

        return Part(stages, len(trainer.runtime.schedule.placement) - 1, step)

    @cached_property
    def _corpus(self) -> Corpus:
        tokens = self.config.training.batch * (self.config.data.sequence + 1) + 1
        random = np.random.Generator(np.random.Philox(key=self.seed))
        text = random.integers(0, self.config.model.vocab_size, max(4096, tokens), dtype=np.int64)
        return Corpus(text, text)

    @cached_property
    def _shapes(self) -> dict[str, torch.Size]:
        with torch.device("meta"):
            return {name: p.shape for name, p in ReferenceDecoder(self.config.model).named_parameters()}


def _nudge(name: str, shape: torch.Size) -> Tensor:
    return nudge(name, shape, 0.1 if len(shape) == 1 else 0.02)
