"""The layout of a run: where each rank stands, and what others hear when one fails."""

from dataclasses import replace

from tpmp_kernels.errors import PeerFailed
from tpmp_kernels.training.config import Config, ParallelConfig
from tpmp_kernels.training.layout import layout

CONFIG = replace(Config(), parallel=ParallelConfig(tp=2, pp=2))


def run_places():
    with layout(CONFIG, "cpu") as where:
        return where.pp.rank, where.tp.rank, where.world.rank


def test_tensor_parallel_ranks_are_neighbours(ranks):
    assert ranks(4).run(run_places) == [(0, 0, 0), (0, 1, 1), (1, 0, 2), (1, 1, 3)]


def run_failing():
    with layout(CONFIG, "cpu") as where:
        if where.world.rank == 2:
            raise LookupError("the very cause")
        where.world.barrier()


def test_an_exception_on_one_rank_reaches_the_others_with_its_text(ranks):
    outcomes = ranks(4).outcomes(run_failing)
    assert isinstance(outcomes[2].error, LookupError)
    for rank in (0, 1, 3):
        assert isinstance(outcomes[rank].error, PeerFailed)
        assert "LookupError: the very cause" in str(outcomes[rank].error) and outcomes[rank].error.culprit == 2
