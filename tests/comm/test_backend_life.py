"""The life of a group of the backend "tpmp": how it is made, split, left, and what it does after a fault."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from backend_programs import SPELLINGS, Launcher
from c10d_calls import raised, tpmp_group

from tpmp_kernels.comm._ext import C
from tpmp_kernels.errors import CollectiveMismatch, PeerFailed, TransportError, TransportTimeout

pytestmark = pytest.mark.skipif(C is None, reason="needs the compiled extension")


# ---- groups


def groups() -> None:
    rank = dist.get_rank()
    with tpmp_group() as whole:
        x = torch.tensor([float(rank)])
        pair = dist.new_group([0, 2], backend="tpmp", timeout=timedelta(seconds=9), group_desc="evens")
        if rank in (0, 2):
            assert dist.get_group_rank(pair, rank) == rank // 2 and pair.group_desc == "evens" and pair.name() == "tpmp"
            assert pair.comm.timeout == 9.0 and pair.size() == 2
            dist.broadcast(x, 2, group=pair)
            assert x.item() == 2.0
            pair.set_timeout(timedelta(seconds=5))
            assert pair.comm.timeout == 5.0
        alone = [dist.new_group([r], backend="tpmp") for r in range(4)][rank]
        dist.all_reduce(x, group=alone)
        assert x.item() == [2.0, 1.0, 2.0, 3.0][rank] and alone.comm.transport == "self"

        halves = [[0, 1], [2, 3]]
        half = whole.split_group(halves[rank // 2], group_desc="half")
        assert whole.split_group([0, 1]) is None if rank > 1 else whole.split_group([0, 1]).size() == 2
        x.fill_(rank)
        half.allreduce([x]).wait()
        assert x.item() == [1.0, 5.0][rank // 2] and half.group_desc == "half" and half.rank() == rank % 2
        half.shutdown()


def test_groups_subgroups_and_splits(ranks):
    ranks(4).run(groups)


def split_by_torch() -> str:
    with tpmp_group() as mine, pytest.raises(RuntimeError) as info:
        dist.split_group(mine, [[0, 1]])
    return str(info.value)


def test_torchs_split_group_wants_an_accelerator(ranks):
    """What torch refuses before it asks the group; TpmpGroup.split_group itself is tested above."""
    assert set(ranks(2).run(split_by_torch)) == {
        "No device associated with the default pg, not safe to split any process groups"
    }


def monitored() -> list:
    with tpmp_group() as mine:
        mine.monitored_barrier(timedelta(seconds=5))
        refused = raised(dist.monitored_barrier, mine)
        late = None
        if dist.get_rank() != 2:
            late = raised(mine.monitored_barrier, timedelta(seconds=0.3))
        dist.barrier()  # gloo's: rank 2 came late
    return [refused, late]


def test_a_monitored_barrier_names_who_did_not_come(ranks):
    for rank, (refused, late) in enumerate(ranks(3).run(monitored)):
        assert type(refused) is ValueError and "GLOO" in str(refused)  # torch's own function knows no other backend
        assert rank == 2 or (isinstance(late, TransportTimeout) and late.culprit == 2), late


# ---- processes of their own


@pytest.fixture(scope="module")
def launcher():
    made = Launcher()
    yield made
    made.close()


@pytest.mark.full
def test_the_whole_program_runs_on_it(launcher, tmp_path):
    """init_process_group in its spellings, destroyed and made again on the same store."""
    for rank, (status, text) in enumerate(launcher.run("whole", 2, tmp_path)):
        assert status == 0, text
        assert text.splitlines()[-3:] == [f"{name} {rank} [3.0, 3.0]" for name in SPELLINGS], text


def leave(launcher, size: int, path, **environment: str) -> None:
    """With works and futures alive, and with a receive that nobody will ever answer."""
    for status, text in launcher.run("leaves_without_destroying", size, path, **environment):
        assert status == 0 and text.startswith("done\n") and "terminate called" not in text, text


def test_a_process_may_end_without_destroying_the_group(launcher, tmp_path):
    leave(launcher, 3, tmp_path)


@pytest.mark.full
def test_a_process_may_end_without_destroying_the_group_any_time(launcher, tmp_path):
    for number in range(20):
        leave(launcher, 2, tmp_path / str(number), DDP="1")


def test_ranks_that_share_no_memory_run_on_gloo(launcher, tmp_path):
    for rank, (status, text) in enumerate(launcher.run("shares_no_memory", 2, tmp_path)):
        assert status == 0, text
        assert text.count("runs on gloo: rank 1: it is elsewhere") == (rank == 0), text


# ---- faults


def mismatched(asynchronous: bool) -> list:
    rank = dist.get_rank()
    with tpmp_group() as mine:
        x = torch.ones(3 + rank)
        errors = []
        if asynchronous:
            work = dist.all_reduce(x, group=mine, async_op=True)
            errors += [raised(work.get_future().wait), raised(work.wait)]
            assert work.is_completed() and not work.is_success() and work.exception() is errors[1]
        else:
            errors += [None, raised(dist.all_reduce, x, group=mine)]
        errors += [raised(dist.barrier, group=mine)]
    with tpmp_group() as mine:
        x = torch.ones(2)
        dist.all_reduce(x, group=mine)
        assert x.tolist() == [2.0, 2.0]
    return errors


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_mismatch_surfaces_and_the_group_can_be_made_anew(ranks, asynchronous):
    for future, error, again in ranks(2).run(mismatched, asynchronous):
        assert type(error) is CollectiveMismatch and "3" in str(error) and "4" in str(error)
        assert isinstance(again, TransportError)
        assert not asynchronous or (isinstance(future, RuntimeError) and "CollectiveMismatch" in str(future))


def wrong_tag() -> Exception | None:
    rank, x = dist.get_rank(), torch.ones(3)
    with tpmp_group() as mine:
        return raised(dist.recv, x, 0, group=mine, tag=2) if rank else raised(dist.send, x, 1, group=mine, tag=1)


def test_tags_must_match(ranks):
    assert type(ranks(2).run(wrong_tag)[1]) is CollectiveMismatch


def aborted() -> Exception | None:
    with tpmp_group() as mine:
        if dist.get_rank() == 0:
            mine.abort()
            return None
        return raised(dist.all_reduce, torch.ones(2), group=mine)


def test_abort_reaches_the_peers(ranks):
    error = ranks(2).run(aborted)[1]
    assert type(error) is PeerFailed and error.culprit == 0 and "torch.distributed aborted" in str(error)
