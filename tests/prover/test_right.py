"""A right model is found equal: no false alarm, for any layout, in fp64 and in fp32."""

from functools import partial

import pytest
import torch
from small_model import Model, Plain, batch, loss, parallel, parallel_loss, sequence_parallel
from torch import nn

from tpmp_kernels import verify
from tpmp_kernels.tensor_parallel import ColwiseParallel, RowwiseParallel

GRID = [(tp, pp, dtype) for tp in (1, 2, 4) for pp in (1, 2) for dtype in (torch.float64, torch.float32)]
SAMPLE = [(2, 1, torch.float64), (2, 2, torch.float32), (4, 1, torch.float32)]


def check(ranks, tp, pp, dtype, *, plan=parallel, **arguments):
    given = {"model_fn": Model, "loss": loss, "parallel_loss": parallel_loss, "microbatches": 3, **arguments}
    report = verify(batch=batch(), plan=plan, tp=tp, pp=pp, dtype=dtype, pool=ranks(tp * pp), **given)
    assert report.equal, report
    assert report.first is None and not report.notes, report
    return report


@pytest.mark.parametrize(("tp", "pp", "dtype"), SAMPLE)
def test_a_right_model_is_equal(ranks, tp, pp, dtype):
    report = check(ranks, tp, pp, dtype)
    # Not by looking away: every result, every gradient and every parameter of 2 layers is compared.
    compared = {(row.run, row.pass_): row.checks for row in report.rows}
    assert compared["replay", "forward"] >= 180 and compared["replay", "backward"] >= 260
    assert compared.get(("step", "replicas"), 0) == (0 if tp == 1 else 9)  # norms, and biases of row layers
    assert compared["step", "gradients"] == compared["replay", "update"] == compared["step", "weights"] == 31


@pytest.mark.full
@pytest.mark.parametrize(("tp", "pp", "dtype"), [each for each in GRID if each not in SAMPLE])
def test_a_right_model_is_equal_on_the_whole_grid(ranks, tp, pp, dtype):
    check(ranks, tp, pp, dtype)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("seed", range(20))
def test_no_false_alarm_in_many_draws(ranks, seed, dtype):
    check(ranks, 2, 1, dtype, seed=seed, plan=sequence_parallel if seed % 2 else parallel)


def test_sequence_parallel_with_partial_gradients_by_design(ranks):
    check(ranks, 2, 1, torch.float64, plan=sequence_parallel)


TABLE = {
    "embed": "embedding_rowwise",
    "layers.*.attention.[qkv]": ColwiseParallel(),
    "layers.*.mlp.up": ColwiseParallel(),
    "layers.*.attention.out": RowwiseParallel(),
    "layers.*.mlp.down": RowwiseParallel(),
    "head": "colwise_gather_output",
}


def test_a_table_that_parallelize_takes(ranks):
    check(ranks, 2, 1, torch.float32, plan=TABLE, parallel_loss=None)


SEQUENCE_TABLE = {
    **TABLE,
    "embed": "vocab_reduce_scatter",
    "layers.*.norm[12]": "activation",
    "layers.*.attention": "module_allgather",
    "layers.*.attention.out": "rowwise_reduce_scatter",
    "layers.*.mlp": "module_allgather",
    "layers.*.mlp.down": "rowwise_reduce_scatter",
    "norm": "module_allgather",
}


def test_a_table_whose_styles_change_layouts_in_hooks(ranks):
    check(ranks, 2, 1, torch.float64, model_fn=Plain, plan=SEQUENCE_TABLE, parallel_loss=None)


def test_adamw_makes_a_full_step_of_a_gradient_that_is_noise(ranks):
    """That of the keys' bias: what it is in fp32 decides about the update, and neither is wrong."""
    check(ranks, 2, 1, torch.float32, optimizer=partial(torch.optim.AdamW, lr=0.1, eps=1e-12))


class Stock(nn.Module):
    """With torch's own dropout, on what every rank holds whole. half: of a pipeline of two stages."""

    half = None

    def __init__(self, width: int = 12):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 8)
        self.drop0, self.drop1 = nn.Dropout(0.5), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.half != 1:
            x = self.act(self.up(self.drop0(x)))
        return x if self.half == 0 else self.drop1(self.act(self.down(x)))


def halved(module: Stock, comm, *, stage: int, stages: int) -> Stock:
    module.half = stage
    setattr(module, "up" if stage else "down", None)
    return module


def test_stock_dropout_in_the_stages_of_a_pipeline(ranks):
    """Stages draw by themselves, and microbatches in another order. What both of them call is not told apart."""
    report = verify(Stock, regression(), halved, tp=1, pp=2, microbatches=4, pool=ranks(2))
    assert report.equal, report
    assert [each for each in report.notes if each.startswith("act: ")]


def regression() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 5, 8, generator=generator), torch.randn(8, 5, 8, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_stock_dropout_has_the_masks_of_the_whole(ranks, dtype):
    plan = {"up": "colwise", "down": "rowwise"}
    report = verify(Stock, regression(), plan, tp=2, microbatches=2, dtype=dtype, pool=ranks(2))
    assert report.equal, report


def test_it_is_not_a_wide_bound_that_makes_equal(ranks):
    """A weight that is off by a millionth is found in fp64."""
    report = verify(Stock, regression(), partial(off_by, 1e-6), tp=1, pool=ranks(1), microbatches=2)
    assert (report.first.module, report.first.pass_) == ("down", "forward")


class OffBy(nn.Linear):
    by = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (1 + self.by)


def off_by(by: float, module: nn.Module, comm) -> nn.Module:
    module.down.__class__, module.down.by = OffBy, by
    return module
