"""Every planted mistake is found, and named: module, pass, microbatch and kind."""

from functools import partial

import mistakes
import pytest
import torch
from mistakes import Tied
from small_model import STEP, Model, batch, loss, parallel, parallel_loss, sequence_parallel
from test_right import regression

from tpmp_kernels import verify

CASES = {
    "forgotten reduction": (
        {"plan": partial(parallel, down=mistakes.ForgetsReduction)},
        ("layers.0.mlp.down", "forward", 0, "partial"),
        "each rank holds a partial sum (their sum equals the reference); a reduction over tp is missing",
    ),
    "doubled reduction": (
        {"plan": partial(parallel, out=mistakes.ReducesTwice)},
        ("layers.0.attention.out", "forward", 0, "scale"),
        "times 2, the number of tp ranks: it is reduced twice",
    ),
    "transposed shard": (
        {"plan": mistakes.transposed},
        ("layers.1.attention.out", "weights", None, "shard"),
        "it is the reference with dimensions 0 and 1 transposed",
    ),
    "shards swapped": (
        {"plan": mistakes.swapped},
        ("layers.0.mlp.up", "weights", None, "shard"),
        "tp rank 0 holds part 1 of the reference in place of 0",
    ),
    "wrong rng in dropout": (
        {"plan": partial(sequence_parallel, dropout=mistakes.SameMaskEverywhere)},
        ("layers.0.drop.drop", "forward", 0, "rng"),
        "it equals the reference up to a mask",
    ),
    "loss averaged over local tokens": (
        {"plan": parallel, "parallel_loss": mistakes.local_mean},
        ("loss", "forward", 0, "scale"),
        "times 2, the number of tp ranks: it is reduced twice, or averaged over local tokens and added",
    ),
    "gathered logits given to the vocab-parallel loss": (
        {"plan": partial(parallel, head=mistakes.GathersLogits)},
        ("loss", "forward", 0, "scale"),
        "log(tp) = log(2) a token too large: whole logits are given to a loss that takes shards",
    ),
    "norm gradient not reduced": (
        {"plan": partial(sequence_parallel, norm=mistakes.NormLocalGradient)},
        ("norm", "backward", 0, "partial"),
        "in the gradient of weight: each rank holds a partial sum",
    ),
    "microbatch gradient scaled twice": (
        {"plan": parallel, "parallel_loss": mistakes.scaled_twice},
        ("loss", "backward", 0, "scale"),
        "times 1/3, by the number of microbatches: it is scaled by them twice",
    ),
    "off-by-one vocab shard": (
        {"plan": partial(parallel, embedding=mistakes.VocabOffByOne)},
        ("embed", "forward", 0, "shard"),
        "most tokens get the row that is 1 too early: each rank's ids begin 1 too far",
    ),
    "stale tied embedding": (
        {"model_fn": Tied, "plan": partial(mistakes.tied, copies=True), "reduce_gradients": mistakes.add_copies},
        ("head", "update", None, "stale"),
        "it equals the reference's value before the update",
    ),
    "in backward alone": (
        {"plan": partial(parallel, up=mistakes.ForgetsBackwardReduction)},
        ("layers.1.mlp.up", "backward", 0, "partial"),
        "in the gradient of its input: each rank holds a partial sum",
    ),
    "in microbatch 2 alone": (
        {"plan": partial(parallel, down=mistakes.OnlyMicrobatch2)},
        ("layers.0.mlp.down", "forward", 2, "scale"),
        "times 3/2",
    ),
    "bias added on every rank, where it is zero at first": (
        {"model_fn": mistakes.Fresh, "plan": partial(parallel, down=mistakes.AddsBiasOnEveryRank)},
        ("layers.0.mlp.down", "forward", 0, "scale"),
        "the bias is added 2 times",
    ),
    "on one rank alone": (
        {"plan": partial(parallel, out=mistakes.OnlyRank1)},
        ("layers.0.attention.out", "forward", 0, "scale"),
        "it equals the reference times 5 (on tp rank 1 alone)",
    ),
    "in a layer that no hook sees": (
        {"plan": partial(parallel, k=mistakes.Activates, together=True)},
        ("layers.0.attention.k", "forward", 0, "values"),
        "% of the elements on tp rank",
    ),
    "the last microbatch alone is trained": (
        {"plan": partial(parallel, norm=mistakes.ForgetsMicrobatches), "microbatches": 2},
        ("layers.0.norm1", "gradients", None, "microbatch"),
        "it is the gradient of microbatch 1 alone: others are overwritten, not added",
    ),
    "microbatches swapped on their way": (
        {"plan": mistakes.swapped_microbatches, "tp": 1, "pp": 2, "microbatches": 2},
        ("model", "forward", 0, "microbatch"),
        "in what embed is given: it is the reference's of microbatch 1",
    ),
    "a replica drifts": (
        {"plan": parallel, "optimizer": mistakes.Drifts},
        ("norm", "replicas", None, "replica"),
        "norm.weight, replicas: behind the step rank 1 and the first rank that holds the same differ in their bits",
    ),
    "a layer is left out": (
        {"plan": mistakes.without_a_layer, "tp": 1, "pp": 2},
        ("layers.1.norm1", "weights", None, "missing"),
        "layers.1.norm1.weight and 13 more parameters, weights: no rank holds what the reference has",
    ),
}


def proof(ranks, *, tp=2, pp=1, **arguments):
    given = {"model_fn": Model, "batch": batch(), "loss": loss, "parallel_loss": parallel_loss, **STEP, **arguments}
    return verify(**given, tp=tp, pp=pp, pool=ranks(tp * pp))


def test_each_mistake_is_seen_by_itself(ranks):
    """Not what follows from it: of all that is compared behind it, nothing else is told."""
    report = proof(ranks, plan=partial(parallel, down=mistakes.ForgetsReduction, out=mistakes.ReducesTwice))
    kinds = {(each.module, each.pass_, each.kind) for each in report.differences}
    parts = [(f"layers.{i}.{name}", "forward", kind) for i in "01" for name, kind in MISTAKEN]
    assert kinds == set(parts) and len(report.differences) == len(parts) * STEP["microbatches"], report
    assert str(report).count("\n  and the same in microbatches 1, 2\n") == 1
    assert str(report).count("\n  then: ") == len(parts) - 1


MISTAKEN = [("attention.out", "scale"), ("mlp.down", "partial")]


def test_layers_that_share_columns_are_right_by_themselves(ranks):
    report = verify(mistakes.Shared, regression(), mistakes.shared, microbatches=2, pool=ranks(2))
    assert {(each.module, each.pass_) for each in report.differences} == {("end", "forward")}, report


@pytest.mark.full
@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("case", [name for name in CASES if "pp" not in CASES[name][0]])
def test_a_planted_mistake_is_named_in_fp32_too(ranks, case, tp):
    arguments, expected, _ = CASES[case]
    first = proof(ranks, **arguments, tp=tp, dtype=torch.float32).first
    assert (first.module, first.pass_, first.microbatch, first.kind) == expected


# One of each kind of cause; the others are in the full grid.
DAILY = [
    "forgotten reduction", "shards swapped", "wrong rng in dropout", "norm gradient not reduced",
    "off-by-one vocab shard", "stale tied embedding",
]  # fmt: skip


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.full] * (c not in DAILY)) for c in CASES])
def test_a_planted_mistake_is_named(ranks, case):
    arguments, (module, pass_, microbatch, kind), words = CASES[case]
    report = proof(ranks, **arguments)
    assert not report.equal
    first = report.first
    assert (first.module, first.pass_, first.microbatch, first.kind) == (module, pass_, microbatch, kind), report
    assert words in first.sentence, first.sentence
    assert str(report).count("DIFFERENT, first: ") == 1
