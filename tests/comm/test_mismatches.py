"""Two programs that differ in one field of one call: named on every rank, with both calls, before the group goes on.

A program is a short list of calls. Rank `odd` runs the program with one field changed, the others run it as it is.
"""

import random
import time
from collections import Counter

import pytest
import torch
from shm_world import caught, world

from tpmp_kernels.comm._ext import C

pytestmark = pytest.mark.skipif(C is None, reason="needs the compiled extension")

FIELDS = ("kind", "dtype", "count", "op", "root", "tag", "order", "peer", "transfer")
DTYPES = (torch.float32, torch.int32, torch.bfloat16, torch.float16, torch.float64)
COUNTS = (0, 1, 8, 1000, 40_000, 300_000)


ROOTED = ("reduce", "broadcast", "scatter", "gather")
KINDS = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all", "barrier", *ROOTED)
TAGS = ("", "a", "layer7.mlp.down_proj.forward.microbatch3")


def _collective(draw: random.Random) -> dict:
    return {
        "kind": draw.choice(KINDS),
        "n": draw.choice(COUNTS),
        "dtype": draw.choice(DTYPES),
        "op": draw.choice(("sum", "max")),
        "root": draw.randrange(2),
        "tag": draw.choice(TAGS),
    }


def _other(draw: random.Random, options, than):
    return draw.choice([option for option in options if option != than])


def draw_pair(field: str, draw: random.Random) -> tuple[list[dict], list[dict]]:
    """The right program and the odd one, which differ in `field` alone."""
    right = [_collective(draw) for _ in range(draw.randrange(1, 4))]
    at = draw.randrange(len(right))
    call = right[at]
    if field == "op":
        call["kind"] = draw.choice(("all_reduce", "reduce", "reduce_scatter"))
    elif field == "root":
        call["kind"] = draw.choice(ROOTED)
    elif field in ("dtype", "count", "kind") and call["kind"] == "barrier":
        call["kind"] = "all_reduce"
    elif field in ("peer", "transfer"):
        call.update(kind="send", n=draw.choice(COUNTS[1:]))
    odd = [dict(each) for each in right]
    changed = odd[at]
    if field == "kind":
        changed["kind"] = _other(draw, ("all_reduce", "all_gather", "broadcast", "barrier", "send"), call["kind"])
    elif field == "dtype":
        changed["dtype"] = _other(draw, DTYPES, call["dtype"])
    elif field == "count":
        changed["n"] = _other(draw, COUNTS, call["n"])
    elif field == "op":
        changed["op"] = _other(draw, ("sum", "max", "min", "prod"), call["op"])
    elif field == "root":
        changed["root"] = 1 - call["root"]
    elif field == "tag":
        changed["tag"] = call["tag"] + "b"
    elif field == "order":
        call["tag"], extra = "first", {**call, "tag": "second"}
        right.insert(at + 1, extra)
        odd[at : at + 1] = [extra, call]
    elif field == "peer":
        changed["kind"] = "send elsewhere"
    else:
        key, options = draw.choice((("dtype", DTYPES), ("n", COUNTS), ("tag", ("x", "y"))))
        changed[key] = _other(draw, options, call[key])
    return right, odd


def _run(comm, call: dict) -> None:
    kind, n, dtype, root, tag = call["kind"], call["n"], call["dtype"], call["root"], call["tag"]
    part, whole = torch.zeros(n, dtype=dtype), torch.zeros(n * comm.size, dtype=dtype)
    if kind == "send":  # from rank 0 to rank 1
        if comm.rank < 2:
            comm.send(part, 1, tag=tag) if comm.rank == 0 else comm.recv(part, 0, tag=tag)
    elif kind == "send elsewhere":  # the sender to rank 2, or the receiver from it
        comm.send(part, 2, tag=tag) if comm.rank == 0 else comm.recv(part, 2, tag=tag)
    elif kind == "all_reduce":
        comm.all_reduce(part, call["op"], tag=tag)
    elif kind == "reduce":
        comm.reduce(part, root, call["op"], tag=tag)
    elif kind == "reduce_scatter":
        comm.reduce_scatter(part, whole, call["op"], tag=tag)
    elif kind == "all_gather":
        comm.all_gather(whole, part, tag=tag)
    elif kind == "broadcast":
        comm.broadcast(part, root, tag=tag)
    elif kind == "all_to_all":
        comm.all_to_all(whole, torch.zeros_like(whole), tag=tag)
    elif kind == "scatter":
        comm.scatter(part, whole, root, tag=tag)
    elif kind == "gather":
        comm.gather(whole, part, root, tag=tag)
    else:
        comm.barrier(tag=tag)


def _outcomes(pairs: list) -> list[tuple]:
    seen = []
    for right, odd, who in pairs:
        with world() as comm:
            start = time.monotonic()
            program = odd if comm.rank == who else right
            # The barrier at the end: who sees nothing of its peers' calls until then, sees it here.
            result = caught(lambda comm=comm, program=program: [_run(comm, c) for c in program] and comm.barrier())
            seen.append((*result, time.monotonic() - start))
    return seen


def _check(ranks, pairs_of_each: int, seed: int) -> Counter:
    draw, named = random.Random(seed), Counter()
    for size in (2, 3):
        fields = [field for field in FIELDS if field != "peer" or size > 2]
        pairs = [(field, *draw_pair(field, draw), draw.randrange(2)) for field in fields for _ in range(pairs_of_each)]
        results = ranks(size).run(_outcomes, [pair[1:] for pair in pairs], timeout=300)
        for i, (field, right, odd, who) in enumerate(pairs):
            seen = [result[i] for result in results]
            about = f"{field}: rank {who} runs {odd}, the others {right}: {seen}"
            assert all(kind in ("CollectiveMismatch", "PeerDied") for kind, *_ in seen), about
            kinds, culprits, texts = {s[0] for s in seen}, {s[1] for s in seen}, [s[2] for s in seen]
            assert kinds == {"CollectiveMismatch"} and len(culprits) == 1, about
            assert all(text.count(" called ") >= 2 for text in texts), about
            assert max(s[3] for s in seen) < 2, about
            named[field] += 1
    return named


def test_every_kind_of_mismatch_is_named_on_every_rank(ranks):
    named = _check(ranks, 5, seed=4)
    assert len(named) == 9 and sum(named.values()) >= 80


@pytest.mark.full
def test_two_thousand_pairs(ranks):
    named = _check(ranks, 120, seed=5)
    assert len(named) == 9 and sum(named.values()) >= 2000
