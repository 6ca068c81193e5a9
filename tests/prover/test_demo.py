"""The training step with dropout and a tied embedding is found equal, and what goes wrong in either is named."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from tpmp_kernels.models import ModelConfig
from tpmp_kernels.models.decoder import PlacedDropout
from tpmp_kernels.pipeline.stage import Stage
from tpmp_kernels.prover.demo import Demo
from tpmp_kernels.prover.prove import prove
from tpmp_kernels.training.config import Config, DataConfig, ParallelConfig, TrainingConfig
from tpmp_kernels.training.trainer import TIED, Trainer

MODEL = ModelConfig(vocab_size=29, hidden=16, layers=2, heads=2, kv_heads=2, ffn=16, dropout=0.2, tie_embeddings=True)
CONFIG = Config(
    model=MODEL,
    data=DataConfig(sequence=4),
    parallel=ParallelConfig(tp=2, pp=2, sequence_parallel=True, microbatches=2),
    training=TrainingConfig(batch=4, seed=3, dtype="float64"),
)


def run(planted=None, config: Config = CONFIG):
    if planted is None:
        return prove(Demo(config))
    with planted():
        return prove(Demo(config))


def test_dropout_and_a_tied_embedding_are_equal(ranks):
    report = ranks(4).run(run)[0]
    assert report.equal and not report.notes, report
    assert report.title.startswith("decoder of 2 layers, hidden 16, dropout 0.2, tied embeddings: tp=2 x pp=2 with seq")
    compared = {(row.run, row.pass_): row.checks for row in report.rows}
    assert compared["step", "replicas"] == 6  # the norms, and of the tied weight two copies
    assert compared["step", "weights"] == 21  # 7 matrices and 2 norms a layer, the last norm, and both names


def scheduled(name: str) -> Config:
    return replace(CONFIG, parallel=replace(CONFIG.parallel, schedule=name))


SCHEDULES = ["zb-v", *(pytest.param(name, marks=pytest.mark.full) for name in ("zb-h1", "interleaved-1f1b", "v-min"))]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_several_stages_on_a_rank_and_w_apart_are_equal(ranks, schedule):
    report = ranks(4).run(run, None, scheduled(schedule))[0]
    assert report.equal and not report.notes and f"{schedule}, 2 microbatches" in report.title, report


def lost_weight_gradients():
    whole = Stage.backward_weight
    return patch.object(Stage, "backward_weight", lambda self, m: whole(self, m) if m else self._later.pop(m))


def test_a_w_that_is_left_out_is_found(ranks):
    report = ranks(4).run(run, lost_weight_gradients, scheduled("zb-h1"))[0]
    assert {each.pass_ for each in report.differences} >= {"gradients"}, report


def without_sums():
    return patch.object(Trainer, "_of_other_copy", lambda self, mine: torch.zeros_like(mine))


@pytest.mark.full
def test_copies_whose_gradients_are_not_added_are_found(ranks):
    report = ranks(4).run(run, without_sums)[0]
    assert ("embed_tokens", "gradients") in {(each.module, each.pass_) for each in report.differences}, report
    assert report.first.pass_ == "gradients" and "microbatches None" not in str(report)


def drift():
    step = Trainer.step

    def drifting(self, number: int):
        stats = step(self, number)
        if self.layout.pp.rank == 1:
            weight = self.parameters()[TIED].data
            weight[3] = weight[3].nextafter(weight[3] + 1)
        return stats

    return patch.object(Trainer, "step", drifting)


@pytest.mark.full
def test_copies_that_drift_apart_by_a_bit_are_found(ranks):
    (found,) = ranks(4).run(run, drift)[0].differences
    assert found.sentence.startswith(
        "embed_tokens.weight, replicas: behind the step ranks 2, 3 and the first rank that"
    )


def masks_of_the_first_tokens():
    init = PlacedDropout.__init__
    return patch.object(
        PlacedDropout, "__init__", lambda self, *given, **how: init(self, *given, **{**how, "sequence_parallel": False})
    )


@pytest.mark.full
def test_a_mask_that_is_not_this_ranks_is_found(ranks):
    config = replace(CONFIG, parallel=replace(CONFIG.parallel, tp=2, pp=1))
    first = ranks(2).run(run, masks_of_the_first_tokens, config)[0].first
    assert (first.module, first.pass_, first.microbatch, first.kind) == ("embed_dropout", "forward", 0, "rng")
