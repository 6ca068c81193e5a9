"""Both losses on a CUDA device: kernels within their bounds, the ops against fp64, parts of a vocabulary, memory."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from bounds import UNIT, assert_no_worse_than_torch, assert_within
from loss_bounds import gradient_bound, statistics_bounds
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
    of_logits,
    of_torch,
    small_cuts,
)
from loss_shards import on_each_rank

from tpmp_kernels import ops

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
NARROW = [torch.bfloat16, torch.float16, torch.float32]
# The whole of the kernels' own error: exponentials of differences up to 30, and sums of some hundred of them.
WIDE = 1e-5
ALL = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 30.0}
each_form = pytest.mark.parametrize("form", FORMS)
each_form_of_features = pytest.mark.parametrize("form", OF_FEATURES)
each_dtype = pytest.mark.parametrize("dtype", NARROW, ids=str)


def on_device(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.to(DEVICE) for t in tensors]


def needs_memory(gigabytes: int) -> None:
    if torch.cuda.mem_get_info()[0] < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GiB of free GPU memory")


# ---- kernels


@each_dtype
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("shape", [(1, 1), (0, 5), (67, 131), (33, 5000), (2048, 4099)], ids=str)
def test_cuda_loss_kernels_are_within_their_bounds(dtype, softcap, shape):
    """Columns adjacent and rows adjacent, targets beside the piece, ids beyond 32 bits; the same bits again."""
    from tpmp_kernels.kernels import cross_entropy as kernel

    (m, n), first = shape, 2**31 + 5
    z = drawn(n, m, seed=1).mul(5).to(DEVICE, dtype)
    target = (torch.randint(-2, n + 2, (m,), generator=torch.Generator().manual_seed(2)) + first).to(DEVICE)
    target[::5] = -100
    scale, target_scale, truth, shift = (drawn(m, seed=s).float().to(DEVICE) for s in (3, 4, 5, 6))
    for logits in (z.t(), z.t().contiguous()):
        found, again = (kernel.statistics(logits, target, first, softcap, shortfall=True) for _ in range(2))
        assert torch.equal(found, again)
        if m:
            bounds = statistics_bounds(logits, target, first, softcap, steps=-(-n // kernel.STATISTICS_BLOCK[1]))
            for got, (oracle, bound) in zip(found, bounds, strict=True):
                assert_within(got, oracle, bound)
        rows = [found[0], scale, target_scale, truth, shift]
        over = logits.clone()
        for source, out in ((over, over), (logits, torch.empty(m, n, device=DEVICE))):
            kernel.gradient(source, out, target, first, *rows, softcap=softcap)
            oracle, bound = gradient_bound(logits, target, first, *rows, softcap, unit=UNIT[out.dtype], dtype=out.dtype)
            assert_within(out, oracle, bound)


def test_cuda_loss_offsets_past_two_to_the_31():
    """2^31 + 2^17 logits: loss and gradient of the last tokens are right only with 64-bit offsets."""
    m, n = 2**15 + 2, 2**16
    needs_memory(24)
    z = torch.empty(m, n, device=DEVICE, dtype=torch.bfloat16).normal_().requires_grad_()
    target = torch.arange(m, device=DEVICE)
    loss = ops.cross_entropy(z, target, reduction="none")
    loss.sum().backward()
    for rows in (slice(0, 2), slice(m - 2, m)):
        oracle, d = of_logits(z[rows], target[rows], 1.0, reduction="none")
        assert_within(loss.detach()[rows], oracle, WIDE * oracle.abs())
        assert_within(z.grad[rows], d, (UNIT[z.dtype] + WIDE) * d.abs() + 1e-9)


# ---- numbers


@each_form
@pytest.mark.parametrize("dtype", [torch.float64, *NARROW], ids=str)
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "small cuts"])
def test_cuda_losses_follow_fp64(form, dtype, cut):
    """Every option, some tokens ignored, and padding; twice the same bits, and at most twice torch's error."""
    tokens, classes, width = (40, 70, 32) if cut else (257, 1031, 64)
    x, weight = on_device(drawn(tokens, width, seed=1), drawn(classes, width, seed=2) / width**0.5)
    target = ids(tokens, classes=classes - 6).to(DEVICE)
    target[::7] = 3
    for options in ({}, {**ALL, "ignore_index": 3}, {**ALL, "reduction": "none", "vocab_size": classes - 5}):
        if form == "in forward" and options.get("reduction") == "none":
            continue
        inputs = [t.to(dtype) for t in inputs_of(form, x, weight)]
        upstream = drawn(tokens, seed=3, dtype=dtype).double().to(DEVICE) if "reduction" in options else 0.5
        case = form, inputs, target, upstream
        with small_cuts() if cut else nullcontext():
            got, again = (measured(*case, **options) for _ in range(2))
        assert all(map(torch.equal, got, again))
        oracle = exact(*case, **options)
        if dtype is torch.float64:
            assert_exact(got, oracle, options)
            continue
        (loss, *grads), (true_loss, *truths) = got, oracle
        assert_within(loss, true_loss, WIDE * (1 + true_loss.abs()))
        for ours, truth in zip(grads, truths, strict=True):
            assert (ours.double() - truth).abs().max() <= (2 * UNIT[dtype] + WIDE) * truth.abs().max()
        if not options:
            for ours, theirs, truth in zip(grads, of_torch(*case)[1:], truths, strict=True):
                assert_no_worse_than_torch(ours, theirs, truth)


@each_form
@each_dtype
def test_cuda_confident_token_keeps_its_gradient_and_its_loss(form, dtype):
    """p within 1e-4 .. 1e-11 of 1; see test_losses_precision.py."""
    tokens, classes, upstream = 8, 50, 8192.0 if dtype == torch.float16 else 1.0
    z, target = (drawn(tokens, classes, seed=1) / 2).to(DEVICE, dtype), ids(tokens, classes=classes).to(DEVICE)
    z[torch.arange(tokens), target] = torch.linspace(14, 28, tokens).to(DEVICE, dtype)
    inputs = inputs_of(form, z, torch.eye(classes, dtype=dtype, device=DEVICE))
    loss, d, *_ = measured(form, inputs, target, upstream, reduction="sum")
    of_target = [t.double().gather(1, target[:, None]).squeeze(1) for t in (z, d)]
    behind = z.double().scatter(1, target[:, None], -torch.inf).logsumexp(1) - of_target[0]
    missing, tiny = behind.sigmoid(), torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    error = (of_target[1] / upstream + missing).abs()
    assert (error <= (UNIT[dtype] + WIDE) * missing + tiny / upstream).all()
    assert (loss - F.softplus(behind).sum()).abs() <= WIDE * loss


@each_form_of_features
@each_dtype
def test_cuda_slices_and_chunks_as_shipped(form, dtype):
    """Three of each, the last of which is smaller."""
    tokens, classes, width = 5000, 40009, 16
    needs_memory(24)
    x, weight = (drawn(*s, seed=s[0]).to(DEVICE, dtype) for s in ((tokens, width), (classes, width)))
    target, options = ids(tokens, classes=classes).to(DEVICE), {"label_smoothing": 0.1, "reduction": "sum"}
    loss, *grads = measured(form, [x, weight], target, 1.0, **options)
    true_loss, d = of_logits(x.double() @ weight.double().t(), target, 1.0, **options)
    unit = UNIT[dtype]
    assert_within(loss, true_loss, WIDE * true_loss)
    for got, left, right in zip(grads, (d, d.t()), (weight, x), strict=True):
        size = left.abs() @ right.double().abs()
        # d is rounded to the dtype, and dW where a chunk is added to it.
        assert_within(got, left @ right.double(), (4 * unit + WIDE) * size + torch.finfo(dtype).smallest_normal)


# ---- parts of a vocabulary, main_grad, memory, compile


@each_form
@each_dtype
@pytest.mark.parametrize("layout", [[(0, 517), (517, 1), (518, 600)], [(400, 631), (0, 400)]], ids=str)
def test_cuda_uneven_parts_make_up_the_whole_loss(form, dtype, layout):
    tokens, classes, width = 67, 1031, 32
    x, weight = (drawn(*s, seed=s[0]).to(DEVICE, dtype) for s in ((tokens, width), (classes, width)))
    options, target = {**ALL, "ignore_index": 1}, ids(tokens, classes=classes).to(DEVICE)
    target[:5] = torch.tensor([0, 1030, 517, 516, 1])
    *features, last = inputs_of(form, x, weight)
    last = last.t() if form == "logits" else last

    def run(group):
        start, rows = layout[group.rank]
        own = F.pad(last, (0, 0, 0, rows), value=torch.nan)[start : start + rows]
        place = {"group": group, "vocab_start": start, "vocab_size": classes}
        place |= {} if form == "logits" else {"partial_dx": True}
        return measured(form, [*features, own.t() if form == "logits" else own], target, 0.75, **place, **options)

    loss, *dx, whole = exact(form, [*features, last.t() if form == "logits" else last], target, 0.75, **options)
    whole, results, unit = whole.t() if form == "logits" else whole, on_each_rank(len(layout), run), UNIT[dtype]
    for (start, rows), (own_loss, *_, own) in zip(layout, results, strict=True):
        assert torch.equal(own_loss, results[0][0])
        assert_within(own_loss, loss, WIDE * loss)
        own, expected = own.t() if form == "logits" else own, whole[start : start + rows]
        assert (own[: len(expected)] - expected).abs().max() <= (2 * unit + WIDE) * whole.abs().max()
        assert not own[len(expected) :].any()
    for total in dx:
        parts = torch.stack([part.double() for _, part, _ in results])
        assert (parts.sum(0) - total).abs().max() <= (2 * unit + WIDE) * parts.abs().sum(0).max()


@each_form_of_features
@each_dtype
def test_cuda_main_grad_adds_up_in_fp32(form, dtype):
    weight = torch.nn.Parameter(drawn(300, 32, seed=9).to(DEVICE, dtype))
    ops.attach_main_grad([weight])
    total = torch.zeros(300, 32, dtype=torch.float64, device=DEVICE)
    size = torch.zeros_like(total)
    for seed in range(3):
        x, target = drawn(130, 32, seed=seed).to(DEVICE, dtype).requires_grad_(), ids(130, classes=300).to(DEVICE)
        call_of(form)(x, weight, target).backward()
        _, d = of_logits(x.detach().double() @ weight.detach().double().t(), target, 1.0)
        total += d.t() @ x.detach().double()
        size += d.t().abs() @ x.detach().double().abs()
    assert_within(weight.main_grad, total, (UNIT[dtype] + WIDE) * size + 1e-9)


@each_form_of_features
def test_cuda_the_logits_of_all_tokens_never_exist(form):
    """16384 tokens of 65536 classes: 4 GiB of logits in fp32, of which a slice or a chunk is alive."""
    needs_memory(8)
    tokens, classes = 16384, 65536
    x, weight = (torch.randn(n, 64, device=DEVICE).bfloat16().requires_grad_() for n in (tokens, classes))
    target = torch.randint(classes, (tokens,), device=DEVICE)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call_of(form)(x, weight, target, **ALL).backward()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 0.4 * 4 * tokens * classes


@each_form
def test_cuda_loss_in_fullgraph_has_the_bits_of_eager(form):
    torch._dynamo.reset()
    inputs = [t.bfloat16() for t in inputs_of(form, *on_device(drawn(67, 32, seed=1), drawn(300, 32, seed=2)))]
    target, results = ids(67, classes=300).to(DEVICE), []

    def call(*inputs):
        return call_of(form)(*inputs, target, **ALL)

    for run in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in inputs]
        loss = run(*leaves)
        loss.backward()
        results.append([loss.detach(), *(t.grad for t in leaves)])
    assert all(map(torch.equal, *results))
