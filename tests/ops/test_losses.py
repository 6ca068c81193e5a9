"""Both losses on one process: exact in fp64 under every option, no logits of all tokens, main_grad, what they refuse.

Elsewhere: below fp64 (test_losses_precision.py), groups of ranks (test_losses_groups.py, test_groups.py), random calls
(test_properties.py), opcheck, compile and checkpointing of the default form (test_boundary.py and others).
"""

import itertools
import pickle
from contextlib import nullcontext
from functools import partial
from unittest import mock

import pytest
import torch
from allocations import Allocations
from bounds import UNIT
from loss_oracle import (
    FORMS,
    OF_FEATURES,
    assert_exact,
    call_of,
    drawn,
    exact,
    ids,
    inputs_of,
    measured,
    of_torch,
    small_cuts,
)
from loss_problems import fields
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from tpmp_kernels import ops
from tpmp_kernels.comm import SelfCommunicator
from tpmp_kernels.ops import vocab, vocab_products

each_form = pytest.mark.parametrize("form", FORMS)
each_form_of_features = pytest.mark.parametrize("form", OF_FEATURES)


def test_the_oracle_is_torch_where_torch_has_the_option():
    z, target = drawn(5, 7, seed=1), torch.tensor([0, 6, -100, 3, 3])
    for reduction, smoothing in itertools.product(("none", "sum", "mean"), (0.0, 0.3)):
        case = "logits", [z], target, drawn(5, seed=2) if reduction == "none" else 0.75
        options = {"reduction": reduction, "label_smoothing": smoothing}
        assert_exact(exact(*case, **options), of_torch(*case, **options), options)


NAMES = ("label_smoothing", "z_loss", "softcap", "ignore_index", "reduction", "vocab_size")
VALUES = ((0.0, 0.1, 1.0), (0.0, 0.02), (None, 1.5), (-100, 2), ("none", "sum", "mean"), (None, 10))
ALL = list(itertools.product(*VALUES))


@each_form
@pytest.mark.parametrize(
    ("cuts", "chosen"),
    [
        (nullcontext, ALL[1::5]),
        (small_cuts, ALL[::5]),
        *(pytest.param(cuts, ALL, marks=pytest.mark.full) for cuts in (nullcontext, small_cuts)),
    ],
    ids=["whole", "small cuts", "all whole", "all small cuts"],
)
def test_loss_and_gradients_under_every_option(form, cuts, chosen):
    """7 tokens, 13 columns; the loss of each token has a gradient of its own where they are not reduced."""
    inputs, base = inputs_of(form, drawn(7, 5, seed=1), drawn(13, 5, seed=2)), torch.tensor([3, 9, 2, 0, 2, 7, 9])
    for values in chosen:
        options = dict(zip(NAMES, values, strict=True))
        each = options["reduction"] == "none"
        if not (each and form == "in forward"):
            case = form, inputs, base.where(base != 2, options["ignore_index"]), drawn(7, seed=3) if each else 0.75
            with cuts():
                got = measured(*case, **options)
            assert_exact(got, exact(*case, **options), options)


@each_form
def test_any_size(form):
    """No token, one, and more dimensions than one; one class, two and a prime; one feature and none."""
    for shape, classes, width in itertools.product(((), (0,), (1,), (2, 0), (2, 3)), (1, 2, 257), (0, 1, 5)):
        inputs = inputs_of(form, drawn(*shape, width, seed=1), drawn(classes, width, seed=2))
        for options in ({"z_loss": 0.1}, {"reduction": "sum"}):
            case = form, inputs, ids(*shape, classes=classes), 0.75
            assert_exact(measured(*case, **options), exact(*case, **options), (shape, classes, width))


@each_form_of_features
def test_slices_and_chunks_as_shipped(form):
    """Three of each, the last of which is smaller."""
    inputs, target = [drawn(520, 3, seed=1), drawn(4099, 3, seed=2)], ids(520, classes=4099)
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "ignore_index": int(target[3])}
    assert_exact(measured(form, inputs, target, 0.75, **options), exact(form, inputs, target, 0.75, **options))


@each_form
def test_all_tokens_ignored(form):
    """The mean over no token is nan, as torch's; gradients are 0 even so, and where a logit is 1e4."""
    for reduction, scale, dtype in itertools.product(
        ("none", "sum", "mean"), (1.0, 1e4), (torch.float32, torch.float64)
    ):
        inputs = inputs_of(form, drawn(4, 5, seed=1, dtype=dtype) * scale, drawn(9, 5, seed=2, dtype=dtype))
        if not (reduction == "none" and form == "in forward"):
            options = {"reduction": reduction, "label_smoothing": 0.1, "z_loss": 0.1}
            loss, *grads = measured(form, inputs, torch.full((4,), -100), 1.0, **options)
            assert loss.isnan() if reduction == "mean" else not loss.any()
            assert not any(g.any() for g in grads)


def test_padding_is_not_read():
    x, weight, target = drawn(4, 5, seed=1), drawn(9, 5, seed=2), ids(4, classes=6)
    weight[6:] = torch.nan
    for form in FORMS:
        loss, *_, grad = measured(form, inputs_of(form, x, weight), target, 1.0, vocab_size=6, label_smoothing=0.1)
        grad = grad if form == "logits" else grad.t()
        assert loss.isfinite() and grad[:, :6].isfinite().all() and not grad[:, 6:].any()


# ---- memory


@pytest.fixture
def one_thread_of_scratch(monkeypatch):
    """As shipped the scratch of a tile grows with the threads."""
    monkeypatch.setattr(vocab, "_TILE", vocab._TILE // torch.get_num_threads())


@each_form_of_features
def test_the_logits_of_all_tokens_never_exist(one_thread_of_scratch, form):
    """Neither as one tensor nor as several at one time, forward and backward."""
    tokens, classes = 520, 5000
    x, weight = (drawn(n, 4, seed=1, dtype=torch.float32).requires_grad_() for n in (tokens, classes))
    target = ids(tokens, classes=classes)
    with Allocations(x, weight, target) as seen:
        call_of(form)(x, weight, target, softcap=2.0, label_smoothing=0.1, z_loss=0.1).backward()
    assert 10 * weight.numel() < seen.largest < 0.45 * tokens * classes  # a slice
    assert seen.peak < 0.65 * tokens * classes


def test_of_given_logits_only_the_gradient_is_as_large(one_thread_of_scratch):
    z, target = drawn(300, 5000, seed=1, dtype=torch.bfloat16).requires_grad_(), ids(300, classes=5000)
    with Allocations(z, target) as seen:
        loss = ops.cross_entropy(z, target, softcap=5.0)
        assert seen.peak < 0.2 * z.numel()
        loss.backward()
    assert z.numel() == seen.largest <= seen.peak < 1.5 * z.numel()


# ---- backward


def test_the_gradient_that_was_announced_must_come():
    x, weight, target = drawn(4, 5, seed=1).requires_grad_(), drawn(9, 5, seed=2), ids(4, classes=9)
    with pytest.raises(ValueError) as refused:
        ops.linear_cross_entropy(x, weight, target, grad_scale=0.5).backward()
    assert str(refused.value) == (
        "linear_cross_entropy: backward must bring the gradient grad_scale=0.5, got 1.0; pass that one"
    )
    loss = ops.linear_cross_entropy(x.float(), weight.float(), target, grad_scale=0.1)
    loss.mul(0.1).backward()  # 0.1 in fp32


def test_gradients_are_handed_out_once():
    x, weight, target = drawn(4, 5, seed=1).requires_grad_(), drawn(9, 5, seed=2), ids(4, classes=9)
    loss = ops.linear_cross_entropy(x, weight, target, grad_scale=1.0)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward hands out its gradients once, and was asked again; leave out"):
        loss.backward()


@each_form
def test_second_derivatives_are_refused(form):
    leaves = [t.requires_grad_() for t in inputs_of(form, drawn(4, 5, seed=1), drawn(9, 5, seed=2))]
    grad, *_ = torch.autograd.grad(call_of(form)(*leaves, ids(4, classes=9)), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="cross_entropy: expected to be differentiated once"):
        grad.sum().backward()


@each_form_of_features
def test_only_the_gradients_asked_for(form):
    """Each alone is that of both."""
    inputs, target = [drawn(4, 5, seed=1), drawn(9, 5, seed=2)], ids(4, classes=9)
    expected = measured(form, inputs, target, 1.0)[1:]
    for i, full in enumerate(expected):
        leaves = [t.detach().requires_grad_(i == j) for j, t in enumerate(inputs)]
        call_of(form)(*leaves, target).backward()
        assert torch.equal(leaves[i].grad, full) and leaves[1 - i].grad is None


@each_form_of_features
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cuts", [nullcontext, small_cuts])
def test_main_grad_adds_up_in_fp32(form, dtype, cuts):
    """Three microbatches in each of two steps, of which the second starts from zero."""
    weight = torch.nn.Parameter(drawn(11, 5, seed=9, dtype=dtype))
    ops.attach_main_grad([weight])
    for step in range(2):
        weight.grad = None
        if dtype.itemsize == 2:
            weight.main_grad.zero_()
        before, total = weight.main_grad._version, torch.zeros(11, 5, dtype=torch.float64)
        for seed in range(3):
            x, target = drawn(7, 5, seed=10 * step + seed, dtype=dtype).requires_grad_(), ids(7, classes=11)
            with cuts(), mock.patch.object(vocab_products, "fast_bf16", lambda: False):
                call_of(form)(x, weight, target).backward()
            _, dx, dweight = exact(form, [x, weight], target, 1.0)
            total += dweight
            assert (x.grad - dx).abs().max() <= 2 * UNIT[dtype]
        assert weight.main_grad._version > before
        assert (weight.main_grad - total).abs().max() <= 16 * UNIT[weight.main_grad.dtype]
        assert weight.grad is (None if dtype.itemsize == 2 else weight.main_grad)


@each_form_of_features
def test_main_grad_is_left_alone_by_the_gradient_of_x(form):
    weight, target = torch.nn.Parameter(drawn(11, 5, seed=9)), ids(6, classes=11)
    ops.attach_main_grad([weight])
    x = drawn(6, 5, seed=1).requires_grad_()
    (dx,) = torch.autograd.grad(call_of(form)(x, weight, target), x)
    assert dx.any() and not weight.main_grad.any()
    with pytest.raises(RuntimeError, match=r"linear_cross_entropy: expected a weight that attach_main_grad saw"):
        call_of(form)(x, pickle.loads(pickle.dumps(weight)), target).backward()


# ---- at home in torch


def compiled_call(form: str, group):
    def call(x, weight, target):
        return call_of(form)(x, weight, target, group=group, label_smoothing=0.1, vocab_size=11)

    return call


@pytest.mark.parametrize(
    ("form", "with_main_grad"),
    [
        ("in forward", True),
        *(
            pytest.param(*each, marks=pytest.mark.full)
            for each in (("recompute", False), ("recompute", True), ("in forward", False))
        ),
    ],
)
def test_fullgraph_at_two_lengths(form, with_main_grad):
    """The bits of eager, also with a group (of one rank), which the graph holds as a number."""
    torch._dynamo.reset()
    group, counter = SelfCommunicator(), CompileCounterWithBackend("aot_eager")
    call = compiled_call(form, group)
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    weights = [torch.nn.Parameter(drawn(11, 5, seed=2, dtype=torch.float32)) for _ in range(2)]
    if with_main_grad:
        ops.attach_main_grad(weights)
    for tokens in (6, 9, 7):
        xs = [drawn(tokens, 5, seed=1, dtype=torch.float32).requires_grad_() for _ in weights]
        losses = [run(x, w, ids(tokens, classes=11)) for run, x, w in zip((compiled, call), xs, weights, strict=True)]
        for loss in losses:
            loss.backward()
        assert torch.equal(*losses) and torch.equal(*(x.grad for x in xs))
        assert torch.equal(*(w.grad for w in weights)) and weights[0].grad.any()
    assert counter.frame_count <= 2


@pytest.mark.parametrize("reduction", ["mean", pytest.param("sum", marks=pytest.mark.full)])
def test_opcheck_of_the_form_in_forward(reduction):
    x, weight = (drawn(*s, seed=1, dtype=torch.float32).requires_grad_() for s in ((3, 5, 7), (11, 7)))
    options = fields(vocab_size=9, label_smoothing=0.1, z_loss=0.1, softcap=2.0, reduction=reduction)
    torch.library.opcheck(
        torch.ops.tpmp_kernels.linear_cross_entropy.default,
        (x, weight, ids(3, 5, classes=9), None, 1.0, False, *options),
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_the_form_in_forward(reentrant):
    inputs, target = [drawn(4, 5, seed=1), drawn(9, 5, seed=2)], ids(4, classes=9)
    expected = measured("in forward", inputs, target, 1.0)
    leaves = [t.requires_grad_() for t in inputs]
    loss = checkpoint(partial(call_of("in forward"), target=target), *leaves, use_reentrant=reentrant)
    loss.backward()
    assert all(torch.equal(a, b) for a, b in zip([loss, *(t.grad for t in leaves)], expected, strict=True))


# ---- refused


X, W, Z, T = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, 5), torch.tensor([1, 4])
BOTH = [
    (lambda t: t.int(), {}, TypeError, "target must hold ids as torch.int64, got torch.int32; pass target.long()"),
    (lambda t: t[:1], {}, ValueError, "target must have shape [2], got [1]; reshape it"),
    (
        lambda t: t + 1, {}, ValueError,
        "target must hold ids from 0 to 4 or ignore_index -100, got 5 for token 1; mask it with ignore_index",
    ),
    (
        lambda t: t - 2, {"ignore_index": 2}, ValueError,
        "target must hold ids from 0 to 4 or ignore_index 2, got -1 for token 0; mask it with ignore_index",
    ),
    (
        lambda t: t, {"vocab_size": 4}, ValueError,
        "target must hold ids from 0 to 3 or ignore_index -100, got 4 for token 1; mask it with ignore_index",
    ),
    (lambda t: t, {"reduction": "max"}, ValueError, "unknown reduction 'max'; expected one of mean, sum, none"),
    (
        lambda t: t, {"label_smoothing": 1.5}, ValueError,
        "label_smoothing must be from 0 to 1, got 1.5; pass 0.1 for a tenth",
    ),
    (
        lambda t: t, {"label_smoothing": float("nan")}, ValueError,
        "label_smoothing must be from 0 to 1, got nan; pass 0.1 for a tenth",
    ),
    (
        lambda t: t, {"z_loss": -1.0}, ValueError,
        "z_loss must be a finite number from 0 on, got -1.0; pass 0.0 for none",
    ),
    (
        lambda t: t, {"softcap": 0.0}, ValueError,
        "softcap must be a finite number above 0, got 0.0; pass None for no cap",
    ),
    (lambda t: t, {"vocab_size": 0}, ValueError, "vocab_size must be at least 1, got 0; pass the number of classes"),
    (
        lambda t: t, {"vocab_size": 6}, ValueError,
        "without other ranks the columns must be the ids from 0 to 5, got 5 from 0 on; pass the whole vocabulary, or "
        "the group that holds it",
    ),
    (
        lambda t: t, {"vocab_start": 1}, ValueError,
        "without other ranks the columns must be the ids from 0 to 4, got 5 from 1 on; pass the whole vocabulary, or "
        "the group that holds it",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("change", "options", "kind", "text"), BOTH, ids=[text for *_, text in BOTH])
def test_refused_in_one_sentence(change, options, kind, text):
    for op, inputs in (("cross_entropy", [Z]), ("linear_cross_entropy", [X, W])):
        with pytest.raises(kind) as refused:
            getattr(ops, op)(*inputs, change(T), **options)
        assert str(refused.value) == f"{op}: {text}"


def test_grad_scale_of_many_gradients_is_refused():
    with pytest.raises(ValueError) as refused:
        ops.linear_cross_entropy(X, W, T, grad_scale=1.0, reduction="none")
    assert str(refused.value) == (
        'linear_cross_entropy: grad_scale needs one gradient for all tokens, got reduction "none"; pass "sum" or "mean"'
    )


def test_a_group_must_outlive_its_losses_and_take_attributes():
    group, x = SelfCommunicator(), drawn(4, 5, seed=1).requires_grad_()
    loss = ops.linear_cross_entropy(x, drawn(9, 5, seed=2), ids(4, classes=9), group=group)
    del group
    with pytest.raises(RuntimeError, match=r"^ops: group \d+ is gone; keep it alive for as long as its losses"):
        loss.backward()

    class Slots:
        __slots__ = ("rank", "size")

    group = Slots()
    group.rank, group.size = 0, 1
    with pytest.raises(TypeError, match=r"^ops: group must be .*, got Slots; leave out its __slots__$"):
        ops.cross_entropy(Z, T, group=group)
