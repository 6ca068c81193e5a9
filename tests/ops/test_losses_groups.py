"""Both losses over 2 to 4 ranks, their parts of the vocabulary uneven: the oracle's numbers, one exchange, refusals.

test_groups.py has more layouts on two ranks, and partial_dx.
"""

import multiprocessing
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from allocations import Allocations
from loss_oracle import FORMS, OF_FEATURES, assert_exact, call_of, drawn, exact, ids, inputs_of, measured, small_cuts

from tpmp_kernels import ops
from tpmp_kernels.comm import Communicator, communicator
from tpmp_kernels.ops.vocab_products import Products
from tpmp_kernels.tensor_parallel import VocabParallelHead, shard_of

# Imported once, in the ranks' fork server if that is not up yet, instead of by each of the ranks for seconds.
multiprocessing.get_context("forkserver").set_forkserver_preload(
    ["torch", "torch.distributed", "tpmp_kernels.testing", "tpmp_kernels.tensor_parallel"]
)

TOKENS, WIDTH, CLASSES, IGNORED = 7, 5, 53, 30
# (first id, rows) of each rank; rows from CLASSES on are padding.
LAYOUTS = [
    [(1, 52), (0, 1)],
    [(31, 27), (0, 31), (31, 0)],
]
MORE_LAYOUTS = [
    [(0, 52), (52, 1)],
    [(0, 1), (1, 30), (31, 27)],
    [(3, 50), (0, 1), (1, 2)],
    [(0, 20), (20, 3), (23, 0), (23, 30)],
    [(0, 13), (13, 1), (14, 38), (52, 6)],
]
OPTIONS = [
    {},
    {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 20.0, "ignore_index": IGNORED, "reduction": "none"},
    {"label_smoothing": 0.3, "z_loss": 0.02, "ignore_index": IGNORED, "reduction": "sum"},
]


class Counted:
    """Test double of a group: passes each exchange on to a communicator and writes down what this rank sent."""

    def __init__(self, comm: Communicator):
        self.comm, self.rank, self.size, self.sent = comm, comm.rank, comm.size, []

    def all_gather(self, output, input, *, tag):
        self.sent.append(("all_gather", input.nbytes))
        return self.comm.all_gather(output, input, tag=tag)

    def all_reduce(self, tensor, *, tag):
        self.sent.append(("all_reduce", tensor.nbytes))
        return self.comm.all_reduce(tensor, tag=tag)


def whole(form: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Logits that differ by 200 between ranks: an exponential of one rank's over another's peak overflows in fp32."""
    x, weight = drawn(TOKENS, WIDTH, seed=1), drawn(CLASSES, WIDTH, seed=2)
    weight[[0, 13, 52]] *= 40
    return [t.to(dtype) for t in inputs_of(form, x, weight)]


def targets(ignore_index: int = -100) -> torch.Tensor:
    """The first and the last class, those of the smallest parts, and an ignored token."""
    return torch.tensor([0, 52, 13, ignore_index, 22, 31, 40])


def upstream_of(options: dict):
    return drawn(TOKENS, seed=3) if options.get("reduction") == "none" else 0.75


def part(t: torch.Tensor, start: int, rows: int, value: float) -> torch.Tensor:
    """Rows start .. start + rows of t, those behind its end being `value`."""
    return F.pad(t, (0, 0, 0, rows), value=value)[start : start + rows]


def cases() -> list[tuple]:
    return [
        (form, options, dtype, cuts)
        for form in FORMS
        for options in OPTIONS
        for dtype in (torch.float64, torch.float32)
        for cuts in (nullcontext, small_cuts)
        if not (form == "in forward" and options.get("reduction") == "none")
    ]


def run_layout(layout: list[tuple[int, int]]) -> list[tuple]:
    """Of each case (results, what was sent in forward and in backward)."""
    start, rows = layout[dist.get_rank()]
    done = []
    with communicator(dist.group.WORLD, name="losses") as comm:
        for form, options, dtype, cuts in cases():
            *features, last = whole(form, dtype)
            own = part(last.t() if form == "logits" else last, start, rows, torch.nan)
            leaves = [t.clone().requires_grad_() for t in (*features, own.t() if form == "logits" else own)]
            group, upstream = Counted(comm), upstream_of(options)
            with cuts():
                loss = call_of(form, upstream)(
                    *leaves, targets(options.get("ignore_index", -100)),
                    group=group, vocab_start=start, vocab_size=CLASSES, **options,
                )  # fmt: skip
                forward = list(group.sent)
                grads = torch.autograd.grad(loss, leaves, torch.as_tensor(upstream, dtype=dtype).expand(loss.shape))
            done.append(([loss.detach(), *grads], forward, group.sent[len(forward) :]))
    return done


@pytest.mark.parametrize(
    "layout", [*LAYOUTS, *(pytest.param(each, marks=pytest.mark.full) for each in MORE_LAYOUTS)], ids=str
)
def test_uneven_parts_make_up_the_whole_loss(ranks, layout):
    """Loss and dx are the same bits on each rank; in fp64 all is exact. For each token, a rank sends four numbers."""
    of_ranks = ranks(len(layout)).run(run_layout, layout)
    for i, (form, options, dtype, cuts) in enumerate(cases()):
        results, forward, backward = zip(*(each[i] for each in of_ranks), strict=True)
        target, upstream = targets(options.get("ignore_index", -100)), upstream_of(options)
        loss, *dx, last = exact(form, whole(form, dtype), target, upstream, **options)
        for (start, rows), (own_loss, *own_dx, own) in zip(layout, results, strict=True):
            assert torch.equal(own_loss, results[0][0]) and all(map(torch.equal, own_dx, results[0][1:-1]))
            expected = part(last.t(), start, rows, 0).t() if form == "logits" else part(last, start, rows, 0)
            if dtype == torch.float64:
                assert_exact([own_loss, *own_dx, own], [loss, *dx, expected], (form, options))
            else:
                for got, truth, size in zip(
                    (own_loss, *own_dx, own), (loss, *dx, expected), (loss, *dx, last), strict=True
                ):
                    assert ((got - truth).abs() <= 1e-5 * size.abs().max()).all()
            assert not own[..., CLASSES - start :].any() if form == "logits" else not own[CLASSES - start :].any()

        chunks = [2, 2, 2, 1] if form == "in forward" and cuts is small_cuts else [TOKENS]
        statistics = [("all_gather", 4 * tokens * dtype.itemsize + 32) for tokens in chunks]  # 32: the layout
        of_dx = [] if form == "logits" else [("all_reduce", TOKENS * WIDTH * dtype.itemsize)]
        first, then = (statistics + of_dx, []) if form == "in forward" else (statistics, of_dx)
        assert all(sent == first for sent in forward) and all(sent == then for sent in backward)


def run_confident() -> list[torch.Tensor]:
    """d of the targets: this rank's own, 0 where another owns it."""
    z, target = confident()
    with communicator(dist.group.WORLD, name="confident") as comm:
        own = z[:, comm.rank * 25 :][:, :25]
        (d,) = measured("logits", [own], target, 1.0, reduction="sum", group=comm, vocab_size=50)[1:]
        x, weight = z.clone().requires_grad_(), torch.eye(50)[comm.rank * 25 :][:25]
        (dx,) = torch.autograd.grad(
            ops.linear_cross_entropy(x, weight, target, reduction="sum", group=comm, vocab_size=50), x
        )
        place = (target - 25 * comm.rank).clamp(0, 24)
        mine = d.gather(1, place[:, None]).squeeze(1).where(place == target - 25 * comm.rank, 0)
        return [mine, dx.gather(1, target[:, None]).squeeze(1)]


def confident() -> tuple[torch.Tensor, torch.Tensor]:
    z, target = drawn(6, 50, seed=1, dtype=torch.float32) / 2, torch.tensor([0, 49, 24, 25, 10, 40])
    z[torch.arange(6), target] = torch.linspace(16, 26, 6)
    return z, target


def test_a_confident_token_keeps_its_gradient_over_ranks(ranks):
    """p within 1e-5 .. 1e-10 of 1; see test_losses_precision.py."""
    z, target = confident()
    others = z.double().scatter(1, target[:, None], -torch.inf).logsumexp(1)
    missing = (others - torch.linspace(16, 26, 6).double()).sigmoid()
    (a, dx), (b, _) = ranks(2).run(run_confident)
    for d in (a + b, dx):
        assert ((d + missing).abs() <= 1e-6 * missing).all()


# ---- memory


def run_memory(form: str) -> tuple[float, float]:
    """The largest result and the peak, as parts of this rank's logits of all tokens."""
    start, rows = [(0, 4700), (4700, 300)][dist.get_rank()]
    x, weight = (drawn(n, 4, seed=1, dtype=torch.float32).requires_grad_() for n in (520, rows))
    target = ids(520, classes=5000)
    with communicator(dist.group.WORLD, name="memory") as comm, Allocations(x, weight, target) as seen:
        place = {"group": comm, "vocab_start": start, "vocab_size": 5000}
        call_of(form)(x, weight, target, softcap=2.0, label_smoothing=0.1, **place).backward()
    return seen.largest / (520 * rows), seen.peak / (520 * rows)


@pytest.mark.parametrize("form", OF_FEATURES)
def test_the_logits_of_all_tokens_never_exist_on_a_rank(ranks, form):
    """The large part has three slices of 2048 ids; the small one is a single slice."""
    (largest, peak), _ = ranks(2).run(run_memory, form)
    assert 0.1 < largest < 0.45 and peak < 0.7


# ---- the output layer


def run_head(sequence_parallel: bool, options: dict) -> list[torch.Tensor]:
    """(loss, dx, dweight) of this rank; x is its rows where they are cut."""
    with communicator(dist.group.WORLD, name="head") as comm:
        head = VocabParallelHead(
            WIDTH, CLASSES, comm, padded_vocab=60, sequence_parallel=sequence_parallel, dtype=torch.float64
        )
        x, weight = drawn(6, WIDTH, seed=1), drawn(CLASSES, WIDTH, seed=2)
        head.weight.data.copy_(shard_of(weight, head.weight, comm))
        x = (x.chunk(comm.size)[comm.rank] if sequence_parallel else x).clone().requires_grad_()
        loss = head.loss(x, targets()[:6], **options)
        return [loss.detach(), *torch.autograd.grad(loss, [x, head.weight])]


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("form", OF_FEATURES)
def test_the_loss_of_a_head_smooths_over_classes_and_not_over_padding(ranks, form, sequence_parallel):
    options = {"label_smoothing": 0.2, "z_loss": 0.01, "softcap": 3.0}
    loss, dx, dweight = exact(
        form, [drawn(6, WIDTH, seed=1), drawn(CLASSES, WIDTH, seed=2)], targets()[:6], 1.0, **options
    )
    scale = {"grad_scale": 1.0} if form == "in forward" else {}
    results = ranks(3).run(run_head, sequence_parallel, {**options, **scale})
    for rank, got in enumerate(results):
        own_dx = dx.chunk(3)[rank] if sequence_parallel else dx
        assert_exact(got, [loss, own_dx, part(dweight, 20 * rank, 20, 0)], rank)


# ---- refused


def run_refused(what: str, op: str) -> tuple[str, list, float]:
    """(how this rank refused, what it had sent, a good loss afterwards)."""
    x, weight, target = drawn(TOKENS, WIDTH, seed=1), drawn(8, WIDTH, seed=2), torch.arange(TOKENS)
    with communicator(dist.group.WORLD, name="refused") as comm:
        start, group = 4 * comm.rank, Counted(comm)
        bad = {
            "whole": (weight, 0, 8, target, {}),
            "gap": (weight[start : start + 3], start, 8, target, {}),
            "options": (weight[start : start + 4], start, 8, target, {"label_smoothing": 0.1 * comm.rank}),
            "size": (weight[start : start + 4], start, 8 - comm.rank, target % 7, {}),
            "no size": (weight[start : start + 4], start, None, target, {}),
            "class": (weight[start : start + 4], start, 8, target + 2, {}),
            "dtype": (weight[start : start + 4], start, 8, target.int(), {}),
            "shape": (weight[start : start + 4], start, 8, target[:3], {}),
        }

        def run(weight, start, size, target, options):
            inputs = inputs_of("logits" if op == "cross_entropy" else "recompute", x, weight)
            place = {"group": group, "vocab_start": start, "vocab_size": size}
            return getattr(ops, op)(*inputs, target, **place, **options)

        try:
            run(*bad[what])
        except (ValueError, TypeError) as error:
            text = f"{type(error).__name__}: {error}"
        sent = [kind for kind, _ in group.sent]
        return text, sent, float(run(weight[start : start + 4], start, 8, target, {}))


TILE = (
    "the rows of all ranks must tile the ids 0:8 with no gap and no overlap, got {}; pass vocab_start and vocab_size "
)
TILE += "to match the weight"
REFUSED = {
    "whole": ("ValueError", TILE.format("0:8, 0:8")),
    "gap": ("ValueError", TILE.format("0:3, 4:7")),
    "options": (
        "ValueError",
        "label_smoothing, z_loss, softcap, ignore_index and grad_scale must be the same on all ranks, but differ; pass "
        "the same",
    ),
    "size": ("ValueError", "vocab_size must be the same on all ranks, got [8, 7]; pass one"),
    "no size": (
        "ValueError",
        "vocab_size is needed on a group of 2 ranks; pass the number of classes, without padding",
    ),
    "class": (
        "ValueError",
        "target must hold ids from 0 to 7 or ignore_index -100, got 8 for token 6; mask it with ignore_index",
    ),
    "dtype": ("TypeError", "target must hold ids as torch.int64, got torch.int32; pass target.long()"),
    "shape": ("ValueError", "target must have shape [7], got [3]; reshape it"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_every_rank_refuses_in_the_same_sentence_and_can_go_on(ranks, what):
    """What one rank can see, it refuses before any exchange."""
    kind, text = REFUSED[what]
    for op in ("cross_entropy", "linear_cross_entropy"):
        expected = exact(
            "recompute", [drawn(TOKENS, WIDTH, seed=1), drawn(8, WIDTH, seed=2)], torch.arange(TOKENS), 1.0
        )
        for refused, sent, loss in ranks(2).run(run_refused, what, op):
            assert refused == f"{kind}: {op}: {text}"
            assert sent == (["all_gather"] if what in ("whole", "gap", "options", "size") else [])
            assert abs(loss - expected[0]) <= 1e-13


# ---- dX on its way under dW


class Overlapping(Counted):
    """One that overlaps: what is posted is written down, and so is its end."""

    overlaps = True

    def all_reduce(self, tensor, *, tag, async_op=False):
        work = self.comm.all_reduce(tensor, tag=tag, async_op=async_op)
        self.sent.append("posted" if async_op else "blocking")
        return work if not async_op else _Noted(work, self.sent)


class _Noted:
    def __init__(self, work, sent: list):
        self._work, self._sent = work, sent

    def wait(self) -> None:
        self._work.wait()
        self._sent.append("waited")


def overlapped(scale: float | None) -> tuple[list, bool]:
    """What the gradients sent and did, in order, and whether they have the bits of a group that does not overlap."""
    with communicator(dist.group.WORLD, transport="shm") as comm, small_cuts(), pytest.MonkeyPatch.context() as patch:
        ids, noted, grads, put = (
            [slice(0, 31), slice(31, CLASSES)][comm.rank],
            Overlapping(comm),
            [],
            Products.put_dweight,
        )

        def put_and_note(*args, **named):
            noted.sent.append("dW")
            put(*args, **named)

        patch.setattr(Products, "put_dweight", put_and_note)
        for group in (comm, noted):
            noted.sent.clear()
            x = drawn(TOKENS, WIDTH, seed=1).float().requires_grad_()
            weight = drawn(CLASSES, WIDTH, seed=2).float()[ids].clone().requires_grad_()
            loss = ops.linear_cross_entropy(
                x, weight, targets(), group=group, vocab_start=ids.start, vocab_size=CLASSES, grad_scale=scale
            )
            loss.backward()
            grads.append((x.grad, weight.grad))
        return [what for what in noted.sent if isinstance(what, str)], all(map(torch.equal, *grads))


@pytest.mark.parametrize("scale", [None, 1.0])
def test_dx_is_on_its_way_under_dw(ranks, scale):
    for sent, equal in ranks(2).run(overlapped, scale):
        assert equal
        first, last = sent.index("posted"), len(sent) - 1 - sent[::-1].index("dW")
        assert first < last < sent.index("waited"), sent
        assert "blocking" not in sent and sent.count("posted") == sent.count("waited") == (1 if scale is None else 4)
