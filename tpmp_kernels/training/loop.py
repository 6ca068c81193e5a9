"""The run: what every rank does from the first batch to the verdict. `tpmp train` launches `run` on every rank."""

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

from tpmp_kernels import checkpoint
from tpmp_kernels.errors import ProofFailed
from tpmp_kernels.training import data, timeline
from tpmp_kernels.training.config import Config, to_toml
from tpmp_kernels.training.data import Corpus
from tpmp_kernels.training.launch import progress, rank_environment
from tpmp_kernels.training.layout import Layout, layout
from tpmp_kernels.training.metrics import Metrics, draw_losses
from tpmp_kernels.training.proof import Verdict, judge, proof_config, reference_losses
from tpmp_kernels.training.trainer import Trainer


def run(config: Config, resume: Path | None = None) -> None:
    """Train, validate, checkpoint and prove, on every rank.

    resume: the folder of an earlier run, continued from its newest checkpoint (config is that run's, perhaps with
    more steps). ProofFailed where the losses differ from the reference's.
    """
    training = config.training
    with rank_environment(device=training.device, threads=training.threads, timeout=training.timeout) as here:
        _run(config, resume, here.device)


def _run(config: Config, resume: Path | None, device: str) -> None:
    folder = _folder(config, resume)
    corpus = _corpus(config)
    exact: list[float] = []
    copies = True
    with layout(config, device) as where:
        metrics = _train(config, where, corpus, folder, resume=resume is not None, device=device)
        if config.proof.enabled and resume is None:
            exact, copies = _exact(proof_config(config), where, corpus, device)
    if metrics is None:
        return
    reference, verdicts = None, []
    if exact:
        reference, verdicts = _prove(config, corpus, metrics.losses, exact)
    _say(draw_losses(folder / "loss.png", metrics.losses, reference, metrics.validation, corpus.unigram_entropy))
    metrics.close()
    _say(f"everything is in {folder}/; continue with: tpmp train --resume {folder}")
    failures = [str(v) for v in verdicts if not v.equal]
    if not copies:
        failures.append("the first and the last stage's copies of the tied weight differ after the fp64 steps")
    if failures:
        raise ProofFailed("; ".join(failures))


def _train(config: Config, where: Layout, corpus: Corpus, folder: Path, *, resume: bool, device: str) -> Metrics | None:
    """Returns the metrics on rank 0, None elsewhere."""
    trainer = Trainer(config, where, corpus, device=device)
    first, last = 0, config.training.steps
    if resume:
        first, last = _load(trainer, folder, last)
    metrics = None
    if where.world.rank == 0:
        metrics = Metrics(folder, first, tokens_per_step=config.training.batch * config.data.sequence)
        _introduce(config, where, corpus, trainer, first)
    for step in range(first, last):
        progress(f"at step {step + 1} of {last}")
        stats = trainer.step(step)
        if metrics:
            metrics.step(step, stats)
            if step % config.output.log_every == 0 or step == last - 1:
                _say(metrics.line(step, last, stats))
        if _due(step + 1, config.validation.every, last):
            loss = trainer.validate()
            if metrics:
                metrics.validate(step + 1, loss)
                _say(_validation_line(loss, corpus.unigram_entropy))
        if _due(step + 1, config.checkpoint.every, last):
            checkpoint.save(folder / "checkpoints", step + 1, trainer.tensors(), where.mesh["tp"])
    how = f"{config.parallel.schedule}, tp={where.tp.size} x pp={where.pp.size}"
    line = timeline.draw(trainer, where, folder, f"step {last}: {how}")
    if line:
        _say(line)
    return metrics


def _exact(config: Config, where: Layout, corpus: Corpus, device: str) -> tuple[list[float], bool]:
    """The losses of the fp64 run, and whether the copies of a tied weight are the same behind it."""
    trainer = Trainer(config, where, corpus, device=device)
    losses = [trainer.step(step).loss for step in range(config.training.steps)]
    return losses, trainer.copies_are_equal()


def _prove(config: Config, corpus: Corpus, ours: list[float], exact: list[float]) -> tuple[list[float], list[Verdict]]:
    """The fp32 reference losses and the verdicts, printed. The other ranks are done: this process has the machine."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    start, proof = time.perf_counter(), config.proof
    reference64 = reference_losses(proof_config(config), corpus)
    verdicts = [judge(exact, reference64, dtype="fp64", steps=proof.fp64_steps, tolerance=proof.fp64_tolerance)]
    _say(str(verdicts[0]))
    reference = reference_losses(config, corpus)
    if config.training.dtype == "float32":
        verdicts.append(judge(ours, reference, dtype="fp32", steps=proof.fp32_steps, tolerance=proof.fp32_tolerance))
        _say(str(verdicts[1]))
    _say(f"the reference took {time.perf_counter() - start:.0f} s in one process")
    return reference, verdicts


def _load(trainer: Trainer, folder: Path, last: int) -> tuple[int, int]:
    """Read the newest checkpoint; returns the first step to train and the end: as configured, or as many again where
    the run was complete."""
    path = checkpoint.latest(folder / "checkpoints")
    first = checkpoint.load(path, trainer.tensors(), trainer.layout.mesh["tp"])
    trainer.optimizer.set_step(first)
    return first, last if last > first else first + last


def _introduce(config: Config, where: Layout, corpus: Corpus, trainer: Trainer, first: int) -> None:
    own = sum(p.numel() for p in trainer.parameters().values())
    bytes_ = len(corpus.train) + len(corpus.validation)
    _say(
        f"{config.model.layers} layers, hidden {config.model.hidden}; tp={where.tp.size} x pp={where.pp.size}, "
        f"{config.parallel.schedule}, {config.parallel.microbatches} microbatches, {config.training.dtype}; "
        f"{own:,} parameters on rank 0; transport {_transports(where)}"
    )
    _say(f"data: {config.data.source}, {bytes_ / 1e6:.1f} MB; unigram entropy {corpus.unigram_entropy:.4f} nat a byte")
    if first:
        _say(f"resumed behind step {first}")


def _transports(where: Layout) -> str:
    """One word where tp and pp have the same; ranks of one host share memory, those of several do not."""
    found = {name: comm.transport for name, comm in (("tp", where.tp), ("pp", where.pp)) if comm.size > 1}
    found = found or {"world": where.world.transport}
    if len(set(found.values())) == 1:
        return next(iter(found.values()))
    return ", ".join(f"{transport} in {name}" for name, transport in found.items())


def _validation_line(loss: float, entropy: float) -> str:
    return f"validation loss {loss:.4f} nat, {entropy - loss:.2f} below the unigram entropy {entropy:.4f}"


def _corpus(config: Config) -> Corpus:
    if dist.get_rank() == 0:
        data.prepare(config.data)
    dist.barrier()
    return data.load(config.data)


def _folder(config: Config, resume: Path | None) -> Path:
    """A folder of this run's own, made by rank 0 and told to the others: runs/demo, then runs/demo-2."""
    agreed: list = [None]
    if dist.get_rank() == 0:
        agreed[0] = resume or _fresh(Path(config.output.run_dir))
        (agreed[0] / "config.toml").write_text(to_toml(config))
    dist.broadcast_object_list(agreed)
    return agreed[0]


def _fresh(wanted: Path) -> Path:
    candidate, number = wanted, 1
    while True:
        try:
            candidate.mkdir(parents=True)
            return candidate
        except FileExistsError:
            number += 1
            candidate = wanted.with_name(f"{wanted.name}-{number}")


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _say(line: str) -> None:
    print(line, flush=True)
