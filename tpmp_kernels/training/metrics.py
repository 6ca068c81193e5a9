"""What a run leaves behind for people: metrics.jsonl, the live line, loss.png and timeline.svg."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tpmp_kernels.training.trainer import StepStats


class Metrics:
    """Writes <folder>/metrics.jsonl, a JSON object a line, and keeps the losses. Rank 0 alone has one.

    first: the step that this run begins with; what an earlier run wrote of the steps before it stays.
    """

    def __init__(self, folder: Path, first: int = 0, *, tokens_per_step: int):
        self.tokens_per_step = tokens_per_step
        path = folder / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        kept = [r for r in rows if r["step"] < first or ("validation_loss" in r and r["step"] == first)]
        self.losses = [r["loss"] for r in kept if "loss" in r]
        self.validation = {r["step"]: r["validation_loss"] for r in kept if "validation_loss" in r}
        self._file = path.open("w", buffering=1)
        for row in kept:
            self._write(row)

    def step(self, step: int, stats: StepStats) -> None:
        self.losses.append(stats.loss)
        self._write({"step": step, **asdict(stats), "tokens_per_second": self.tokens_per_step / stats.seconds})

    def validate(self, step: int, loss: float) -> None:
        self.validation[step] = loss
        self._write({"step": step, "validation_loss": loss})

    def _write(self, values: dict) -> None:
        # JSON has no NaN; null keeps a diverged run's file readable by every parser.
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._file.write(json.dumps(clean) + "\n")

    def line(self, step: int, steps: int, stats: StepStats) -> str:
        """The live line of a step."""
        return (
            f"step {step + 1:5d}/{steps}  loss {stats.loss:.4f}  grad norm {stats.grad_norm:7.3f}  "
            f"{self.tokens_per_step / stats.seconds:8,.0f} tokens/s  exposed comm {stats.exposed:5.1%}  "
            f"bubble {stats.bubble:5.1%} (transfer {stats.transfer:.1%})"
        )

    def close(self) -> None:
        self._file.close()


def draw_losses(
    path: Path, ours: Sequence[float], reference: Sequence[float] | None, validation: dict[int, float], entropy: float
) -> str:
    """Draw the loss curves as a PNG; returns the line to print, which says so where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return f"{path.name} skipped: matplotlib is not installed (pip install 'tpmp-kernels[bench]')"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    steps = range(1, len(ours) + 1)
    axes.plot(steps, ours, color="#1f77b4", linewidth=2.2, label="tensor and pipeline parallel")
    if reference:
        axes.plot(steps, reference, color="black", linewidth=0.8, linestyle="--", label="unfused, one process")
    if validation:
        axes.plot(list(validation), list(validation.values()), "o", color="#d62728", label="validation")
    axes.axhline(entropy, color="grey", linewidth=0.8, linestyle=":", label="unigram entropy of the data")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nat per byte)")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return f"{path.name} drawn"
