"""Nothing hangs and nothing is silently wrong on shm: deaths, mismatched calls, deadlines."""

import gc
import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist
from shm_world import caught, world

from tpmp_kernels.comm._ext import C
from tpmp_kernels.errors import CollectiveMismatch, PeerDied, PeerFailed, TransportError, TransportTimeout

pytestmark = pytest.mark.skipif(C is None, reason="needs the compiled extension")


# ---- a rank is killed


def _killed(victim: int, wait: str):
    comm = world()
    store = dist.distributed_c10d._get_default_store()
    survivors = [r for r in range(comm.size) if r != victim]
    if comm.rank == victim:
        while not all(" in no call" not in comm.last_ops()[r] for r in survivors):
            os.sched_yield()
        store.set("died", str(time.monotonic()))
        os.kill(os.getpid(), signal.SIGKILL)
    x = torch.zeros(1 << 18)
    calls = {
        "all_reduce": lambda: comm.all_reduce(x, tag="grad"),
        "barrier": comm.barrier,
        "recv": lambda: comm.recv(x, victim),
        "send": lambda: comm.send(x, victim),
        "recv from a survivor": lambda: comm.recv(x, next(r for r in survivors if r != comm.rank)),
    }
    kind, culprit, text = caught(calls[wait])
    seconds = time.monotonic() - float(store.get("died"))
    again = caught(comm.barrier)
    comm.close()
    return kind, culprit, text, seconds, again


@pytest.mark.parametrize(
    ("size", "victim", "wait"),
    [(2, 0, "all_reduce"), (2, 1, "recv"), (2, 0, "send"), (3, 1, "barrier"), (4, 2, "recv from a survivor")],
)
def test_a_kill_is_seen_by_every_survivor(ranks, size, victim, wait):
    outcomes = ranks(size).outcomes(_killed, victim, wait)
    assert outcomes[victim].exitcode == -signal.SIGKILL
    for rank, outcome in enumerate(outcomes):
        if rank == victim:
            continue
        kind, culprit, text, seconds, again = outcome.value
        assert (kind, culprit) == ("PeerDied", victim), text
        assert seconds < 1.0
        assert (
            f"rank {victim} (pid" in text and f"| rank {rank} pid" in text and "s of 30.00 s" in text and "do: " in text
        )
        assert again[:2] == ("PeerDied", victim) and "refused" in again[2]


def _outlived():
    """The victim's own child lives on with the segment mapped, which must not hide the death."""
    comm = world()
    if comm.rank == 0:
        read, write = os.pipe()
        if os.fork() == 0:
            os.close(write)
            os.read(read, 1)  # ends when the parent dies
            os._exit(0)
        comm.barrier()
        os.kill(os.getpid(), signal.SIGKILL)
    comm.barrier()
    start = time.monotonic()
    return *caught(lambda: comm.recv(torch.zeros(4), 0)), time.monotonic() - start


def test_a_child_that_outlives_its_rank_does_not_hide_the_death(ranks):
    kind, culprit, text, seconds = ranks(2).outcomes(_outlived)[1].value
    assert (kind, culprit) == ("PeerDied", 0) and seconds < 1.0, text


def _vanished(how: str):
    comm = world()
    if comm.rank == 0:
        comm.send(torch.ones(5), 1)
        if how == "exit":
            os._exit(0)
        if how == "close":
            comm.close()
        else:
            del comm
            gc.collect()
        dist.barrier()
        return None
    if how == "exit":
        return caught(lambda: [comm.recv(torch.zeros(5), 0), comm.recv(torch.zeros(5), 0)])
    dist.barrier()
    delivered = comm.recv(torch.zeros(5), 0).tolist() == [1.0] * 5
    return *caught(lambda: comm.recv(torch.zeros(5), 0, tag="more")), delivered


@pytest.mark.parametrize("how", ["close", "garbage"])
def test_what_a_rank_sent_before_it_left_is_delivered(ranks, how):
    kind, culprit, text, delivered = ranks(2).run(_vanished, how)[1]
    assert delivered
    assert (kind, culprit) == ("PeerDied", 0) and "rank 0 left" in text and "'more'" in text


def test_an_exit_without_close_is_a_death(ranks):
    kind, culprit, text = ranks(2).outcomes(_vanished, "exit")[1].value
    assert (kind, culprit) == ("PeerDied", 0) and "died" in text


# ---- the ranks call different things

_CALLS = {
    "sum8": lambda c, x: c.all_reduce(x[:8]),
    "sum9": lambda c, x: c.all_reduce(x[:9]),
    "max8": lambda c, x: c.all_reduce(x[:8], "max"),
    "big": lambda c, x: c.all_reduce(x),
    "bf16": lambda c, x: c.all_reduce(x[:8].bfloat16()),
    "fp16": lambda c, x: c.all_reduce(x[:8].half()),
    "tag a": lambda c, x: c.all_reduce(x[:8], tag="a"),
    "tag b": lambda c, x: c.all_reduce(x[:8], tag="b"),
    "long a": lambda c, x: c.all_reduce(x[:8], tag="t" * 99 + "a"),
    "long b": lambda c, x: c.all_reduce(x[:8], tag="t" * 99 + "b"),
    "barrier": lambda c, x: c.barrier(),
    "send8": lambda c, x: c.send(x[:8], 1) or c.barrier(),
    "send F1": lambda c, x: c.send(x[:8], 1, tag="F1") or c.barrier(),
    "sendbig": lambda c, x: c.send(x, 1) or c.barrier(),
    "recv9": lambda c, x: c.recv(x[:9], 0),
    "recv F2": lambda c, x: c.recv(x[:8], 0, tag="F2"),
    "recv i32": lambda c, x: c.recv(x[:8].int(), 0),
    "recvbig-1": lambda c, x: c.recv(x[:-1], 0),
}
_MISMATCHES = [
    ("sum8", "sum9", "count"),
    ("sum8", "big", "count"),
    ("sum8", "max8", "reduce op"),
    ("bf16", "fp16", "dtype"),
    ("tag a", "tag b", "tag"),
    ("long a", "long b", "tag"),
    ("sum8", "barrier", "kind"),
    ("send8", "recv9", "count"),
    ("send F1", "recv F2", "tag"),
    ("send8", "recv i32", "dtype"),
    ("sendbig", "recvbig-1", "count"),
]


def _mismatches(cases, odd: int) -> list:
    seen = []
    for right, wrong, _ in cases:
        with world() as comm:
            x = torch.zeros(1 << 18)
            call = _CALLS[wrong if comm.rank == odd else right]
            before = x.clone()
            seen.append((*caught(lambda call=call, comm=comm, x=x: call(comm, x)), torch.equal(x, before)))
    return seen


def test_every_mismatch_is_named_on_both_ranks_before_data_is_touched(ranks):
    for seen in ranks(2).run(_mismatches, _MISMATCHES, 1):
        for (right, wrong, field), (kind, _, text, untouched) in zip(_MISMATCHES, seen, strict=True):
            assert kind == "CollectiveMismatch", (right, wrong, text)
            assert "rank 0 called" in text and "rank 1 called" in text and f"differ in {field}" in text, text
            assert untouched


def test_among_three_ranks_the_odd_one_is_the_culprit(ranks):
    cases = [case for case in _MISMATCHES if not case[0].startswith("send")]
    for odd in (0, 2):
        for seen in ranks(3).run(_mismatches, cases, odd):
            assert [(kind, culprit) for kind, culprit, *_ in seen] == [("CollectiveMismatch", odd)] * len(cases)


# ---- deadlines


def _late():
    comm = world(timeout=0.3 if dist.get_rank() == 0 else 30)
    comm.all_reduce(torch.ones(3), tag="first")
    store = dist.distributed_c10d._get_default_store()
    start = time.monotonic()
    if comm.rank == 0:
        seen = *caught(lambda: comm.all_reduce(torch.ones(2, 4), tag="second")), time.monotonic() - start
        store.set("late", "1")
        return seen
    posted = comm.irecv(torch.ones(32), 0, tag="F3")
    store.wait(["late"])  # busy with something else than this communicator
    return *caught(posted.wait), 0.3


def test_a_timeout_tells_on_every_rank_what_each_was_doing(ranks):
    for kind, culprit, text, seconds in ranks(2).run(_late):
        assert (kind, culprit) == ("TransportTimeout", 1)
        assert 0.28 < seconds < 2
        assert "in all_reduce sum fp32[8] 'second' (call #2) for" in text
        assert "in recv fp32[32] from rank 0 'F3' (call #2) for" in text
        assert "last done all_reduce sum fp32[3] 'first' (call #1)" in text


def _waits_shortly():
    comm = world(timeout=30)
    work = comm.all_reduce(torch.ones(8), async_op=True) if comm.rank == 0 else None
    start = time.monotonic()
    seen = caught(lambda: work.wait(0.2)) if work else None
    dist.barrier()
    return seen, time.monotonic() - start


def test_a_wait_has_a_timeout_of_its_own(ranks):
    (kind, culprit, text), seconds = ranks(2).run(_waits_shortly)[0]
    assert (kind, culprit) == ("TransportTimeout", 1) and 0.18 < seconds < 2, text


# ---- ranks that wait for each other

_FACING = {
    "a collective against a recv": (lambda c, x: c.all_reduce(x, tag="a"), lambda c, x: c.recv(x, 0, tag="F1")),
    "two recvs": (lambda c, x: c.recv(x, 1, tag="F0"), lambda c, x: c.recv(x, 0, tag="F1")),
    "two long sends": (lambda c, x: c.send(x, 1, tag="F0"), lambda c, x: c.send(x, 0, tag="F1")),
    "a posted collective against a send": (
        lambda c, x: c.all_reduce(x, tag="a", async_op=True).wait(),
        lambda c, x: c.send(x, 0, tag="B1"),
    ),
}


def _facing(name: str):
    with world() as comm:
        start = time.monotonic()
        calls = _FACING[name]
        seen = caught(lambda: calls[min(comm.rank, 1)](comm, torch.zeros(1 << 20)))
        return *seen, time.monotonic() - start


@pytest.mark.parametrize("name", _FACING)
def test_ranks_that_wait_for_each_other_are_told(ranks, name):
    for kind, _, text, seconds in ranks(2).run(_facing, name):
        assert kind == "CollectiveMismatch" and seconds < 1, text
        assert "wait for each other" in text and "rank 0 called" in text and "rank 1 called" in text, text


def _ring_of_recvs():
    """One rank is late, in a collective and as the first of a ring, and nothing is wrong; then nobody sends."""
    with world() as comm:
        left, right, x = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size, torch.zeros(8)
        if comm.rank == 0:
            time.sleep(0.6)  # the others sleep for longer than the patience
        comm.barrier()
        if comm.rank == 0:
            time.sleep(0.6)
            comm.send(x, right)
        comm.recv(x, left)
        if comm.rank != 0:
            comm.send(x, right)
        return caught(lambda: comm.recv(x, left))


def test_only_a_closed_cycle_is_a_deadlock(ranks):
    for kind, _, text in ranks(3).run(_ring_of_recvs):
        assert kind == "CollectiveMismatch" and all(f"rank {r} called recv" in text for r in range(3)), text


def _waits_elsewhere() -> float:
    """A thread of rank 0 waits for what the main thread posted, while that one computes and calls what rank 1 needs."""
    with world() as comm:
        x = torch.ones(8)
        if comm.rank == 0:
            work = comm.all_reduce(x, async_op=True)
            waiting = threading.Thread(target=work.wait)
            waiting.start()
            time.sleep(0.6)  # for longer than the patience
            comm.send(x, 1)
            waiting.join()
        else:
            comm.recv(torch.zeros(8), 0)
            comm.all_reduce(x)
        return x.sum().item()


def test_a_thread_that_waits_for_another_ones_call_is_no_deadlock(ranks):
    assert ranks(2).run(_waits_elsewhere) == [16.0, 16.0]


def _stopped():
    comm = world(timeout=0.5)
    pid = torch.tensor([os.getpid()])
    if comm.rank == 1:
        comm.send(pid, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        return caught(comm.barrier)
    comm.recv(pid, 1)
    seen = caught(comm.barrier)
    os.kill(pid.item(), signal.SIGCONT)
    return seen


def test_a_stopped_rank_is_named_as_stopped(ranks):
    for kind, culprit, text in ranks(2).run(_stopped):
        assert (kind, culprit) == ("TransportTimeout", 1) and "it is stopped" in text


def test_errors_are_of_one_family():
    for kind in (PeerDied, PeerFailed, CollectiveMismatch, TransportTimeout):
        assert issubclass(kind, TransportError) and kind("x", 3).culprit == 3
