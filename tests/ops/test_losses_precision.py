"""Both losses below fp64: confident tokens, logits of 1e4 and -inf, against the fp64 oracle and torch's own error."""

import itertools
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from bounds import UNIT, assert_no_worse_than_torch, assert_within, gamma
from loss_oracle import FORMS, OF_FEATURES, drawn, exact, ids, inputs_of, measured, of_logits, of_torch, small_cuts
from loss_shards import on_each_rank

from tpmp_kernels import ops
from tpmp_kernels.ops import vocab_products, vocab_slices

NARROW = [torch.float32, torch.bfloat16, torch.float16]
each_form = pytest.mark.parametrize("form", FORMS)
each_dtype = pytest.mark.parametrize("dtype", NARROW, ids=str)


@each_form
@each_dtype
def test_a_confident_token_keeps_its_gradient_and_its_loss(form, dtype):
    """p within 1e-4 .. 1e-11 of 1: softmax(z) - onehot in fp32 loses all digits, here none is lost.

    The weight is the identity, so that dx is d; upstream lifts the smallest into fp16's range.
    """
    tokens, classes, upstream = 8, 50, 8192.0 if dtype == torch.float16 else 1.0
    z, target = (drawn(tokens, classes, seed=1) / 2).to(dtype), ids(tokens, classes=classes)
    z[torch.arange(tokens), target] = torch.linspace(14, 28, tokens).to(dtype)
    loss, d, *_ = measured(form, inputs_of(form, z, torch.eye(classes, dtype=dtype)), target, upstream, reduction="sum")

    def of_target(t: torch.Tensor) -> torch.Tensor:
        return t.double().gather(1, target[:, None]).squeeze(1)

    behind = z.double().scatter(1, target[:, None], -torch.inf).logsumexp(1) - of_target(z)
    missing = behind.sigmoid()  # 1 - p
    assert missing.max() < 1e-4 and missing.min() < 1e-10
    naive = of_target(z.float().softmax(1)) - 1
    assert ((naive + missing).abs() / missing).max() == 1.0
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    error = (of_target(d) / upstream + missing).abs()
    assert (error <= (UNIT[dtype] + 2e-6) * missing + tiny / upstream).all()
    assert (loss - F.softplus(behind).sum()).abs() <= 1e-6 * loss


@pytest.mark.parametrize(
    ("form", "dtype", "fast"),
    [
        *((form, dtype, False) for form in FORMS for dtype in NARROW),
        *((form, torch.bfloat16, True) for form in OF_FEATURES),
    ],
    ids=str,
)
def test_error_is_at_most_twice_that_of_torch_and_a_rounding(monkeypatch, form, dtype, fast):
    """Logits of order 1 and 1e4, capped or not; `fast`: as on a CPU with units for bf16."""
    monkeypatch.setattr(vocab_products, "fast_bf16", lambda: fast)
    tokens, classes, width = 40, 300, 32
    target = ids(tokens, classes=classes)
    target[3] = -100
    for scale, softcap, reduction in itertools.product((1.0, 1e4), (None, 30.0), ("none", "mean")):
        x, weight = drawn(tokens, width, seed=1), drawn(classes, width, seed=2) * scale / width**0.5
        inputs = [t.to(dtype) for t in inputs_of(form, x, weight)]
        upstream = 0.5 if reduction == "mean" else drawn(tokens, seed=3, dtype=dtype).double()
        options = {"softcap": softcap, "label_smoothing": 0.1, "reduction": reduction}
        if not (reduction == "none" and form == "in forward"):
            ours, theirs, truth = (
                room(form, inputs, target, upstream, **options) for room in (measured, of_torch, exact)
            )
            assert [t.dtype for t in ours] == [torch.float32] + [dtype] * len(inputs)
            for got, other, oracle in zip(ours, theirs, truth, strict=True):
                assert got.isfinite().all()
                assert_no_worse_than_torch(got, other, oracle, UNIT[(other if fast else got).dtype], least=1)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("cuts", [nullcontext, small_cuts])
def test_a_smoothed_loss_does_not_depend_on_how_large_all_logits_are(cuts, ranks):
    """The same bits for z and z + 2^20, both exact in fp32, in whatever pieces; sum(z) would leave two digits."""
    z, target = torch.randint(-9, 9, (6, 29), generator=torch.Generator().manual_seed(1)).float(), ids(6, classes=29)

    def loss(z):
        def run(group):
            start, stop = (29 * (group.rank + i) // ranks for i in (0, 1))
            where = {"group": group, "vocab_start": start, "vocab_size": 29}
            return ops.cross_entropy(z[:, start:stop], target, label_smoothing=0.3, reduction="none", **where)

        return on_each_rank(ranks, run)

    with cuts():
        for got, shifted in zip(loss(z), loss(z + 2.0**20), strict=True):
            assert torch.equal(got, shifted)
            assert (got - of_logits(z, target, 1.0, label_smoothing=0.3, reduction="none")[0]).abs().max() < 1e-5


@pytest.mark.parametrize("form", OF_FEATURES)
def test_logits_beyond_fp16_are_right(form):
    """Up to 4e5: of F.linear's in fp16, torch's loss is nan."""
    x, weight = drawn(8, 16, seed=1).mul(100).half(), drawn(30, 16, seed=2).mul(200).half()
    target = (x.double() @ weight.double().t()).argmax(1)
    target[2] = -100
    target[3] += 1 if target[3] == 0 else -1
    case = form, [x, weight], target, 2.0**-8
    assert not of_torch(*case)[0].isfinite()
    for got, oracle in zip(measured(*case), exact(*case), strict=True):
        assert got.isfinite().all() and (got - oracle).abs().max() <= 2.0**-10 * oracle.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, *NARROW], ids=str)
@pytest.mark.parametrize("cuts", [nullcontext, small_cuts])
def test_logits_of_minus_infinity_are_classes_of_no_probability(dtype, cuts):
    """As if they were not there, whole tiles of them too; where the target is one the loss is infinite, d finite."""
    z, masked, target = drawn(4, 13, seed=1, dtype=dtype), [1, 3, 4, 5, 12], torch.tensor([0, 2, 11, 7])
    kept = [c for c in range(13) if c not in masked]
    z[:, masked] = -torch.inf
    upstream, options = drawn(4, seed=3), {"reduction": "none", "z_loss": 0.01}
    with cuts():
        loss, d = measured("logits", [z], target, upstream, **options)
    expected = exact("logits", [z[:, kept]], torch.tensor([kept.index(t) for t in target]), upstream, **options)
    wide = 4 * UNIT[torch.promote_types(dtype, torch.float32)]
    assert (loss - expected[0]).abs().max() <= wide * expected[0].abs().max()
    assert (d[:, kept] - expected[1]).abs().max() <= wide + UNIT[dtype] * expected[1].abs().max()
    assert not d[:, masked].any()

    target[1] = 4
    for options in ({}, {"label_smoothing": 0.1, "softcap": 5.0}):
        with cuts():
            loss, d = measured("logits", [z], target, 1.0, reduction="none", **options)
        assert loss.isposinf().tolist() == [False, not options, False, False] and not loss.isnan().any()
        assert d.isfinite().all() and d[:, masked].any() == (not options)


def test_a_nan_is_not_hidden():
    for column, target in ((4, 4), (4, 0)):
        z = drawn(3, 9, seed=1)
        z[1, column] = torch.nan
        for t in measured("logits", [z], torch.full((3,), target), 1.0, reduction="none"):
            assert t.view(3, -1).isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_weight_gradient_of_many_chunks_is_rounded_once(dtype):
    x, weight, target = drawn(64, 8, seed=1, dtype=dtype), drawn(30, 8, seed=2, dtype=dtype), ids(64, classes=30)
    with (
        mock.patch.object(vocab_slices, "_LIMITS", {"cpu": (2, 2)}),
        mock.patch.object(vocab_products, "fast_bf16", lambda: False),
    ):
        _, *got = measured("in forward", [x, weight], target, 1.0, reduction="sum")
    _, *oracles = exact("in forward", [x, weight], target, 1.0, reduction="sum")
    d = of_logits(x.double() @ weight.double().t(), target, 1.0, reduction="sum")[1].abs()
    sizes = d @ weight.double().abs(), d.t() @ x.double().abs()
    for result, oracle, size in zip(got, oracles, sizes, strict=True):
        wide = gamma(200, UNIT[torch.float32]) * size
        assert_within(result, oracle, UNIT[dtype] * oracle.abs() + wide + torch.finfo(dtype).smallest_normal)
