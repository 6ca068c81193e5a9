"""Times of several hosts become those of one clock."""

import time

import pytest
import torch.distributed as dist

from tpmp_kernels.comm import communicator
from tpmp_kernels.training.clock import clock_offset


def run(hosts: list[int], ahead: list[float]) -> float:
    """The offset of a rank whose clock is ahead."""
    with communicator(dist.group.WORLD, name="world") as comm:
        mine = ahead[comm.rank]
        return clock_offset(comm, clock=lambda: time.perf_counter() + mine, host=hosts[comm.rank])


def test_clocks_of_other_hosts_are_set_by_rank_0s(ranks):
    offsets = ranks(4).run(run, [7, 7, 8, 9], [100.0, 100.0, 40.0, 250.0])
    assert offsets[:2] == [0.0, 0.0]
    assert offsets[2:] == pytest.approx([60.0, -150.0], abs=0.05)


def run_here() -> float:
    with communicator(dist.group.WORLD, name="world") as comm:
        return clock_offset(comm)


def test_ranks_of_one_host_have_one_clock(ranks):
    assert ranks(2).run(run_here) == [0.0, 0.0]
