"""ops.grad_norm has the same bits for every number of ranks, threads and strides; clip_grads_ does as torch does."""

import threading

import pytest
import torch
import torch.distributed as dist
from bounds import UNIT, assert_within
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from tpmp_kernels import ops, reference

F64 = torch.float64
# (shape, dimension cut over the ranks); the leaves of (128, 300) are longer than one run of the sum.
PARAMETERS = [
    ((16, 24), 0),
    ((7,), None),
    ((24, 8), 1),
    ((8, 3, 5), 0),
    ((3, 1000), None),
    ((128, 300), 0),
    ((1,), None),
]
SHARDED = [dim for _, dim in PARAMETERS]


class ThreadGroup:
    """Ranks that are threads: all_gather through one shared list."""

    def __init__(self, rank: int, size: int, shared: dict):
        self.rank, self.size, self._shared = rank, size, shared

    def all_gather(self, output, input, *, tag):
        self._shared["inputs"][self.rank] = input.clone()
        self._shared["barrier"].wait()
        return output.copy_(torch.cat(self._shared["inputs"]).view(output.shape))


def whole_grads(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator, dtype=F64).to(dtype) for shape, _ in PARAMETERS]


def shards(grads: list, rank: int, size: int) -> list:
    return [
        grad if grad is None or dim is None else grad.chunk(size, dim)[rank]
        for grad, dim in zip(grads, SHARDED, strict=True)
    ]


def on_threads(grads: list, size: int, **options) -> list[torch.Tensor]:
    """The norm as each of `size` ranks sees it."""
    shared = {"inputs": [None] * size, "barrier": threading.Barrier(size)}
    results: list = [None] * size

    def rank_of(rank: int) -> None:
        group = ThreadGroup(rank, size, shared)
        results[rank] = ops.grad_norm(shards(grads, rank, size), group=group, sharded=SHARDED, **options)

    threads = [threading.Thread(target=rank_of, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, F64], ids=str)
def test_the_norm_has_the_same_bits_on_1_2_4_and_8_ranks(dtype):
    grads = whole_grads(dtype)
    alone = ops.grad_norm(grads, sharded=SHARDED, leaves=8)
    assert alone.dtype == F64 and alone.dim() == 0
    for size in (1, 2, 4, 8):
        assert all(torch.equal(norm, alone) for norm in on_threads(grads, size, leaves=8)), size
    exact = torch.cat([g.double().flatten() for g in grads]).norm()
    torch.testing.assert_close(alone, exact, rtol=1e-14, atol=0)
    torch.testing.assert_close(alone, reference.grad_norm(grads), rtol=1e-14, atol=0)


def test_the_norm_equals_torchs_within_rounding():
    grads = whole_grads()
    torch.testing.assert_close(ops.grad_norm(grads).float(), get_total_norm(grads), rtol=1e-6, atol=0)
    for norm in on_threads(grads, 4):  # one leaf for each rank, by default
        torch.testing.assert_close(norm, ops.grad_norm(grads), rtol=1e-14, atol=0)


def over_a_communicator() -> torch.Tensor:
    from tpmp_kernels.comm import communicator

    with communicator(dist.group.WORLD, name="norm") as comm:
        local = shards(whole_grads(), comm.rank, comm.size)
        norms = [ops.grad_norm(local, group=comm, sharded=SHARDED, leaves=8)]
        with ops.use_backend("reference"):
            norms.append(ops.grad_norm(local, group=comm, sharded=SHARDED, leaves=8))
    return torch.stack(norms)


def test_the_norm_over_a_communicator(ranks):
    alone = ops.grad_norm(whole_grads(), sharded=SHARDED, leaves=8)
    for norm, unfused in ranks(2).run(over_a_communicator):
        assert torch.equal(norm, alone)
        torch.testing.assert_close(unfused, alone, rtol=1e-14, atol=0)


def test_strides_threads_and_neighbours_change_no_bit_of_a_leaf():
    """The sums themselves: the square root of their sum would hide most differences."""
    threads, sums = torch.get_num_threads(), []
    grads = [torch.randn(300, 1000), torch.randn(8, 40, 500), torch.randn(100, 2000)]

    def leaves(grad: torch.Tensor) -> list[torch.Tensor]:
        op, parts = torch.ops.tpmp_kernels.square_sums, grad.chunk(4, 1)
        return [
            op(grad, 1, 4),
            torch.cat([op(part, 1, 1) for part in parts]),
            torch.cat([op(p, None, 1) for p in parts]),
        ]

    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for grad in grads:
                sums += leaves(grad) + leaves(grad.transpose(0, -1).contiguous().transpose(0, -1))
    finally:
        torch.set_num_threads(threads)
    same = [torch.cat(sums[i : i + 18]) for i in range(0, len(sums), 18)]
    assert all(torch.equal(each, same[0]) for each in same)
    assert all(torch.equal(sums[i], sums[i // 6 * 6]) for i in range(18))


def test_leaves_are_added_in_one_tree_in_the_order_of_the_parameters():
    """((1 + e) + (e + e)) + e, where e is half a unit of 1: one after the other, every e would be lost."""
    half = [2.0**-27, 2.0**-27]
    grads = [torch.tensor([1.0, 0.0, *half, *half, *half]), torch.tensor(half)]
    norm = ops.grad_norm(grads, sharded=[0, None], leaves=4)
    assert torch.equal(norm, torch.tensor(1.0 + 2.0**-51, dtype=F64).sqrt()) and norm > 1.0


def test_missing_and_empty_gradients_count_as_zero():
    grads = whole_grads()
    some = [None if i in (0, 3) else g for i, g in enumerate(grads)]
    zeros = [torch.zeros_like(g) if i in (0, 3) else g for i, g in enumerate(grads)]
    expected = ops.grad_norm(zeros, sharded=SHARDED, leaves=8)
    for size in (1, 2, 8):
        assert all(torch.equal(norm, expected) for norm in on_threads(some, size, leaves=8))
    for nothing in ([], [None], [torch.zeros(0, 3)], [torch.zeros(3)]):
        assert torch.equal(ops.grad_norm(nothing), torch.zeros((), dtype=F64))


def test_squares_that_overflow_their_dtype_do_not_overflow_the_norm():
    for dtype, value in ((torch.float16, 6e4), (torch.float32, 1e30), (torch.bfloat16, 1e30)):
        grad = torch.full((64,), value).to(dtype)
        torch.testing.assert_close(ops.grad_norm([grad]), grad[0].double() * 8, rtol=1e-15, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_reaches_the_norm_and_is_an_error_where_asked(bad):
    grads = [torch.ones(3), torch.tensor([1.0, bad])]
    norm = ops.grad_norm(grads)
    torch.testing.assert_close(norm, torch.tensor(bad, dtype=F64), equal_nan=True)
    with pytest.raises(ValueError, match=f"clip_grads_: the norm is {bad}, expected a finite one"):
        ops.clip_grads_(grads, norm, 1.0, error_if_nonfinite=True)
    theirs = [torch.nn.Parameter(g.clone()) for g in grads]
    for p, g in zip(theirs, grads, strict=True):
        p.grad = g.clone()
    clip_grads_with_norm_(theirs, 1.0, norm)
    ops.clip_grads_(grads, norm, 1.0)
    torch.testing.assert_close(grads, [p.grad for p in theirs], equal_nan=True)


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e9])
def test_clipping_is_torchs(max_norm):
    mixed = [whole_grads(dtype)[:3] for dtype in (torch.float32, torch.bfloat16, torch.float16, F64)]
    grads = [g for some in mixed for g in some]
    norm = ops.grad_norm(grads)
    scale = min(1.0, max_norm / (float(norm) + 1e-6))
    expected = [g.double() * scale for g in grads]
    versions = [g._version for g in grads]
    ops.clip_grads_([None, *grads], norm, max_norm)
    for got, truth, version in zip(grads, expected, versions, strict=True):
        rounding = (UNIT[got.dtype] + 2 * UNIT[torch.promote_types(got.dtype, torch.float32)]) * truth.abs()
        tiny = torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps
        assert_within(got, truth, rounding + tiny)
        assert got._version > version
    if max_norm == 1e9:
        assert all(torch.equal(got.double(), truth) for got, truth in zip(grads, expected, strict=True))


def test_fullgraph_of_norm_and_clipping():
    def step(grads):
        norm = ops.grad_norm(grads, sharded=[0, None], leaves=4)
        ops.clip_grads_(grads, norm, 0.5)
        return norm

    grads = [torch.randn(8, 5), torch.randn(3)]
    copies = [g.clone() for g in grads]
    norm, expected = torch.compile(step, fullgraph=True, backend="aot_eager")(grads), step(copies)
    assert torch.equal(norm, expected)
    assert all(torch.equal(a, b) for a, b in zip(grads, copies, strict=True))


class Two:
    rank, size = 0, 2


G = [torch.ones(6, 4), torch.ones(3)]
REFUSED = [
    (lambda: ops.grad_norm(G, sharded=[0]), ValueError, "sharded must have one entry for each gradient, got 1 for 2"),
    (
        lambda: ops.grad_norm(G, group=Two(), leaves=3),
        ValueError,
        "leaves must be a multiple of the group's size, got",
    ),
    (
        lambda: ops.grad_norm(G, leaves=0),
        ValueError,
        "leaves must be a multiple of the group's size, got 0",
    ),
    (
        lambda: ops.grad_norm(G, sharded=[2, None]),
        ValueError,
        "grads[0] has 2 dimensions but is said to be cut along",
    ),
    (
        lambda: ops.grad_norm(G, sharded=[-1, None]),
        ValueError,
        "grads[0] has 2 dimensions but is said to be cut along",
    ),
    (
        lambda: ops.grad_norm(G, sharded=[1, 0], leaves=4),
        ValueError,
        "grads[1] has 3 elements along dimension 0, not divisible by the 4 leaves of each rank; pad the parameter",
    ),
    (
        lambda: ops.grad_norm([torch.ones(3).long()]),
        TypeError,
        "grads[0] must be fp64, fp32, fp16 or bf16, got",
    ),
    (lambda: ops.grad_norm([torch.eye(3).to_sparse()]), TypeError, "grads[0] must be dense, got layout"),
    (lambda: ops.grad_norm([3.0]), TypeError, "grads[0] must be a Tensor, got float"),
]


@pytest.mark.parametrize(("call", "kind", "text"), REFUSED)
def test_refused_in_one_sentence(call, kind, text):
    with pytest.raises(kind) as error:
        call()
    assert str(error.value).startswith(f"grad_norm: {text}") and "\n" not in str(error.value)


def test_a_max_norm_that_would_turn_gradients_round_is_refused():
    for wrong in (-1.0, torch.nan):
        with pytest.raises(ValueError, match="clip_grads_: max_norm must be at least 0, got"):
            ops.clip_grads_(G, torch.ones(()), wrong)
