"""What the ranks of a process_group communicator tell each other beside the data: no mismatch, failure or death stays
unknown to any rank. Every case has a group of its own, because a wait that is broken off breaks gloo's connections."""

import functools
import gc
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist
from shm_world import caught

from tpmp_kernels.comm.out_of_band.board import Board
from tpmp_kernels.comm.out_of_band.reports import Verdict
from tpmp_kernels.comm.process_group import ProcessGroupCommunicator

_SECONDS = 2.0  # 0.1 on an idle machine, 0.6 where a circle of waits is the proof


def _fresh(timeout: float = 20) -> ProcessGroupCommunicator:
    return ProcessGroupCommunicator(dist.new_group(), name="t", timeout=timeout)


def _threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("tpmp")]


def _until_failure(comm) -> None:
    """Calls that nobody refuses, until the failure of the group shows: as a rank would that had no part in it."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and not comm._board.failure:
        time.sleep(0.001)
    comm.barrier()


# ---- the ranks call different things

X = functools.partial(torch.zeros, 8)
_CALLS = {
    "sum8": lambda c: c.all_reduce(X()),
    "sum9": lambda c: c.all_reduce(torch.zeros(9)),
    "sum0": lambda c: c.all_reduce(torch.zeros(0)),
    "big": lambda c: c.all_reduce(torch.zeros(1 << 18)),
    "max8": lambda c: c.all_reduce(X(), "max"),
    "bf16": lambda c: c.all_reduce(X(dtype=torch.bfloat16)),
    "fp16": lambda c: c.all_reduce(X(dtype=torch.float16)),
    "tag a": lambda c: c.all_reduce(X(), tag="a"),
    "tag b": lambda c: c.all_reduce(X(), tag="b"),
    "posted a": lambda c: c.all_reduce(X(), tag="a", async_op=True).wait(),
    "barrier": lambda c: c.barrier(),
    "root 0": lambda c: c.broadcast(X(), 0),
    "root 1": lambda c: c.broadcast(X(), 1),
    "gather": lambda c: c.all_gather(torch.zeros(8 * c.size), X()),
    "scatter": lambda c: c.reduce_scatter(X(), torch.zeros(8 * c.size)),
    "parts": lambda c: c.all_to_all(torch.zeros(c.size), torch.zeros(c.size)),
    "splits": lambda c: c.all_to_all(torch.zeros(c.size), torch.zeros(c.size), [1] * c.size, [1] * c.size),
    "more": lambda c: c.all_to_all(
        torch.zeros(c.size), torch.zeros(c.size + 1), [1] * c.size, [1] * (c.size - 1) + [2]
    ),
    "send8": lambda c: c.send(X(), 1),
    "send F1": lambda c: c.send(X(), 1, tag="F1"),
    "recv8": lambda c: c.recv(X(), 0),
    "recv9": lambda c: c.recv(torch.zeros(9), 0),
    "recv7": lambda c: c.recv(torch.zeros(7), 0),
    "recv F2": lambda c: c.recv(X(), 0, tag="F2"),
    "recv i32": lambda c: c.recv(X(dtype=torch.int32), 0),
    "recv bf16": lambda c: c.recv(X(dtype=torch.bfloat16), 0),
    "recv from 2": lambda c: c.recv(X(), 2),
    "nothing": _until_failure,
}
# rank 0 calls, rank 1 calls, they differ in
_PAIRS = [
    ("sum8", "sum9", "count"),
    ("sum8", "big", "count"),
    ("bf16", "fp16", "dtype"),
    ("tag a", "tag b", "tag"),
    ("posted a", "tag b", "tag"),
    ("sum8", "max8", "reduce op"),
    ("root 0", "root 1", "root"),
    ("sum8", "barrier", "kind, dtype, count, reduce op"),
    ("parts", "splits", "count"),
    ("more", "splits", "count"),
    ("send8", "recv9", "count"),
    ("send8", "recv bf16", "dtype"),
    ("send F1", "recv F2", "tag"),
]
_MORE_PAIRS = [
    ("sum9", "sum8", "count"),
    ("sum8", "sum0", "count"),
    ("sum8", "bf16", "dtype"),
    ("gather", "scatter", "kind, reduce op"),
    ("send8", "recv7", "count"),
    ("send8", "recv i32", "dtype"),
]
_STUCK = [("sum8", "recv8"), ("send8", "sum8"), ("send8", "barrier")]


def _mismatch(*names: str) -> tuple:
    """This rank's error, its seconds, whether the next call raises the same, and the threads left after close."""
    comm = _fresh()
    comm.all_reduce(torch.ones(3), tag="before")
    start = time.monotonic()
    call = _CALLS[names[comm.rank]]
    error = caught(lambda: [call(comm), _until_failure(comm)])
    seconds = time.monotonic() - start
    again = caught(comm.barrier)
    comm.close()
    return *error, seconds, again[:2] == error[:2], _threads()


def _check_alike(outcomes: list[tuple], kind: str, culprit: int | None, *words: str) -> None:
    for seen, who, text, seconds, again, threads in outcomes:
        assert (seen, who) == (kind, culprit), text
        assert all(word in text for word in words), text
        assert seconds < _SECONDS and again and threads == [], (seconds, again, threads)


@pytest.mark.parametrize(
    ("right", "wrong", "fields"), [*_PAIRS, *(pytest.param(*pair, marks=pytest.mark.full) for pair in _MORE_PAIRS)]
)
def test_every_mismatch_is_named_on_both_ranks(ranks, right, wrong, fields):
    outcomes = ranks(2).run(_mismatch, right, wrong)
    _check_alike(outcomes, "CollectiveMismatch", None, "rank 0 called", "rank 1 called", f"differ in {fields} |")


def test_the_words_of_a_mismatch(ranks):
    text = ranks(2).run(_mismatch, "tag a", "max8")[0][2]
    assert "rank 1 called all_reduce max float32[8] #2, but rank 0 called all_reduce sum float32[8] 'a' #2" in text
    assert (
        "they differ in reduce op, tag | rank 0 in all_reduce sum float32[8] 'a' #2 | waited" in text and "do: " in text
    )


@pytest.mark.parametrize("names", _STUCK)
def test_a_collective_against_a_message_is_found(ranks, names):
    outcomes = ranks(2).run(_mismatch, *names)
    _check_alike(outcomes, "CollectiveMismatch", None, "rank 0 waits in", "rank 1 waits in", "never comes")


@pytest.mark.parametrize(
    ("names", "culprit"),
    [
        (("sum8", "sum8", "max8"), 2),
        (("tag b", "tag a", "tag a"), 0),
        (("root 0", "root 1", "root 0"), 1),
        (("sum8", "sum9", "max8"), None),
        (("sum8", "sum8", "recv8"), 2),
        (("sum8", "sum9", "nothing"), None),
        (("send8", "recv9", "nothing"), None),
        (("send8", "recv from 2", "barrier"), None),
    ],
)
def test_among_three_ranks_the_odd_one_is_the_culprit(ranks, names, culprit):
    _check_alike(ranks(3).run(_mismatch, *names), "CollectiveMismatch", culprit)


def _swapped() -> tuple:
    comm = _fresh()
    into = torch.zeros(2, 3)
    if comm.rank == 0:
        works = [comm.isend(torch.full((3,), 1.0 + i), 1, tag=f"F{i}") for i in range(2)]
    else:
        works = [comm.irecv(into[i], 0, tag=f"F{1 - i}") for i in range(2)]
    error = caught(lambda: [work.wait() for work in works])
    comm.close()
    return *error, into.any().item()


def test_swapped_messages_are_not_delivered(ranks):
    for kind, _, text, delivered in ranks(2).run(_swapped):
        assert kind == "CollectiveMismatch" and "float32[3] from rank 0 'F1' #1" in text and not delivered


def _many_calls() -> tuple:
    """A mismatch after many calls, most of them forgotten; and how many keys the Store has gained."""
    comm = _fresh()
    store = dist.distributed_c10d._get_default_store()
    x = torch.zeros(4)
    keys = []
    for _ in range(3):
        for _ in range(150):
            comm.all_reduce(x, tag="same")
        keys.append(store.num_keys())
    lane = comm._board._bulletin.reports[comm.rank].lanes["*"]
    start = time.monotonic()
    while lane.prints and time.monotonic() < start + 5:
        time.sleep(0.01)
    error = caught(lambda: comm.all_reduce(x, tag=f"odd {comm.rank}"))
    comm.close()
    return keys[0] == keys[-1], lane.first, error


def test_calls_that_agree_are_forgotten_and_the_store_does_not_grow(ranks):
    for constant, forgotten, (kind, _, text) in ranks(2).run(_many_calls):
        assert constant and forgotten == 450 and kind == "CollectiveMismatch" and "#451" in text


# ---- one rank fails


def _aborted(how: str) -> tuple:
    comm = _fresh()
    comm.barrier()
    start = time.monotonic()
    if comm.rank == 1:
        if how == "abort":
            comm.abort("out of paper")
        else:
            with pytest.raises(ValueError, match="paper"), comm:
                raise ValueError("out of paper")
        error = caught(comm.barrier) if how == "abort" else ("PeerFailed", 1, "rank 1 failed: out of paper")
    else:
        error = caught(lambda: comm.all_reduce(torch.ones(4)) if comm.rank == 0 else comm.recv(torch.ones(1), 0))
    seconds = time.monotonic() - start
    again = caught(comm.barrier)[0] in ("PeerFailed", "TransportError")
    comm.close()
    return *error, seconds, again, _threads()


@pytest.mark.parametrize("how", ["abort", "with"])
def test_the_failure_of_one_rank_reaches_all_with_its_text(ranks, how):
    _check_alike(ranks(3).run(_aborted, how), "PeerFailed", 1, "rank 1 failed:", "out of paper")


def _killed(victim: int, call: str) -> tuple:
    comm = _fresh()
    store = dist.distributed_c10d._get_default_store()
    if comm.rank == victim:
        comm.barrier()
        store.set("died", str(time.monotonic()))
        os.kill(os.getpid(), signal.SIGKILL)
    survivors = [r for r in range(comm.size) if r != victim]
    peer = survivors[(survivors.index(comm.rank) + 1) % len(survivors)]
    calls = {
        "sum": lambda: comm.all_reduce(torch.ones(100_000)),
        "ring": lambda: comm.recv(torch.ones(2), peer),  # each survivor waits for another one
    }
    error = caught(lambda: [comm.barrier(), calls[call]()])
    seconds = time.monotonic() - float(store.get("died"))
    again = caught(comm.barrier)
    comm.close()
    return *error, seconds, again[:2] == error[:2], _threads()


@pytest.mark.parametrize(("size", "victim", "call"), [(2, 0, "sum"), (3, 1, "sum"), (4, 2, "ring")])
def test_a_death_is_seen_by_every_survivor(ranks, size, victim, call):
    outcomes = ranks(size).outcomes(_killed, victim, call)
    assert outcomes[victim].exitcode == -signal.SIGKILL
    seen = [outcome.value for rank, outcome in enumerate(outcomes) if rank != victim]
    _check_alike(seen, "PeerDied", victim, f"rank {victim} ")


def _waiting_for_a_bystander(silent: bool) -> tuple | None:
    """Rank 0 is in gloo with rank 2, which is in Python and breaks nothing off, when its neighbour dies; `silent`:
    before the thread of its board has run at all."""
    if silent and dist.get_rank() == 1:
        Board._serve = lambda board: board._ended.set()
    comm = _fresh()
    store = dist.distributed_c10d._get_default_store()
    if comm.rank == 1:
        store.get("waiting")
        os.kill(os.getpid(), signal.SIGKILL)
    if comm.rank == 2:
        store.get("raised")
        return caught(comm.barrier)[:2]
    store.set("waiting", "soon")
    error = caught(lambda: comm.recv(torch.zeros(2), 2))
    store.set("raised", "now")
    return error[:2]


@pytest.mark.parametrize("silent", [False, True])
def test_a_wait_for_a_living_rank_is_broken_off_too(ranks, silent):
    outcomes = ranks(3).outcomes(_waiting_for_a_bystander, silent, timeout=10)
    assert [outcomes[rank].value for rank in (0, 2)] == [("PeerDied", 1)] * 2


def _left(how: str) -> tuple:
    comm = _fresh()
    start = time.monotonic()
    if comm.rank == 0:
        comm.send(torch.ones(2), 1)
        if how == "close":
            comm.close()
        del comm
        gc.collect()
        return "PeerDied", 0, "rank 0 left", 0, True, _threads()
    comm.recv(torch.zeros(2), 0)
    error = caught(lambda: comm.recv(torch.zeros(2), 0) if comm.rank == 1 else comm.barrier())
    seconds = time.monotonic() - start
    comm.close()
    return *error, seconds, True, _threads()


@pytest.mark.parametrize("how", ["close", "garbage"])
def test_a_rank_that_left_is_named_to_who_waits_for_it(ranks, how):
    _check_alike(ranks(2).run(_left, how), "PeerDied", 0, "rank 0 left")


def _early_leavers() -> float:
    """The lower ranks, judges one after the other, leave while the others go on."""
    comm = _fresh()
    total = comm.all_reduce(torch.ones(1))
    if comm.rank == 0:
        comm.close()
        return total.item()
    for _ in range(200):
        if comm.rank == 1:
            comm.send(total, 2)
        else:
            comm.recv(total, 1)
    if comm.rank == 2:
        late = caught(lambda: comm.recv(torch.zeros(2), 1, tag="z"))
        assert late[:2] == ("CollectiveMismatch", None) and "differ in count, tag" in late[2], late
    else:
        caught(lambda: comm.send(total, 2, tag="y"))
    comm.close()
    return total.item()


def test_ranks_may_leave_one_after_the_other(ranks):
    assert ranks(3).run(_early_leavers) == [3.0] * 3


def test_a_failure_found_elsewhere_goes_before_a_lost_connection():
    """The connection is lost because the other rank has seen a failure, which is about to be told."""
    store = dist.HashStore()
    boards = [Board(store, rank, 2, interrupt=lambda: None) for rank in range(2)]
    consequence, cause = Verdict("PeerDied", 1, "lost"), Verdict("CollectiveMismatch", None, "differ")
    found = []
    asking = threading.Thread(target=lambda: found.append(boards[0].fail(lambda _: consequence, grace=True)))
    asking.start()
    while not boards[0]._requests:
        time.sleep(0.001)
    assert boards[1].fail(lambda _: cause) == cause
    asking.join()
    for board in boards:
        board.leave()
    assert found == [cause] and _threads() == []


# ---- deadlines


def _late() -> tuple:
    comm = _fresh(timeout=0.4 if dist.get_rank() == 0 else 20)
    comm.all_reduce(torch.ones(3), tag="first")
    start = time.monotonic()
    if comm.rank == 0:
        error = caught(lambda: comm.all_reduce(torch.ones(2, 4), tag="second"))
    else:
        error = caught(lambda: _until_failure(comm))
    seconds = time.monotonic() - start
    again = caught(comm.barrier)
    comm.close()
    return *error, seconds, again[:2] == error[:2], _threads()


def test_a_timeout_tells_on_every_rank_what_each_was_doing(ranks):
    _check_alike(
        ranks(2).run(_late),
        "TransportTimeout",
        1,
        "rank 0 waited 0.4",
        "in all_reduce sum float32[2,4] 'second' #2: rank 0 waits in",
        "rank 1 is in no call, last all_reduce sum float32[3] 'first' #1",
    )


def _posted_timeout() -> tuple:
    comm = _fresh()
    if comm.rank == 1:
        error = caught(lambda: _until_failure(comm))
    else:
        work = comm.all_gather(torch.zeros(4), torch.zeros(2), async_op=True)
        assert not work.done()
        error = caught(lambda: work.wait(timeout=0.2))
        assert work.done()
    comm.close()
    return *error, 0, True, _threads()


def test_a_posted_call_has_a_timeout_of_its_own(ranks):
    _check_alike(ranks(2).run(_posted_timeout), "TransportTimeout", 1, "all_gather float32[2] #1")


# ---- life


def _closed_with_posted_calls() -> list[str]:
    comm = _fresh()
    if comm.rank == 0:
        works = [comm.irecv(torch.zeros(2), 1), comm.all_reduce(torch.ones(2), async_op=True)]
        assert not any(work.done() for work in works)
    comm.close()
    return _threads()


def test_close_ends_what_was_posted(ranks):
    assert ranks(2).run(_closed_with_posted_calls) == [[], []]


def _fork() -> list:
    comm = _fresh()
    comm.barrier()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, repr(caught(comm.barrier)).encode())
        comm.close()
        os._exit(0)
    os.waitpid(child, 0)
    text = os.read(read, 4096).decode()
    total = comm.all_reduce(torch.ones(1)).item()
    comm.close()
    return [text, total]


def test_a_forked_child_is_refused_and_does_not_end_its_parents_communicator(ranks):
    for text, total in ranks(2).run(_fork):
        assert "TransportError" in text and "forked from rank" in text and total == 2


_PROGRAM = """
import os, signal, sys, time, torch, torch.distributed as dist
from tpmp_kernels.comm import communicator
rank, port, how = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
comm = communicator(dist.group.WORLD, transport="process_group", timeout=20)
work = comm.all_reduce(torch.ones(3), async_op=True)
work.wait()
if how == "killed":
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        comm.barrier()
    except Exception as error:
        print(type(error).__name__, error.culprit)
if how == "destroyed":
    dist.destroy_process_group()
print("end", flush=True)
if rank == 1:
    time.sleep(1)  # it outlives the Store, with nobody left to talk to
"""


def _run_program(how: str) -> list[tuple]:
    """Output, errors and exit code of two ranks; rank 0 takes the Store with it."""
    port = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False).port
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(rank), str(port), how],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for rank in range(2)
    ]  # fmt: skip
    return [(*program.communicate(timeout=40), program.returncode) for program in programs]


@pytest.mark.full
@pytest.mark.parametrize("how", ["left open", "destroyed"])
def test_exit_without_close_is_silent(how):
    assert _run_program(how) == [("end\n", "", 0)] * 2


@pytest.mark.full
def test_the_death_of_the_rank_that_serves_the_store_is_named():
    (*_, zero), (out, _, one) = _run_program("killed")
    assert (zero, out, one) == (-signal.SIGKILL, "PeerDied 0\nend\n", 0)
