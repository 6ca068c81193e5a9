"""The comparison of what ranks called, without ranks: generated mismatches, forgotten calls, circles, presence."""

import itertools
import random
import subprocess
import sys
import threading

import pytest
import torch.distributed as dist

from tpmp_kernels.comm.out_of_band import presence
from tpmp_kernels.comm.out_of_band.agreement import Judge, circle
from tpmp_kernels.comm.out_of_band.bulletin import Bulletin
from tpmp_kernels.comm.out_of_band.reports import COLLECTIVES, Call, Report

_CHANGES = {
    "kind": {"kind": "barrier"},
    "dtype": {"dtype": "bfloat16"},
    "count": {"count": 9},
    "reduce op": {"op": "max"},
    "root": {"root": 2},
    "tag": {"tag": "x|split|y"},
}


def _call(number: int = 0, lane: str = COLLECTIVES, kind: str = "all_reduce", **changes) -> Call:
    op, root = ("sum", -1) if lane == COLLECTIVES else (None, -1)
    return Call(lane, number, kind, "float32", 8, op, root, "t", (8,))._replace(**changes)


def _reports(*calls_of_ranks) -> list[Report]:
    reports = []
    for calls in calls_of_ranks:
        reports.append(Report())
        for call in calls:
            reports[-1].add(call)
    return reports


@pytest.mark.parametrize(("size", "odd", "field"), [*itertools.product((2, 3, 5), (0, 1), _CHANGES)])
def test_one_odd_call_among_many(size, odd, field):
    at = random.Random(f"{size}{odd}{field}").randrange(20)
    lists = [[_call(k) for k in range(20)] for _ in range(size)]
    lists[odd][at] = lists[odd][at]._replace(**_CHANGES[field])
    verdict = Judge(size).verdict(_reports(*lists), 0.0)
    assert (verdict.error, verdict.culprit) == ("CollectiveMismatch", odd if size > 2 else None)
    assert verdict.text.endswith(f"they differ in {field}") and f"#{at + 1}" in verdict.text


def test_a_mismatch_waits_a_moment_for_the_ranks_that_have_not_come_to_it():
    judge = Judge(3)
    reports = _reports([_call()], [_call(count=9)], [])
    assert judge.verdict(reports, 10.0) is None
    reports[2].add(_call())
    assert judge.verdict(reports, 10.1).culprit == 1
    late = _reports([_call()], [_call(count=9)], [])
    assert judge.verdict(late, 10.9).culprit is None


def test_calls_that_agree_are_counted_and_forgotten():
    judge = Judge(2)
    reports = _reports([_call(k) for k in range(7)], [_call(k) for k in range(5)])
    assert judge.verdict(reports, 0.0) is None and judge.agreed == {COLLECTIVES: 5}
    assert [report.forget(judge.agreed) for report in reports] == [True, False]
    for report, calls in zip(reports, ([7], [5, 6, 7]), strict=True):
        for number in calls:
            report.add(_call(number, tag="odd" if number == 7 and len(calls) > 1 else "t"))
    assert "#8" in judge.verdict(reports, 0.0).text and judge.agreed == {COLLECTIVES: 5}


def test_shapes_may_differ_and_the_ends_of_a_message_are_one_call():
    same = _reports([_call(shape=(2, 4))], [_call(shape=(8,))])
    assert Judge(2).verdict(same, 0.0) is None
    ends = _reports([_call(0, "0>1", "send")], [_call(0, "0>1", "recv")])
    assert Judge(2).verdict(ends, 0.0) is None
    ends[1].add(_call(1, "0>1", "recv", count=9))
    ends[0].add(_call(1, "0>1", "send"))
    text = Judge(2).verdict(ends, 0.0).text
    assert (
        "rank 1 called recv float32[8] from rank 0 't' #2, but rank 0 called send float32[8] to rank 1 't' #2" in text
    )


def test_splits_are_compared_by_pairs():
    split = {"kind": "all_to_all", "op": None, "count": "split"}
    right = _reports([_call(sends=(1, 2), receives=(1, 3), **split)], [_call(sends=(3, 4), receives=(2, 4), **split)])
    assert Judge(2).verdict(right, 0.0) is None
    right[0].add(_call(1, sends=(1, 5), receives=(1, 3), **split))
    right[1].add(_call(1, sends=(3, 4), receives=(2, 4), **split))
    assert "5 elements for rank 1, but rank 1 called it with 2" in Judge(2).verdict(right, 0.0).text


def _waiting(*calls: Call | None) -> list[Report]:
    reports = _reports(*([call] if call else [] for call in calls))
    for report, call in zip(reports, calls, strict=True):
        report.waits = call
    return reports


def test_circles_and_what_is_none():
    collective = _call()
    recv = {(a, b): _call(0, f"{a}>{b}", "recv") for a in range(4) for b in range(4)}
    send = {(a, b): _call(0, f"{a}>{b}", "send") for a in range(4) for b in range(4)}
    everyone = range(4)
    assert circle(_waiting(recv[1, 0], recv[2, 1], recv[3, 2], recv[0, 3]), everyone).culprit is None
    assert circle(_waiting(recv[1, 0], recv[2, 1], recv[3, 2], None), everyone) is None  # rank 3 may still send
    assert circle(_waiting(recv[1, 0], send[1, 0], recv[3, 2], send[3, 2]), everyone) is None  # both served
    assert circle(_waiting(collective, collective, collective, recv[0, 3]), everyone).culprit == 3
    assert circle(_waiting(collective, collective, collective, recv[0, 3]), [0, 1, 2]) is None  # not stuck for long
    judge = Judge(2)
    reports = _waiting(recv[1, 0], recv[0, 1])
    assert judge.verdict(reports, 5.0) is None and judge.verdict(reports, 5.4) is None
    assert judge.verdict(reports, 5.6).error == "CollectiveMismatch"


def test_who_waits_for_a_rank_that_left_knows():
    reports = _waiting(_call(), None)
    reports[1].left = True
    verdict = Judge(2).verdict(reports, 0.0)
    assert (verdict.error, verdict.culprit) == ("PeerDied", 1) and "rank 0 waits for it in all_reduce" in verdict.text
    reports[1].add(_call())
    assert Judge(2).verdict(reports, 0.0) is None  # it had made the call before


# ---- reports in a Store


def _pair() -> list[Bulletin]:
    store = dist.HashStore()
    return [Bulletin(dist.PrefixStore("p", store), rank, 2) for rank in range(2)]


def test_reports_travel_and_the_first_failure_counts():
    zero, one = _pair()
    one.reports[1].add(_call(tag="a|b"))
    one.reports[1].waits = _call(tag="a|b")
    one.write({})
    zero.read([0, 1])
    assert zero.reports[1].lanes["*"].prints == one.reports[1].lanes["*"].prints
    assert zero.reports[1].waits.words() == _call(tag="a|b").words()
    verdict = Judge(2).verdict(_reports([_call()], [_call(tag="b")]), 0.0)
    assert one.failure() is None and zero.fail(verdict) == verdict
    assert one.fail(verdict._replace(text="later")) == verdict == one.failure()


def test_the_last_one_to_leave_clears_the_store():
    store = dist.HashStore()
    for rank in range(2):
        Bulletin(store, rank, 2).leave({})
    assert store.num_keys() == 0


def test_whoever_serves_the_store_lets_the_others_leave_first():
    zero, one = _pair()
    zero.leave({})
    lingering = threading.Thread(target=zero.linger)
    lingering.start()
    lingering.join(0.05)
    assert lingering.is_alive()
    one.leave({})
    lingering.join(5)
    assert not lingering.is_alive()


def test_a_rank_of_another_host_is_dead_when_it_has_been_silent(monkeypatch):
    zero, one = _pair()
    monkeypatch.setattr(one, "_process", ["elsewhere", 1, "1"])
    for _ in range(2):
        one.write({})
        zero.read([1])
    assert zero.dead([1]) is None
    beat, heard = zero._heard[1]
    zero._heard[1] = beat, heard - 11
    assert zero.dead([1]).culprit == 1 and "no sign of life for 10 s" in zero.dead([1]).text
    one._beaten -= 2
    one.write({})  # a sign of life without news
    zero.read([1])
    assert zero.dead([1]) is None


def test_a_process_is_gone_when_it_ended_be_it_reaped_or_not():
    program = (
        "from tpmp_kernels.comm.out_of_band import presence\nprint(*presence.identity(), sep='|', flush=True); input()"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    host, pid, start = child.stdout.readline().strip().split("|")
    other = [host, int(pid), start]
    assert presence.comparable(presence.identity(), other) and not presence.gone(other)
    assert presence.gone([host, int(pid), "12345"])  # the number of a process that ended, used anew
    child.kill()
    while not presence.gone(other):  # a zombie now
        pass
    child.communicate()
    assert presence.gone(other)
    assert not presence.comparable(presence.identity(), ["elsewhere", 1, "1"])
