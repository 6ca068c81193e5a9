"""Faults of NCCL and of peers: each return code with the right error, nothing that hangs, no rank left untold."""

import ctypes
import os
import signal
import threading
import time

import pytest
import torch
from nccl_world import KEPT, Rank, connected, double, plan, run, stream, synchronize
from shm_world import caught

from tpmp_kernels import errors
from tpmp_kernels.comm._ext import C

pytestmark = pytest.mark.skipif(C is None, reason="needs the compiled extension")

# Every documented result but success and "in progress", and the error that it becomes.
CODES = {
    1: "TransportError", 2: "TransportError", 3: "TransportError", 4: "TransportError", 5: "TransportError",
    6: "PeerDied", 8: "TransportTimeout",
}  # fmt: skip
# Each function that enqueues, with a call that uses it.
CALLS = {
    "ncclAllReduce": "all_reduce", "ncclReduce": "reduce", "ncclBroadcast": "broadcast", "ncclAllGather": "all_gather",
    "ncclReduceScatter": "reduce_scatter", "ncclSend": "send", "ncclRecv": "recv", "ncclGroupEnd": "all_to_all",
    "ncclGroupStart": "all_to_all",
}  # fmt: skip


USUAL = ("ncclAllReduce", "ncclSend", "ncclGroupEnd")


@pytest.fixture(autouse=True)
def no_faults_left():
    yield
    double()[1].fake_nccl_release()
    plan("")


def post(rank: Rank, kind: str):
    x, whole = torch.ones(4), torch.ones(8)
    peer = 1 - rank.rank
    if kind in ("send", "recv"):
        sends = (kind == "send") == (rank.rank == 0)
        return (rank.core.isend if sends else rank.core.irecv)(rank.message(x, peer)), x
    ends = {
        "all_reduce": (x, x, 4), "reduce": (x, x if rank.rank == 0 else None, 4), "all_gather": (x, whole, 4),
        "broadcast": (x, None, 4) if rank.rank == 0 else (None, x, 4), "reduce_scatter": (whole, x, 4),
        "all_to_all": (whole, torch.ones(8), 4),
    }  # fmt: skip
    input, output, numel = ends[kind]
    call = rank.collective(kind, input, output, numel, root=0 if kind in ("reduce", "broadcast") else -1)
    return rank.core.post(call, 10.0), (input, output)


def fails(rank: Rank, kind: str) -> tuple:
    """What rank 0 sees; the other leaves by its own abort, as it would once told."""
    if rank.rank == 1:
        try:
            post(rank, kind)
        finally:
            rank.core.abort("told by a peer")
        return ("told",)

    def call():
        work, _ = post(rank, kind)
        work.wait(5)

    seen = caught(call)
    return *seen, rank.core.failure()


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize(
    "function",
    [
        pytest.param(f, marks=[pytest.mark.full] * (f not in ("ncclAllReduce", "ncclSend", "ncclGroupEnd")))
        for f in CALLS
    ],
)
def test_each_code_that_a_call_returns(function, code):
    if function.startswith("ncclGroup"):
        plan(f"*:{function}:*:return={code}")
    else:
        receiver = function == "ncclRecv"  # rank 1 of a pair's communicator, whatever it is of all
        plan(f"{int(receiver)}:{function}:1:return={code}")
    connected = CALLS[function] in ("send", "recv")
    name, _, text, failure = run(2, lambda rank: fails(rank, CALLS[function]), connected=connected)[0]
    assert name == CODES[code] and failure[0] == name, text
    assert text.startswith("NCCL says: ") and text.count(", in ") == 1


@pytest.mark.parametrize("code", CODES)
def test_each_code_that_comes_later(code):
    plan(f"0:ncclAllReduce:1:async={code}")
    name, _, text, failure = run(2, lambda rank: fails(rank, "all_reduce"))[0]
    assert name == CODES[code] and failure[0] == name and text.startswith("NCCL says: "), text


NEVER = 7  # in progress is how connecting begins
CONNECTING = [(way, code) for way in ("return", "async") for code in CODES] + [("async", NEVER)]
FEW = (("return", 2), ("async", 6), ("async", NEVER))


@pytest.mark.parametrize(
    ("way", "code"), [pytest.param(*each, marks=[pytest.mark.full] * (each not in FEW)) for each in CONNECTING]
)
def test_each_code_of_connecting(way, code):
    plan(f"0:ncclCommInitRankConfig:1:{way}={code}")
    before = double()[0].fake_cuda_live_streams()
    outcome = run(2, lambda rank: None, timeout=1.0)[0]
    assert type(outcome).__name__ == {**CODES, NEVER: "TransportTimeout"}[code], outcome
    assert "could not connect rank 0 of 2 for collectives: " in str(outcome)
    assert (double()[1].fake_nccl_live(), double()[0].fake_cuda_live_streams()) == (0, before)


def test_a_call_in_progress_is_awaited():
    plan("*:ncclAllReduce:1:inprogress=5")

    def one(rank: Rank) -> float:
        x = torch.ones(3)
        rank.finish(rank.all_reduce(x))
        return x.sum().item()

    assert run(2, one) == [6.0, 6.0]


def test_a_call_that_stays_in_progress_times_out():
    plan("0:ncclAllReduce:1:inprogress=1000000")

    def one(rank: Rank):
        if rank.rank == 0:
            return caught(lambda: rank.all_reduce(torch.ones(3), timeout=0.3))
        rank.core.abort("told by a peer")

    name, _, text = run(2, one)[0]
    assert name == "TransportTimeout" and text.startswith("NCCL did not take the call within "), text


def test_a_call_that_hangs_inside_is_told():
    plan("0:ncclAllReduce:1:hang")

    def one(rank: Rank):
        if rank.rank == 1:
            return rank.core.abort("told by a peer")
        stuck = threading.Thread(target=lambda: caught(lambda: rank.all_reduce(torch.ones(3))))
        stuck.start()
        while rank.core.failure() is None:
            time.sleep(0.01)
        double()[1].fake_nccl_release()
        stuck.join()
        return rank.core.failure()

    kind, culprit, text = run(2, one, timeout=0.5)[0]
    assert (kind, culprit) == ("TransportTimeout", None)
    assert text.startswith("a call into NCCL itself (collectives) does not return")


def test_an_abort_that_hangs_is_told_and_left():
    plan("0:ncclCommAbort:1:hang")

    def one(rank: Rank) -> str:
        rank.core.abort("enough")
        begun = time.monotonic()
        while rank.rank == 0 and "has not aborted" not in rank.core.failure()[2] and time.monotonic() - begun < 5:
            time.sleep(0.01)
        return rank.core.failure()[2]

    texts = run(2, one, timeout=1.0)
    assert texts[0] == "rank 0 of 2 failed: enough; NCCL has not aborted within 1 s: end this process"
    assert texts[1] == "rank 1 of 2 failed: enough"


# ---- deadlines


def _alone(rank: Rank):
    if rank.rank == 0:
        return caught(lambda: rank.all_reduce(torch.ones(3), timeout=0.3).wait(20)), rank.core.failure()
    while rank.core.failure() is None:
        time.sleep(0.05)
        rank.core.abort("told by a peer")


def test_an_operation_without_its_peer_times_out():
    begun = time.monotonic()
    (name, _, text), failure = run(2, _alone)[0]
    assert time.monotonic() - begun < 5
    assert name == failure[0] == "TransportTimeout" and text.startswith("rank 0 of 2 waited 0 s for its peers"), text


def _late_by_computing(rank: Rank) -> float:
    """The caller's stream computes for longer than the deadline before the operation begins."""
    gate, x = torch.zeros(1, dtype=torch.int32), torch.ones(3)
    KEPT.append(gate)
    assert double()[0].cuStreamWaitValue32_v2(rank.stream, gate.data_ptr(), 1, 0) == 0
    work = rank.all_reduce(x, timeout=0.2)
    time.sleep(0.5)
    gate[0] = 1
    rank.finish(work)
    return x.sum().item()


def test_the_deadline_starts_when_the_device_comes_to_it():
    assert run(2, _late_by_computing) == [6.0, 6.0]


def _delayed(rank: Rank) -> float:
    x = torch.ones(3)
    rank.finish(rank.all_reduce(x))
    return x.sum().item()


def test_a_slow_peer_is_waited_for():
    plan("1:ncclAllReduce:1:delay=200")
    assert run(2, _delayed) == [6.0, 6.0]


# ---- graphs


def _captured(rank: Rank, together: threading.Barrier) -> list:
    cuda, x, y, gate = double()[0], torch.ones(4), torch.ones(4), torch.zeros(1, dtype=torch.int32)
    KEPT.append(gate)
    assert cuda.cuStreamWaitValue32_v2(rank.stream, gate.data_ptr(), 1, 0) == 0
    pending = rank.all_reduce(y)  # the watch asks for it all along
    together.wait()  # nobody may synchronize a stream while another thread captures
    waiting, rank.stream = rank.stream, stream()
    assert cuda.fake_cuda_capture_begin(rank.stream) == 0
    work = rank.all_reduce(x)
    seen = [work.done(), caught(lambda: work.wait(1))[2]]
    time.sleep(0.1)  # what the watch asks meanwhile must not break the capture off
    work.order(rank.stream)
    joined = (ctypes.c_void_p * 1)(rank.core.streams()[0])
    graph = cuda.fake_cuda_capture_end(rank.stream, joined, 1)
    assert graph
    together.wait()
    gate[0] = 1
    pending.order(waiting)
    synchronize(waiting)
    seen += [x.tolist()]
    for _ in range(2):
        assert cuda.fake_cuda_graph_launch(graph, rank.stream) == 0
    synchronize(rank.stream)
    return [*seen, x.tolist(), rank.core.failure()]


def test_a_graph_reduces_at_each_launch():
    together = threading.Barrier(2, timeout=10)
    for done, wait, before, after, failure in run(2, lambda rank: _captured(rank, together)):
        assert (done, before, after, failure) == (False, [1.0] * 4, [4.0] * 4, None)
        assert wait == "all_reduce is part of a graph: it is over when a launch is"


# ---- communicators: what the other ranks learn


def _differing(what: str) -> tuple:
    with connected(timeout=10) as comm:
        comm.all_reduce(torch.ones(4), tag="same")
        odd = comm.rank == 1
        calls = {
            "kind": lambda: comm.broadcast(torch.ones(4), 0) if odd else comm.all_reduce(torch.ones(4)),
            "count": lambda: comm.all_reduce(torch.ones(5 if odd else 4)),
            "dtype": lambda: comm.all_reduce(torch.ones(4, dtype=torch.int32 if odd else torch.float32)),
            "op": lambda: comm.all_reduce(torch.ones(4), "max" if odd else "sum"),
            "tag": lambda: comm.all_reduce(torch.ones(4), tag="b" if odd else "a"),
        }

        def all_of_it():
            calls[what]()
            for _ in range(400):
                comm.all_reduce(torch.ones(2), tag="after")
                time.sleep(0.01)

        name, _, text = caught(all_of_it)
        return name, text


@pytest.mark.parametrize("what", ["kind", "count", "dtype", "op", "tag"])
def test_calls_that_differ(ranks, what):
    outcomes = ranks(2).outcomes(_differing, what, timeout=30)
    for outcome in outcomes:
        name, text = outcome.value
        assert name == "CollectiveMismatch", text
        assert "all_reduce" in text and "do: close this communicator" in text


def _killed() -> tuple:
    comm = connected(timeout=30)
    comm.all_reduce(torch.ones(4))
    if comm.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begun = time.monotonic()

    def on():
        while True:
            comm.all_reduce(torch.ones(4), async_op=True)
            time.sleep(0.01)

    seen = caught(on)
    seconds = time.monotonic() - begun
    begun = time.monotonic()
    comm.close()
    return *seen, seconds, time.monotonic() - begun


def test_a_killed_rank_is_named_to_all(ranks):
    outcomes = ranks(3).outcomes(_killed, timeout=40)
    assert outcomes[1].exitcode == -signal.SIGKILL
    for rank in (0, 2):
        assert outcomes[rank].value is not None, outcomes[rank].traceback
        name, culprit, text, seconds, closing = outcomes[rank].value
        assert (name, culprit) == ("PeerDied", 1), text
        assert seconds < 5 and closing < 5


def _failing() -> tuple:
    def body():
        with connected(timeout=20) as comm:
            comm.all_reduce(torch.ones(4))
            if comm.rank == 0:
                raise ZeroDivisionError("a bug in the model")
            while True:
                comm.all_reduce(torch.ones(4), async_op=True)
                time.sleep(0.01)

    try:
        return caught(body)
    except ZeroDivisionError:
        return "its own", None, ""


def test_an_exception_reaches_the_others_and_the_group_is_made_anew(ranks):
    own, told = (outcome.value for outcome in ranks(2).outcomes(_failing, timeout=30))
    assert own[0] == "its own" and told[:2] == ("PeerFailed", 0) and "a bug in the model" in told[2], told


def _missing() -> tuple:
    with connected(timeout=1.0) as comm:
        comm.all_reduce(torch.ones(4))
        if comm.rank == 1:
            time.sleep(2)
            return caught(lambda: comm.all_reduce(torch.ones(4), tag="late"))

        def on():
            comm.all_reduce(torch.ones(4), tag="early", async_op=True)
            for _ in range(500):
                comm._check(comm._ops[-1])
                time.sleep(0.01)

        return caught(on)


def test_a_timeout_names_who_is_missing(ranks):
    first, second = (outcome.value for outcome in ranks(2).outcomes(_missing, timeout=30))
    assert first[:2] == second[:2] == ("TransportTimeout", 1), (first, second)
    assert "'early'" in first[2] and errors.TransportTimeout.__name__


def _different_versions() -> str:
    double()
    from tpmp_kernels.comm.nccl import library

    found = library.load()
    with pytest.MonkeyPatch.context() as patch:
        if torch.distributed.get_rank() == 1:
            patch.setattr(library, "load", lambda: found._replace(version=23000))
        try:
            connected()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "connected"


def test_different_versions_are_refused(ranks):
    texts = [outcome.value for outcome in ranks(2).outcomes(_different_versions)]
    assert texts == ["CannotShare: the ranks load different versions of NCCL: rank 0 has 2.28.9, rank 1 has 2.30.0"] * 2
