"""The life of an shm communicator: coming together, exceptions, signals, forks, closing, and nothing left behind."""

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
from tpmp_kernels.errors import TransportError

pytestmark = pytest.mark.skipif(C is None, reason="needs the compiled extension")


# ---- coming together


def test_the_segment_is_handed_to_nobody_else():
    server = C.SegmentServer(2)
    first = server.transport()
    refused = []

    def stranger(nonce: str, world: int, rank: int):
        try:
            return C.attach(server.address, nonce, world, rank)
        except TransportError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=stranger, args=args) for args in
               [("0" * 32, 2, 1), (server.nonce, 3, 1), (server.nonce, 2, 0), (server.nonce, 2, 2)]]  # fmt: skip
    for thread in threads:
        thread.start()
        server.serve(10)
        thread.join()
    assert len(refused) == 4 and all("refused" in text for text in refused)
    assert stranger("0" * 31, 2, 1) is None and "32 hex digits" in refused[-1]
    with pytest.raises(TransportError, match="rank 0 of this segment is already taken"):
        server.transport()
    first.close()


def test_the_segment_is_sealed_against_truncation():
    server = C.SegmentServer(2)
    path = next(p for fd in os.listdir("/proc/self/fd") if "memfd:tpmp" in _link(p := f"/proc/self/fd/{fd}"))
    with pytest.raises(PermissionError):
        os.truncate(path, 4096)
    assert server.address != C.SegmentServer(2).address


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except FileNotFoundError:  # the directory listing's own descriptor
        return ""


def _absent():
    if dist.get_rank() == 0:
        return caught(lambda: world(timeout=0.3))
    return None


def test_a_rank_that_never_comes_is_named(ranks):
    kind, culprit, text = ranks(2).outcomes(_absent)[0].value
    assert (kind, culprit) == ("TransportTimeout", 1) and "rank 1 did not come within 0.3 s" in text
    ranks(2).close()  # its ranks now disagree about how often they met


# ---- exceptions, signals, forks, closing


def _raises():
    try:
        with world() as comm:
            if comm.rank == 0:
                raise ValueError("shape of layer 7")
            comm.all_reduce(torch.ones(3))
    except (ValueError, TransportError) as error:
        return type(error).__name__, getattr(error, "culprit", None), str(error)


def test_an_exception_on_one_rank_reaches_the_others_with_its_text(ranks):
    outcomes = ranks(3).run(_raises)
    assert outcomes[0][0] == "ValueError"
    for kind, culprit, text in outcomes[1:]:
        assert (kind, culprit) == ("PeerFailed", 0) and "ValueError: shape of layer 7" in text


def _interrupted():
    comm = world()
    me = torch.tensor([os.getpid()])
    if comm.rank == 1:
        comm.recv(me, 0)
        while "in barrier" not in comm.last_ops()[0]:
            os.sched_yield()
        start = torch.tensor([time.monotonic()], dtype=torch.float64)
        os.kill(me.item(), signal.SIGINT)
        return *caught(lambda: comm.recv(torch.ones(1), 0)), start.item()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        comm.send(me, 1)
        comm.barrier()
    except KeyboardInterrupt:
        return "KeyboardInterrupt", time.monotonic(), caught(comm.barrier)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def test_ctrl_c_interrupts_a_wait_and_tells_the_peers(ranks):
    (name, end, again), (kind, culprit, text, start) = ranks(2).run(_interrupted)
    assert name == "KeyboardInterrupt" and end - start < 0.5
    assert again[0] == "PeerFailed"
    assert (kind, culprit) == ("PeerFailed", 0) and "interrupted" in text


def _under_alarms() -> bool:
    hits = []
    signal.signal(signal.SIGALRM, lambda *_: hits.append(1))
    with world() as comm:
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        good = all(comm.all_reduce(torch.ones(n % 700))[:1].eq(comm.size).all() for n in range(1500))
        signal.setitimer(signal.ITIMER_REAL, 0)
    return good and len(hits) > 0


def test_signals_do_not_disturb_calls(ranks):
    assert all(ranks(2).run(_under_alarms))


def _forks():
    comm = world()
    x = torch.ones(1 << 18)
    pending = comm.isend(x, 1) if comm.rank == 0 else None
    if comm.rank == 0:
        for use in (True, False):
            child = os.fork()
            if child == 0:
                seen = caught(lambda: comm.all_reduce(torch.ones(3))) if use else ("TransportError", None, "forked")
                comm.close()
                del comm
                os._exit(0 if seen[0] == "TransportError" and "forked" in seen[2] else 1)
            assert os.waitpid(child, 0)[1] == 0
        pending.wait()
    else:
        comm.recv(x, 0)
    total = comm.all_reduce(torch.ones(3)).sum().item()
    comm.close()
    return total


def test_a_forked_child_is_refused_and_the_parent_goes_on(ranks):
    assert ranks(2).run(_forks) == [6.0, 6.0]


def _held() -> tuple:
    fds = sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if fd.isdigit()
                 and os.path.islink(f"/proc/self/fd/{fd}"))  # fmt: skip
    with open("/proc/self/maps") as maps:
        mapped = maps.read()
    assert "/dev/shm/" not in mapped.replace("/dev/shm/sem.", "")
    return len(fds), "memfd" in "".join(fds), "memfd:tpmp" in mapped, len(os.listdir("/proc/self/task"))


def _leftovers() -> list:
    world().close()  # what the first creation loads for good
    gc.collect()
    before = _held()
    for _ in range(4):
        comm = world()
        comm.all_reduce(torch.ones(3))
        inside = _held()
        comm.close()
        del comm
    gc.collect()
    return [before, inside, _held()]


def test_nothing_is_left_behind(ranks):
    for before, inside, after in ranks(2).run(_leftovers):
        assert before == after and not after[2]
        assert inside[0] == before[0] + 1 and inside[1] and inside[2]  # mapped, the one descriptor kept for the heaps
    assert not [name for name in os.listdir("/dev/shm") if "tpmp" in name]


def _closed() -> list:
    comm = world()
    work = comm.irecv(torch.ones(4), 1 - comm.rank)
    comm.close()
    comm.close()
    calls = [work.wait, comm.barrier, lambda: comm.send(torch.ones(1), 1 - comm.rank)]
    return [work.done(), *(caught(call) for call in calls)]


def test_a_closed_communicator_says_so(ranks):
    for done, *seen in ranks(2).run(_closed):
        assert done and all(kind == "TransportError" and "closed" in text for kind, _, text in seen)
