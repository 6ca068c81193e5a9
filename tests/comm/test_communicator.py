"""The choice of a transport is the same on every rank, and bad arguments are refused by name."""

import logging
import math
import types

import pytest
import torch
import torch.distributed as dist

from tpmp_kernels.comm import SelfCommunicator, communicator, meeting
from tpmp_kernels.errors import TransportError, UsageError


def test_a_group_of_one_is_the_self_communicator():
    with communicator(None) as comm:
        x = torch.ones(3)
        assert isinstance(comm, SelfCommunicator) and (comm.rank, comm.size, comm.transport) == (0, 1, "self")
        assert comm.all_reduce(x) is x and x.tolist() == [1, 1, 1]
        comm.barrier()
        with pytest.raises(ValueError, match="nobody to talk to"):
            comm.send(x, 0)
        with pytest.raises(ValueError, match="'mean'"):
            comm.all_reduce(x, "mean")


@pytest.mark.parametrize("timeout", [0, -1, math.nan, math.inf])
def test_a_senseless_timeout_is_refused(timeout):
    with pytest.raises(ValueError, match="positive number of seconds"):
        communicator(None, timeout=timeout)


def test_an_unknown_transport_is_refused():
    with pytest.raises(UsageError, match="'tcp'"):
        communicator(None, transport="tcp")


def _environment() -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPMP_TRANSPORT", "process_group")
        with communicator(dist.group.WORLD) as comm:
            return comm.transport


def test_the_environment_chooses(ranks):
    assert ranks(2).run(_environment) == ["process_group"] * 2


def _refuse(*_):
    raise TransportError("connecting to rank 0 failed: Connection refused")


def _without(part: str, transport: str | None):
    """A communicator where rank 1 lacks a part: what is used, what is logged, and whether it works."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("tpmp_kernels").addHandler(handler)
    with pytest.MonkeyPatch.context() as patch:
        if part == "extension" and dist.get_rank() == 1:
            patch.setattr(meeting, "C", None)
        if part == "memory" and dist.get_rank() == 1:
            patch.setattr(meeting, "C", types.SimpleNamespace(attach=_refuse))
        if part == "segment" and dist.get_rank() == 0:
            patch.setattr(meeting, "C", types.SimpleNamespace(SegmentServer=_refuse))
        try:
            with communicator(dist.group.WORLD, transport=transport, timeout=20) as comm:
                total = comm.all_reduce(torch.ones(2)).sum().item()
                return comm.transport, lines, total
        except UsageError as error:
            return "refused", lines, str(error)
        finally:
            logging.getLogger("tpmp_kernels").removeHandler(handler)


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ("extension", "rank 1: the compiled extension"),
        ("memory", "rank 1: connecting to rank 0 failed"),
        ("segment", "rank 0: connecting"),
    ],
)
def test_one_rank_without_shared_memory_moves_all_to_process_group(ranks, part, reason):
    results = ranks(3).run(_without, part, None)
    assert [(used, total) for used, _, total in results] == [("process_group", 6.0)] * 3
    assert [len(lines) for _, lines, _ in results] == [1, 0, 0]
    assert reason in results[0][1][0]
    for used, _, text in ranks(3).run(_without, part, "shm"):
        assert used == "refused" and "transport shm is impossible" in text and reason in text


def _disputed():
    try:
        communicator(dist.group.WORLD, transport=("shm", "process_group")[dist.get_rank()], timeout=20)
    except UsageError as error:
        return str(error)


def test_ranks_that_ask_for_different_transports_are_refused(ranks):
    for text in ranks(2).run(_disputed):
        assert "rank 0 shm, rank 1 process_group" in text
