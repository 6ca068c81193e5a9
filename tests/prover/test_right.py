"""A right model is found equal: no false alarm, for any layout, in fp64 and in fp32."""

from functools import partial

import pytest
import torch
from small_model import STEP, Model, batch, loss, parallel, parallel_loss, sequence_parallel
from torch import nn

from tpmp_kernels import verify
from tpmp_kernels.tensor_parallel import ColwiseParallel, RowwiseParallel

GRID = [(tp, pp, dtype) for tp in (1, 2, 4) for pp in (1, 2) for dtype in (torch.float64, torch.float32)]
SAMPLE = [(1, 2, torch.float64), (2, 1, torch.float64), (2, 2, torch.float32), (4, 1, torch.float32)]


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


class Stock(nn.Module):
    """With torch's own dropout, on what every rank holds whole."""

    def __init__(self, width: int = 12):
        super().__init__()
        self.up, self.act, self.down, self.drop = nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 8), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.down(self.act(self.up(self.drop(x)))))


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


assert STEP["microbatches"] == 3
