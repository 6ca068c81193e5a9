"""Which mistake a difference looks like, told from tensors alone: each kind, and none where none explains all ranks."""

import math

import pytest
import torch
from torch import Tensor

from tpmp_kernels.prover.diagnose import EVERY, Case, diagnose
from tpmp_kernels.prover.layouts import layout_of
from tpmp_kernels.prover.sites import LOSS, Site, of_parameter

OUT = Site("forward", 0, "layers.0.mlp", 0, "out")
WHOLE = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0)).double()
SQUARE = WHOLE[0, :, :6].clone()


def told(locals_: list[Tensor | None], whole: Tensor = WHOLE, *, site: Site = OUT, tape=None, microbatches=3):
    layouts = [None if x is None else layout_of(x.shape, whole.shape, r, len(locals_)) for r, x in enumerate(locals_)]
    return diagnose(Case(site, locals_, layouts, whole, 1e-12, microbatches, (tape or {}).get, tokens=24), EVERY)


def shards(whole: Tensor, dim: int, order=(0, 1)) -> list[Tensor]:
    parts = whole.chunk(len(order), dim)
    return [parts[i].clone() for i in order]


def noise(seed: int) -> Tensor:
    return torch.randn(WHOLE.shape, generator=torch.Generator().manual_seed(seed)).double()


NAN = WHOLE.clone()
NAN[1, 2, 3] = math.nan
MASKED = WHOLE * (noise(5) > 0)

CASES = [
    ([WHOLE - noise(1), noise(1)], "partial", "their sum equals the reference"),
    ([WHOLE - noise(1), WHOLE + noise(1)], "partial", "their mean equals the reference"),
    ([WHOLE / 2, WHOLE / 2], "scale", "times 1/2, by the number of tp ranks: it is averaged where it should be added"),
    ([WHOLE * 4, WHOLE * 4], "scale", "times 4, the square of the number of tp ranks"),
    ([WHOLE * 3, WHOLE * 3], "scale", "times 3, the number of microbatches"),
    ([-WHOLE, -WHOLE], "scale", "with the other sign"),
    ([WHOLE * 0, WHOLE * 0], "scale", "it is zero"),
    ([WHOLE * 7 / 8, WHOLE * 7 / 8], "scale", "times 7/8"),
    ([WHOLE, WHOLE * math.pi], "scale", "times 3.14159 (on tp rank 1 alone)"),
    ([x * 2 for x in shards(WHOLE, 2)], "scale", "times 2, the number of tp ranks"),
    (shards(WHOLE, 2, (1, 0)), "shard", "tp rank 0 holds part 1 of the reference in place of 0"),
    (shards(WHOLE, 1, (0, 0)), "shard", "tp rank 1 holds part 0 of the reference in place of 1"),
    (shards(WHOLE.roll(-1, 2), 2), "shard", "each rank's part begins 1 too far along dimension 2"),
    (shards(WHOLE.roll(2, 1), 1), "values", "%"),  # not as far as two thirds of a part
    ([torch.cat(shards(WHOLE, 2, (1, 0)), 2)] * 2, "shard", "its 2 parts along dimension 2 are those of the reference"),
    ([WHOLE.unflatten(2, (2, 4)).transpose(2, 3).flatten(2)] * 2, "shard", "along dimension 2 the reference is dealt"),
    ([NAN, NAN], "nonfinite", "infinities or NaNs"),
    ([WHOLE, noise(3)], "replica", "tp rank 1 should hold the same as tp rank 0"),
    ([noise(2), noise(3)], "values", "100 % of the elements"),
    ([None, None], "missing", "there is none on any rank"),
    ([WHOLE, None], "missing", "there is none on tp rank 1"),
]


@pytest.mark.parametrize(("locals_", "kind", "words"), CASES)
def test_a_mistake_is_known_by_its_tensors(locals_, kind, words):
    found, said = told(locals_)
    assert found == kind and words in said, said


def test_a_mask_is_known_and_an_activation_is_none():
    assert told([WHOLE * (noise(6) > 0)] * 2, MASKED)[0] == "rng"
    assert told([MASKED.relu()] * 2, MASKED)[0] == "values"


def test_a_square_weight_cut_along_the_wrong_dimension():
    assert told([p.t() for p in SQUARE.chunk(2, 0)], SQUARE) == (
        "shard", "it is the reference with dimensions 0 and 1 transposed",
    )  # fmt: skip


def test_the_loss_of_whole_logits():
    site, loss = Site("forward", 0, LOSS, 0, "out"), torch.tensor(2.5, dtype=torch.float64)
    for tokens in (1, 24):  # a mean, and a sum
        kind, words = told([loss + tokens * math.log(2)] * 2, loss, site=site)
        assert kind == "scale" and words.startswith("it is log(tp) = log(2) a token too large")
    assert told([loss * 1.37] * 2, loss, site=site)[0] == "values", "any number is some multiple of another"


def test_parameters_behind_the_optimizer():
    site, before = of_parameter("update", "layers.0.mlp.weight"), WHOLE + 0.1 * noise(4)
    tape = {site._replace(pass_="weights"): before}
    assert told([before] * 2, site=site, tape=tape)[0] == "stale"
    kind, words = told([before + 2 * (WHOLE - before)] * 2, site=site, tape=tape)
    assert kind == "scale" and words.startswith("the update equals the reference's times 2")


def test_microbatches():
    tape = {OUT._replace(microbatch=1): noise(7), OUT._replace(microbatch=2): noise(8)}
    assert told([noise(8)] * 2, tape=tape) == ("microbatch", "it is the reference's of microbatch 2")
    each = [noise(i) for i in (1, 2, 3)]
    site = of_parameter("gradients", "layers.0.mlp.weight")
    tape = {of_parameter("backward", "layers.0.mlp.weight", m): grad for m, grad in enumerate(each)}
    for made, words in (
        (each[2], "it is the gradient of microbatch 2 alone"),
        (each[0] + each[2], "the gradient of microbatch 1 is missing in it"),
        (each[0] * 2 + each[1] + each[2], "the gradient of microbatch 0 is in it twice"),
    ):
        kind, said = told([made] * 2, sum(each), site=site, tape=tape)
        assert kind == "microbatch" and said.startswith(words)
