"""The proof: the parallel run's losses against an unsharded, unfused, single-process run from the same seed.

The reference is stock torch: its own decoder (models/reference.py), torch.optim.AdamW, clip_grad_norm_, the whole batch
at once, under the masks of dropout that its microbatches have. In fp64 rounding is far below any mistake, so fp64 is
the proof; fp32 must agree while rounding has not yet grown through training.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from tpmp_kernels.models.reference import ReferenceDecoder
from tpmp_kernels.models.weights import initialize
from tpmp_kernels.tensor_parallel import DropoutKey
from tpmp_kernels.training.config import Config
from tpmp_kernels.training.data import Corpus
from tpmp_kernels.training.optimizer import learning_rate


@dataclass(frozen=True)
class Verdict:
    """Of two loss curves: the largest relative difference over the judged steps, and over all of them."""

    dtype: str
    steps: int
    difference: float
    tolerance: float
    whole: float
    whole_steps: int

    @property
    def equal(self) -> bool:
        return self.difference <= self.tolerance

    def __str__(self) -> str:
        line = (
            f"proof {self.dtype}: largest relative loss difference over {self.steps} steps {self.difference:.1e}, "
            f"allowed {self.tolerance:.0e}: {'equal' if self.equal else 'DIFFERENT'}"
        )
        if self.whole_steps > self.steps:
            line += f"; over all {self.whole_steps} steps {self.whole:.1e} (not judged: rounding grows with training)"
        return line


def judge(ours: list[float], reference: list[float], *, dtype: str, steps: int, tolerance: float) -> Verdict:
    """Compare the first `steps` losses of two runs against `tolerance`; a NaN anywhere judged is a difference."""
    relative = [abs(a - b) / abs(b) for a, b in zip(ours, reference, strict=True)]
    judged = [float("inf") if r != r else r for r in relative[:steps]]
    return Verdict(dtype, len(judged), max(judged), tolerance, max(relative), len(relative))


def proof_config(config: Config) -> Config:
    """The run whose losses are compared in fp64: the same, shorter."""
    return replace(config, training=replace(config.training, dtype="float64", steps=config.proof.fp64_steps))


def reference_losses(config: Config, corpus: Corpus) -> list[float]:
    """Train the reference for config.training.steps steps, and return the loss of each, mean over tokens, in nat."""
    training, optimizer = config.training, config.optimizer
    model = ReferenceDecoder(config.model)
    initialize(model, seed=training.seed, layers=config.model.layers)
    model.to(getattr(torch, training.dtype))
    adamw = torch.optim.AdamW(_groups(model, optimizer.weight_decay), betas=optimizer.betas, eps=optimizer.eps)
    losses = []
    for step in range(training.steps):
        tokens, targets = corpus.batch(step, seed=training.seed, size=training.batch, sequence=config.data.sequence)
        keys = [DropoutKey(training.seed, step, 0, m) for m in range(config.parallel.microbatches)]
        loss = F.cross_entropy(model(tokens, keys).flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer.clip_norm)
        for group in adamw.param_groups:
            group["lr"] = learning_rate(optimizer, step)
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())
    return losses


def _groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
