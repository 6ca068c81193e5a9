"""The step with dropout and a tied embedding, on whole and on cut models: the reference's losses, copies that stay the
same bit for bit, one of them in the checkpoint, and the same bits behind it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from tpmp_kernels import checkpoint
from tpmp_kernels.models import ModelConfig
from tpmp_kernels.training.config import Config, DataConfig, OptimizerConfig, ParallelConfig, TrainingConfig
from tpmp_kernels.training.data import Corpus
from tpmp_kernels.training.layout import layout
from tpmp_kernels.training.proof import reference_losses
from tpmp_kernels.training.trainer import TIED, Trainer

STEPS = 4
CONFIG = Config(
    model=ModelConfig(
        vocab_size=61, hidden=16, layers=4, heads=4, kv_heads=2, ffn=24, dropout=0.2, tie_embeddings=True
    ),
    data=DataConfig(sequence=8),
    training=TrainingConfig(steps=STEPS, batch=4, seed=11, dtype="float64"),
    optimizer=OptimizerConfig(lr=0.02, warmup_steps=1, clip_norm=0.2),  # far below the norm, which thus shows in losses
)
TEXT = np.random.Generator(np.random.Philox(key=3)).integers(0, 61, 4096)
CORPUS = Corpus(TEXT, TEXT)


def cut(tp: int, pp: int, sequence_parallel: bool = False, config: Config = CONFIG) -> Config:
    how = ParallelConfig(tp=tp, pp=pp, sequence_parallel=sequence_parallel, microbatches=2)
    return replace(config, parallel=how)


def run_steps(config: Config):
    """Losses and norms of all steps, whether copies are equal, the validation losses behind the first step."""
    with layout(config, "cpu") as where:
        trainer, stats, validation = Trainer(config, where, CORPUS), [], []
        for step in range(STEPS):
            stats.append(trainer.step(step))
            if step == 0:
                validation = [trainer.validate(), trainer.validate()]
        return [s.loss for s in stats], [s.grad_norm for s in stats], trainer.copies_are_equal(), validation


def run_schedule(schedule: str, begin: str, tied: bool):
    """Losses, and all that two steps have made of the model and the optimizer, by name."""
    config = cut(1, 2)
    config = replace(
        config,
        model=replace(config.model, tie_embeddings=tied),
        parallel=replace(config.parallel, schedule=schedule, begin=begin, microbatches=4),
    )
    with layout(config, "cpu") as where:
        trainer = Trainer(config, where, CORPUS)
        losses = [trainer.step(step).loss for step in range(2)] + [trainer.validate()]
        return losses, {name: tensor.detach().clone() for name, (tensor, _) in trainer.tensors().items()}


REST = [pytest.param(name, marks=pytest.mark.full) for name in ("gpipe", "zb-h1", "dualpipe-v")]


@pytest.mark.parametrize("schedule", ["interleaved-1f1b", "zb-v", *REST])
def test_schedules_and_partitions_train_to_the_same_bits(ranks, schedule):
    expected, got = (ranks(2).run(run_schedule, *each, False) for each in [("1f1b", "layers.1"), (schedule, "")])
    assert got[0][0] == got[1][0] == expected[0][0]
    parts = [{**first, **second} for (_, first), (_, second) in (expected, got)]
    assert parts[0].keys() == parts[1].keys() and len(parts[0]) > 60
    assert all(torch.equal(tensor, parts[1][name]) for name, tensor in parts[0].items())


def test_one_rank_may_hold_both_ends_of_a_tied_model(ranks):
    (losses, mine), (others, _) = ranks(2).run(run_schedule, "zb-v", "", True)
    config = cut(1, 2)
    config = replace(config, parallel=replace(config.parallel, microbatches=4))
    assert losses == others
    assert all(abs(a - b) <= 1e-12 * b for a, b in zip(losses[:2], reference_losses(config, CORPUS)[:2], strict=True))
    assert f"model.{TIED}" in mine and not any("lm_head" in name for name in mine)


@pytest.mark.parametrize(
    ("tp", "pp", "sequence_parallel"),
    [
        (2, 2, True),
        (1, 4, False),
        *(pytest.param(*each, marks=pytest.mark.full) for each in [(2, 1, True), (1, 2, False), (2, 2, False)]),
    ],
)
def test_losses_are_those_of_the_reference_and_copies_stay_equal(ranks, tp, pp, sequence_parallel):
    config = cut(tp, pp, sequence_parallel)
    results = ranks(tp * pp).run(run_steps, config)
    losses, norms, equal, validation = results[0]
    assert equal and min(norms) > 2 * CONFIG.optimizer.clip_norm
    assert all(abs(a - b) <= 1e-12 * b for a, b in zip(losses, reference_losses(config, CORPUS), strict=True))
    assert validation[0] == validation[1]
    assert all(result == results[0] for result in results)


def run_undropped(config: Config) -> float:
    with layout(config, "cpu") as where:
        return Trainer(config, where, CORPUS).validate()


def test_validation_drops_nothing_and_training_after_it_does(ranks):
    config = cut(1, 2)
    plain = replace(config, model=replace(config.model, dropout=0.0))
    assert len({ranks(2).run(run_undropped, each)[0] for each in (config, plain)}) == 1
    assert len({tuple(reference_losses(each, CORPUS)) for each in (config, plain)}) == 2


def run_drifting():
    with layout(cut(1, 2), "cpu") as where:
        trainer = Trainer(cut(1, 2), where, CORPUS)
        equal = trainer.copies_are_equal()
        if where.pp.rank == 1:
            weight = trainer.parameters()[TIED].data
            weight[60, 15] = weight[60, 15].nextafter(torch.tensor(1.0, dtype=torch.float64))
        return equal, trainer.copies_are_equal()


def test_a_copy_that_is_a_bit_off_is_seen_on_all_ranks(ranks):
    assert ranks(2).run(run_drifting) == [(True, False)] * 2


def run_saved(folder: str):
    """The loss of the last step, and that of the same step in a trainer that a checkpoint of the one before fills."""
    config = cut(2, 2)
    with layout(config, "cpu") as where:
        first, second = Trainer(config, where, CORPUS), Trainer(config, where, CORPUS)
        for step in range(2):
            first.step(step)
        checkpoint.save(Path(folder), 2, first.tensors(), where.mesh["tp"])
        second.optimizer.set_step(checkpoint.load(checkpoint.latest(Path(folder)), second.tensors(), where.mesh["tp"]))
        losses = [[trainer.step(step).loss for step in (2, 3)] for trainer in (first, second)]
        return *losses, second.copies_are_equal()


def test_a_tied_weight_is_saved_once_and_resumed_to_the_same_bits(ranks, tmp_path):
    for whole, resumed, equal in ranks(4).run(run_saved, str(tmp_path)):
        assert whole == resumed and equal
    entries = FileSystemReader(checkpoint.latest(tmp_path)).read_metadata().state_dict_metadata
    assert not any("lm_head" in name for name in entries)
    for kind in ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq"):
        entry = entries[f"{kind}.{TIED}"]
        assert entry.size == (64, 16) and sum(chunk.sizes.numel() for chunk in entry.chunks) == 64 * 16
