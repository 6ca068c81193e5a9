"""A vocabulary over ranks in parts of any size, padding among them, against the whole loss; layouts that are none."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tpmp_kernels import ops
from tpmp_kernels.comm import SelfCommunicator, communicator
from tpmp_kernels.ops.groups import check_layouts

TOKENS, HIDDEN, CLASSES = 6, 4, 5
OPTIONS = ({}, {"reduction": "sum", "label_smoothing": 0.1, "z_loss": 0.01})


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def targets() -> torch.Tensor:
    return torch.arange(TOKENS) % CLASSES


def whole(options: dict) -> list[torch.Tensor]:
    """(loss, dx, dweight, dlogits)."""
    x, weight = drawn(TOKENS, HIDDEN, seed=1).requires_grad_(), drawn(CLASSES, HIDDEN, seed=2).requires_grad_()
    logits = F.linear(x, weight)
    loss = ops.cross_entropy(logits, targets(), **options)
    return [loss.detach(), *torch.autograd.grad(loss, [x, weight, logits])]


def run_layout(layout: list[tuple[int, int]], options: dict, backend: str, how: dict) -> list[torch.Tensor]:
    """Of this rank's rows start .. start + count: (loss, dx, dweight, dlogits)."""
    start, count = layout[dist.get_rank()]
    padding = 9.0 if backend == "reference" else torch.nan  # which the op does not read
    padded = F.pad(drawn(CLASSES, HIDDEN, seed=2), (0, 0, 0, 16), value=padding)
    x, weight = drawn(TOKENS, HIDDEN, seed=1).requires_grad_(), padded[start : start + count].clone().requires_grad_()
    logits = F.linear(x.detach(), weight.detach()).requires_grad_()
    with communicator(dist.group.WORLD, name="layout") as comm, ops.use_backend(backend):
        place = {"group": comm, "vocab_start": start, "vocab_size": CLASSES, **options}
        loss = ops.linear_cross_entropy(x, weight, targets(), **place, **how)
        of_logits = ops.cross_entropy(logits, targets(), **place)
        assert (loss - of_logits).abs() <= 1e-14 * loss
        grads = torch.autograd.grad(loss, [x, weight])
        return [loss.detach(), *grads, *torch.autograd.grad(of_logits, logits)]


LAYOUTS = {
    "padding behind, and a rank of nothing else": [(0, 8), (8, 8)],
    "the later ids first": [(2, 9), (0, 2)],
    "no rows at all": [(5, 0), (0, 5)],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_parts_of_a_vocabulary_make_up_the_whole_loss(ranks, layout):
    parts = LAYOUTS[layout]
    for options, backend, how in [
        *((each, backend, {}) for each in OPTIONS for backend in ("cpu", "reference")),
        (OPTIONS[1], "cpu", {"grad_scale": 1.0}),
    ]:
        loss, dx, dweight, dlogits = whole(options)
        for (start, count), found in zip(parts, ranks(2).run(run_layout, parts, options, backend, how), strict=True):
            real = max(0, min(count, CLASSES - start))
            own = F.pad(dweight[start : start + real], (0, 0, 0, count - real))
            of_logits = F.pad(dlogits[:, start : start + real], (0, count - real))
            for got, want in zip(found, (loss, dx, own, of_logits), strict=True):
                assert got.shape == want.shape and (got - want).abs().sum() <= 1e-13, (options, backend)


def run_partial(how: dict, backend: str) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """dx as the ranks' parts add up to it, dx, and the collectives that led to the parts."""
    with communicator(dist.group.WORLD, name="partial") as comm, ops.use_backend(backend):
        weight, called, collect = drawn(8, HIDDEN, seed=2)[4 * comm.rank : 4 * comm.rank + 4], [], comm._collect

        def dx(partial: bool) -> torch.Tensor:
            x = drawn(TOKENS, HIDDEN, seed=1).requires_grad_()
            place = {"group": comm, "vocab_size": CLASSES, "partial_dx": partial}
            return torch.autograd.grad(ops.linear_cross_entropy(x, weight, targets(), **place, **how), x)[0]

        complete = dx(False)
        comm._collect = lambda call, *rest: (called.append(call.kind), collect(call, *rest))[1]
        part = dx(True)
        comm._collect = collect
        return comm.all_reduce(part.clone()), complete, called


@pytest.mark.parametrize("how", [{}, {"grad_scale": 1.0}])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_partial_dx_is_not_sent_and_adds_up_to_the_whole(ranks, how, backend):
    for added, complete, called in ranks(2).run(run_partial, how, backend):
        assert (added - complete).abs().max() <= 1e-15
        assert set(called) == {"all_gather"}  # of the statistics


def group(size: int) -> SelfCommunicator:
    comm = SelfCommunicator()
    comm.size = size
    return comm


def test_a_weight_that_was_not_cut_is_refused():
    with pytest.raises(ValueError) as refused:
        ops.linear_cross_entropy(
            torch.zeros(TOKENS, HIDDEN), torch.zeros(8, HIDDEN), targets(), group=group(2), vocab_size=8
        )
    assert str(refused.value) == (
        "linear_cross_entropy: in equal parts, 8 for each of 2 ranks, rank 0 would hold the whole vocabulary of 8; "
        "pass each rank its own part, vocab_start where the others hold padding, or no group"
    )


@pytest.mark.parametrize(
    ("layouts", "match"),
    [
        (
            [(0, 5, 5, 0), (0, 5, 5, 0)],
            "the rows of all ranks must tile the ids 0:5 .*, got 0:5, 0:5; pass vocab_start",
        ),
        ([(0, 2, 5, 0), (3, 4, 5, 0)], "must tile the ids 0:5 .*, got 0:2, 3:7"),
        ([(0, 2, 5, 0), (2, 2, 5, 0)], "must tile the ids 0:5 .*, got 0:2, 2:4"),
        ([(0, 2, 5, 0), (2, 4, 6, 0)], r"vocab_size must be the same on all ranks, got \[5, 6\]; pass one"),
        ([(0, 2, 5, 0), (2, 4, 5, 1)], "must be the same on all ranks, but differ; pass the same"),
    ],
)
def test_layouts_of_no_one_vocabulary_are_refused(layouts, match):
    with pytest.raises(ValueError, match=f"^op: .*{match}"):
        check_layouts("op", layouts)
