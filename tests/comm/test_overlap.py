"""Linears whose collective runs under their GEMM, against the whole linear in one process: values and gradients, in any
chunks; what is posted when; faults; the cost rule. How long they take is a matter of test_overlap_timed.py."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from bounds import UNIT, assert_within, gamma
from shm_world import caught, refusals
from torch import Tensor

from tpmp_kernels import ops
from tpmp_kernels.comm import EmulatedLink, SelfCommunicator, communicator, overlap
from tpmp_kernels.comm.overlap import Costs, Link, Rates, chunks, functions
from tpmp_kernels.comm.overlap.plan import LEAST_GAIN, LEAST_ROWS, MOST_CHUNKS, bounds, choose, fastest

K, N = 12, 24  # 2, 3 and 4 ranks divide them


def whole(t: Tensor, comm) -> Tensor:
    return t


def rows(t: Tensor, comm) -> Tensor:
    return t.chunk(comm.size)[comm.rank] if len(t) else t


def columns(t: Tensor, comm) -> Tensor:
    return t.chunk(comm.size, -1)[comm.rank]


@dataclass(frozen=True)
class Form:
    """How a rank's x, weight and y are cut from those of the whole linear."""

    x: Callable
    weight: Callable
    y: Callable
    matrix: bool  # x is one, and its rows are cut over the ranks on one side


FORMS = {
    "linear_all_reduce": Form(columns, columns, whole, False),
    "copy_linear": Form(whole, rows, columns, False),
    "linear_reduce_scatter": Form(columns, columns, rows, True),
    "all_gather_linear": Form(rows, rows, columns, True),
}
EACH = pytest.mark.parametrize("name", FORMS)
HOWS = [
    {"mode": "none"},
    {"mode": "auto"},
    {"mode": "chunked"},
    *({"mode": "chunked", "chunks": c} for c in (1, 2, 3, 8)),
]


def integers(*shape: int, seed: int) -> Tensor:
    """-1, 0 and 1, so that every sum here is exact, in bf16 too."""
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed)).double()


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def strided(t: Tensor) -> Tensor:
    """The same values behind other strides, in both dimensions."""
    return t.new_zeros(*t.shape[:-1], 2 * t.shape[-1]).transpose(0, -1).contiguous().transpose(0, -1)[..., ::2].copy_(t)


def open_comm(transport: str, latency: float = 1e-4, bandwidth: float = 1e9, timeout: float = 30):
    plain = communicator(
        dist.group.WORLD, transport=transport.removeprefix("emulated "), name="overlap", timeout=timeout
    )
    return EmulatedLink(plain, latency=latency, bandwidth=bandwidth) if "emulated" in transport else plain


def problem(draw: Callable, lead: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """X [.., K], W [N, K], dY [.., N], whole, in values that dtype holds."""
    whole = draw(*lead, K, seed=1), draw(N, K, seed=2), draw(*lead, N, seed=3)
    return [t.to(dtype).double() for t in whole]


def oracle(x: Tensor, weight: Tensor, dy: Tensor) -> list[Tensor]:
    flat, dflat = x.reshape(-1, K), dy.reshape(-1, N)
    return [x @ weight.t(), dy @ weight, dflat.t() @ flat]


def mine(name: str, tensors, comm) -> list[Tensor]:
    """y, dx, dweight of this rank, or x, weight, dy in their order."""
    form = FORMS[name]
    return [cut(t, comm) for cut, t in zip((form.y, form.x, form.weight), tensors, strict=True)]


def arguments(name: str, whole_ones, comm, dtype, reshape: Callable = Tensor.contiguous) -> list[Tensor]:
    x, weight, dy = whole_ones
    dy, x, weight = (reshape(t.to(dtype)) for t in mine(name, (dy, x, weight), comm))
    return [x.requires_grad_(), weight.requires_grad_(), dy]


def call(name: str, x: Tensor, weight: Tensor, dy: Tensor, comm, **how) -> list[Tensor]:
    """y, dx, dweight; AssertionError where an argument was written."""
    before = [t.detach().clone() for t in (x, weight, dy)]
    y = getattr(overlap, name)(x, weight, comm, **how)
    dx, dweight = torch.autograd.grad(y, [x, weight], dy)
    assert all(torch.equal(a, b) for a, b in zip(before, (x.detach(), weight.detach(), dy), strict=True))
    assert dx.dtype == dweight.dtype == y.dtype == x.dtype
    return [y.detach(), dx, dweight]


# ---- values and gradients


def leads(name: str, size: int) -> list[tuple[int, ...]]:
    """Shapes of X but for K: no row, one, and numbers that chunks do not divide, of every rank where it has a shard."""
    return [(n * size,) for n in (0, 1, 5, 8)] if FORMS[name].matrix else [(0,), (1,), (5,), (2, 4), (2, 3, 3), ()]


def run_exact(name: str, transport: str) -> list[str]:
    """What is not the shard of the whole linear, to the bit."""
    wrong = []
    with open_comm(transport) as comm:
        for lead in leads(name, comm.size):
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                tensors = problem(integers, lead, dtype)
                expected = [t.to(dtype) for t in mine(name, oracle(*tensors), comm)]
                for how in HOWS:
                    reshape = strided if how.get("chunks") == 3 and lead else Tensor.contiguous
                    got = call(name, *arguments(name, tensors, comm, dtype, reshape), comm, **how)
                    if not all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)):
                        wrong.append(f"{name} {lead} {dtype} {how}")
    return wrong


@EACH
@pytest.mark.parametrize("transport", ["shm", "emulated shm"])
@pytest.mark.parametrize("size", [2, 3, pytest.param(4, marks=pytest.mark.full)])
def test_values_and_gradients_are_those_of_the_whole_linear(ranks, name, transport, size):
    assert ranks(size).run(run_exact, name, transport) == [[]] * size


def run_exact_over_gloo() -> list[str]:
    wrong = []
    with open_comm("process_group") as comm:
        for name in FORMS:
            tensors = problem(integers, (6,), torch.float32)
            expected = mine(name, oracle(*tensors), comm)
            got = call(name, *arguments(name, tensors, comm, torch.float32), comm, mode="chunked", chunks=2)
            wrong += [name for a, b in zip(got, expected, strict=True) if not torch.equal(a.double(), b)]
    return wrong


def test_torch_distributed_carries_them_too(ranks):
    assert ranks(2).run(run_exact_over_gloo) == [[]] * 2


def bound(a: Tensor, b: Tensor, dtype: torch.dtype, size: int) -> Tensor:
    """Of a @ b, whose partial sums are rounded to dtype once on each rank, then added in fp32 (fp64) and rounded."""
    wide, out = UNIT[torch.promote_types(dtype, torch.float32)], UNIT[dtype]
    total = a.abs() @ b.abs()
    error = gamma(a.shape[-1] + size + 2, wide) * total
    error = error + out * (total + error)
    return error + out * ((a @ b).abs() + error) + torch.finfo(dtype).smallest_normal


def run_rounded(dtype: torch.dtype) -> dict:
    with open_comm("emulated shm") as comm:
        tensors = problem(normal, (10 * comm.size,), dtype)
        return {
            (name, how["mode"]): call(name, *arguments(name, tensors, comm, dtype), comm, **how)
            for name in FORMS
            for how in (HOWS[0], HOWS[-2])
        }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 3])
def test_rounding_explains_every_difference(ranks, size, dtype):
    x, weight, dy = problem(normal, (10 * size,), dtype)
    limits = bound(x, weight.t(), dtype, size), bound(dy, weight, dtype, size), bound(dy.t(), x, dtype, size)
    for rank, results in enumerate(ranks(size).run(run_rounded, dtype)):
        comm = SelfCommunicator()
        comm.rank, comm.size = rank, size
        for (name, _), got in results.items():
            for ours, exact, limit in zip(
                got, *(mine(name, t, comm) for t in (oracle(x, weight, dy), limits)), strict=True
            ):
                assert_within(ours, exact, limit)


def run_widened(name: str) -> bool:
    """In fp32 within, as on a CPU where that is the faster GEMM for bf16."""
    with open_comm("emulated shm") as comm, patch.object(chunks, "widens", lambda a, b: a.dtype == torch.bfloat16):
        tensors = problem(integers, (6,), torch.bfloat16)
        expected = mine(name, oracle(*tensors), comm)
        got = call(name, *arguments(name, tensors, comm, torch.bfloat16), comm, **HOWS[-2])
        return all(torch.equal(a.double(), b) for a, b in zip(got, expected, strict=True))


@EACH
def test_operands_may_be_widened(ranks, name):
    assert ranks(2).run(run_widened, name) == [True] * 2


def run_several() -> list[str]:
    """Two weights on one x, the second's output unused in one of the calls."""
    wrong = []
    with open_comm("emulated shm") as comm:
        for name in ("copy_linear", "all_gather_linear"):
            x, weight, dy = arguments(name, problem(integers, (6,), torch.float32), comm, torch.float32)
            other = integers(*weight.shape, seed=9).float().requires_grad_()
            for how in HOWS:
                ys = getattr(overlap, f"{name}s")(x, [weight, other], comm, **how)
                single = [call(name, x, each, dy, comm, **how) for each in (weight, other)]
                dx, *dweights = torch.autograd.grad(ys, [x, weight, other], [dy, dy], retain_graph=True)
                got = [*ys, dx, *dweights]
                expected = [single[0][0], single[1][0], single[0][1] + single[1][1], single[0][2], single[1][2]]
                dx, unused = torch.autograd.grad(ys[0], [x, other], dy, allow_unused=True)
                if not all(torch.equal(a, b) for a, b in zip([*got, dx], [*expected, single[0][1]], strict=True)):
                    wrong.append(f"{name} {how}")
                if unused is not None:
                    wrong.append(f"{name} {how}: a gradient for a weight that was not used")
    return wrong


def test_several_weights_share_one_gather_and_one_reduction(ranks):
    assert ranks(2).run(run_several) == [[]] * 2


# ---- gradients where they are wanted


def run_wanted(name: str) -> list[str]:
    """Gradients of x alone, of the weight alone, of none; y written in place; no grad mode."""
    wrong = []
    with open_comm("emulated shm") as comm:
        tensors = problem(integers, (6,), torch.float32)
        x, weight, dy = arguments(name, tensors, comm, torch.float32)
        y, dx, dweight = call(name, x, weight, dy, comm, mode="none")
        how = {"mode": "chunked", "chunks": 2}
        run = getattr(overlap, name)
        for wanted, expected, args in ((x, dx, (x, weight.detach())), (weight, dweight, (x.detach(), weight))):
            found = run(*args, comm, **how)
            found.add_(1)  # the caller's own
            (grad,) = torch.autograd.grad(found, wanted, dy)
            if not (torch.equal(grad, expected) and torch.equal(found, y + 1)):
                wrong.append(f"{name}: gradient of {list(wanted.shape)} alone")
        with torch.inference_mode():
            if not torch.equal(run(x, weight, comm, **how), y):
                wrong.append(f"{name}: in inference")
    return wrong


@EACH
def test_only_wanted_gradients_are_made(ranks, name):
    assert ranks(2).run(run_wanted, name) == [[]] * 2


def run_main_grad(name: str, dtype: torch.dtype) -> list[str]:
    wrong = []
    with open_comm("emulated shm") as comm:
        tensors = problem(integers, (6,), dtype)
        expected = mine(name, oracle(*tensors), comm)[2]
        x, weight, dy = arguments(name, tensors, comm, dtype)
        ops.attach_main_grad([weight])
        for how in ({"mode": "none"}, {"mode": "chunked", "chunks": 2}):
            weight.main_grad.zero_()
            for _ in range(2):
                getattr(overlap, name)(x, weight, comm, **how).backward(dy)
            if not torch.equal(weight.main_grad.double(), 2 * expected):
                wrong.append(f"{how}: two backwards")
            with ops.split_backward([weight]) as later:
                getattr(overlap, name)(x, weight, comm, **how).backward(dy)
            if not torch.equal(weight.main_grad.double(), 2 * expected):
                wrong.append(f"{how}: the split backward has added")
            later.run()
            if not torch.equal(weight.main_grad.double(), 3 * expected):
                wrong.append(f"{how}: the split part has not")
        if weight.grad is not (weight.main_grad if dtype == torch.float32 else None):
            wrong.append("grad")
    return wrong


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradients_are_added_to_main_grad(ranks, name, dtype):
    assert ranks(2).run(run_main_grad, name, dtype) == [[]] * 2


def run_autocast(name: str) -> list[torch.dtype]:
    with open_comm("emulated shm") as comm:
        x, weight, dy = arguments(name, problem(integers, (6,), torch.float32), comm, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            y = getattr(overlap, name)(x, weight, comm, mode="chunked", chunks=2)
        y.backward(dy.bfloat16())
        expected = call(name, x, weight, dy, comm, mode="none")
        assert all(torch.equal(a.float(), b) for a, b in zip((y, x.grad, weight.grad), expected, strict=True))
        return [y.dtype, x.grad.dtype, weight.grad.dtype]


@EACH
def test_autocast_casts_as_for_the_ops(ranks, name):
    assert ranks(2).run(run_autocast, name) == [[torch.bfloat16, torch.float32, torch.float32]] * 2


def run_twice_differentiated(name: str) -> list[str]:
    with open_comm("shm") as comm:
        x, weight, dy = arguments(name, problem(integers, (6,), torch.float32), comm, torch.float32)
        y = getattr(overlap, name)(x, weight, comm, mode="chunked", chunks=2)
        try:
            torch.autograd.grad(y, x, dy, create_graph=True)
        except NotImplementedError as error:
            return str(error)


@EACH
def test_second_derivatives_are_refused(ranks, name):
    for text in ranks(2).run(run_twice_differentiated, name):
        assert text.startswith(f"{name}: expected to be differentiated once")


class Silent(SelfCommunicator):
    def _run(self, call):
        raise AssertionError(f"one rank has called {call.kind}")


@EACH
def test_one_rank_is_ops_linear(name):
    x, weight = normal(6, K, seed=1).float().requires_grad_(), normal(N, K, seed=2).float().requires_grad_()
    expected = ops.linear(x, weight)
    for how in HOWS:
        y = getattr(overlap, name)(x, weight, Silent(), **how)
        assert torch.equal(y, expected)
        for pair in zip(
            *(torch.autograd.grad(each.sum(), [x, weight], retain_graph=True) for each in (y, expected)), strict=True
        ):
            assert torch.equal(*pair)


# ---- what happens when


class Recorded(EmulatedLink):
    """A link that writes down what is posted, run at once, and waited for."""

    def __init__(self, comm, **figures):
        super().__init__(comm, **figures)
        self.events: list[str] = []

    def _post(self, call, landed):
        self.events.append(f"post {call.tag}")
        work = super()._post(call, landed)
        finish = work.finish

        def finished(timeout):
            self.events.append(f"wait {call.tag}")
            finish(timeout)

        work.finish = finished
        return work


def run_recorded(name: str, mode: str) -> tuple[list[str], list[str]]:
    """The events of forward and of backward, products among them."""
    with communicator(dist.group.WORLD, name="recorded") as plain:
        comm = Recorded(plain, latency=0.0, bandwidth=1e9)
        x, weight, dy = arguments(name, problem(integers, (6,), torch.float32), comm, torch.float32)

        def noted(event: str, function: Callable) -> Callable:
            return lambda *args: (comm.events.append(event), function(*args))[1]

        product, wgrad = noted("gemm", chunks.sum_of_products), noted("wgrad", functions.weight_grad)
        with (
            patch.object(chunks, "sum_of_products", product),
            patch.object(functions, "sum_of_products", product),
            patch.object(functions, "weight_grad", wgrad),
        ):
            how = {"mode": mode} | ({"chunks": 2} if mode == "chunked" else {})
            y = getattr(overlap, name)(x, weight, comm, tag="t", **how)
            forward, comm.events = comm.events, []
            torch.autograd.grad(y, [x, weight], dy)
            return forward, comm.events


def events(text: str) -> list[str]:
    """ "post 0, gemm" -> ["post t[0/2]", "gemm"]."""
    words = (each.split() for each in text.split(", ") if text)
    return [" ".join([verb, *(f"t{'' if i == '-' else f'[{i}/2]'}" for i in rest)]) for verb, *rest in words]


BEHIND, AHEAD = "gemm, post 0, gemm, post 1, wait 0, wait 1", "post 0, post 1, wait 0, gemm, wait 1, gemm"


@pytest.mark.parametrize(
    ("name", "mode", "forward", "backward"),
    [
        ("linear_all_reduce", "chunked", BEHIND, "wgrad"),
        ("linear_all_reduce", "none", "gemm, post -, wait -", "wgrad"),
        ("copy_linear", "chunked", "gemm", "gemm, post 0, gemm, post 1, wgrad, wait 0, wait 1"),
        ("copy_linear", "none", "gemm", "gemm, post -, wait -, wgrad"),
        ("linear_reduce_scatter", "chunked", BEHIND, f"{AHEAD}, wgrad"),
        ("linear_reduce_scatter", "none", "gemm, post -, wait -", "post -, wait -, gemm, wgrad"),
        ("all_gather_linear", "chunked", AHEAD, "post x, gemm, post 0, gemm, post 1, wait x, wgrad, wait 0, wait 1"),
        ("all_gather_linear", "none", "post -, wait -, gemm", "post x, wait x, gemm, post -, wait -, wgrad"),
    ],
)
def test_what_is_on_the_link_while_what_is_multiplied(ranks, name, mode, forward, backward):
    expected = events(backward)
    expected = [each.replace("t[x/2]", "t.x").replace(" t", " t.grad") for each in expected]
    assert ranks(2).run(run_recorded, name, mode) == [(events(forward), expected)] * 2


# ---- faults


def run_disputed(name: str, ours: dict, theirs: dict) -> tuple:
    with open_comm("emulated shm", timeout=10) as comm:
        x, weight, _ = arguments(name, problem(integers, (6 * comm.size,), torch.float32), comm, torch.float32)
        how = theirs if comm.rank == 1 else ours
        return caught(lambda: getattr(overlap, name)(x, weight, comm, **how))


TWO = {"mode": "chunked", "chunks": 2}


@pytest.mark.parametrize("name", ["linear_all_reduce", "linear_reduce_scatter", "all_gather_linear"])
@pytest.mark.parametrize(
    "theirs",
    [TWO | {"tag": "other"}, {"mode": "none"}, {"mode": "chunked", "chunks": 3}],
    ids=["tag", "mode", "chunks"],
)
def test_a_rank_that_calls_something_else_is_an_error_on_all(ranks, name, theirs):
    outcomes = ranks(3).run(run_disputed, name, TWO, theirs)
    assert {kind for kind, *_ in outcomes} == {"CollectiveMismatch"}, outcomes
    assert all("[0/2]'" in text for *_, text in outcomes), "the chunk is named"


def run_swapped() -> tuple:
    """Two calls of equal shapes, of which one rank makes the other first."""
    with open_comm("shm", timeout=10) as comm:
        x, weight = torch.ones(6, 6), torch.ones(6, 6)
        calls = [overlap.linear_reduce_scatter, overlap.all_gather_linear][:: -1 if comm.rank else 1]
        return caught(lambda: [each(x, weight, comm, mode="chunked", chunks=2) for each in calls])


def test_swapped_calls_are_named_without_a_tag(ranks):
    for kind, _, text in ranks(2).run(run_swapped):
        assert kind == "CollectiveMismatch"
        assert "'linear_reduce_scatter[0/2]'" in text and "'all_gather_linear[0/2]'" in text


def run_aborted(name: str) -> list[tuple]:
    with open_comm("emulated shm", timeout=10) as comm:
        x, weight, dy = arguments(name, problem(integers, (6,), torch.float32), comm, torch.float32)
        if comm.rank == 1:
            comm.abort("no more disk")
            return [("PeerFailed", 1, "no more disk")]
        forward = caught(lambda: getattr(overlap, name)(x, weight, comm, **TWO).backward(dy))
        return [forward, caught(lambda: comm.barrier())]


@EACH
def test_an_aborted_group_ends_them(ranks, name):
    for outcomes in ranks(2).run(run_aborted, name):
        for kind, culprit, text in outcomes:
            assert (kind, culprit) == ("PeerFailed", 1) and "no more disk" in text


def alone(size: int) -> SelfCommunicator:
    comm = SelfCommunicator()
    comm.size = size
    return comm


def test_refusals():
    comm, x, weight = alone(4), torch.zeros(10, 3), torch.zeros(5, 3)
    texts = refusals(
        [
            lambda: overlap.linear_all_reduce(x, weight, comm, mode="signal"),
            lambda: overlap.copy_linear(x, weight, comm, mode="fast"),
            lambda: overlap.linear_all_reduce(x, weight, comm, chunks=2),
            lambda: overlap.linear_all_reduce(x, weight, comm, mode="chunked", chunks=0),
            lambda: overlap.linear_reduce_scatter(x, weight, comm),
            lambda: overlap.all_gather_linear(x.view(2, 5, 3), weight, comm),
            lambda: overlap.linear_all_reduce(x, weight.t(), comm),
            lambda: overlap.linear_all_reduce(x, weight.double(), comm),
            lambda: overlap.linear_all_reduce(x, weight.as_subclass(type("Other", (Tensor,), {})), comm),
            lambda: overlap.explain("linear", x.shape, weight.shape, x.dtype, comm),
            lambda: overlap.linear_all_reduce(x, weight, comm, rates=Rates({torch.float64: 1e9}, 0.0)),
        ]
    )
    expected = [
        "linear_all_reduce: signal needs CUDA tensors and the nccl transport; use chunked or auto",
        "copy_linear: mode is 'fast'; pass one of none, chunked, auto",
        "linear_all_reduce: chunks is 2 in mode 'auto'; pass at least 1, and mode=\"chunked\"",
        "linear_all_reduce: chunks is 0 in mode 'chunked'; pass at least 1, and mode=\"chunked\"",
        "linear_reduce_scatter: x has 10 rows, not divisible by 4 ranks; pad it to 12",
        "all_gather_linear: x must be a matrix, got [2, 5, 3]; flatten the tokens: x.flatten(0, -2)",
        "linear_all_reduce: weight has shape [3, 5] but x has shape [10, 3]; pass a weight of shape [N, 3]",
        "linear_all_reduce: weight has dtype torch.float64 but x has torch.float32; cast one of them",
        "linear_all_reduce: expected plain tensors, got Other; pass its local tensor",
        "explain: expected one of linear_all_reduce, copy_linear, linear_reduce_scatter, all_gather_linear, got "
        "'linear'; only these overlap",
        "overlap: the rates know torch.float64, but no torch.float32; calibrate for it, or pass no rates",
    ]
    assert texts == expected


# ---- the cost rule


def costs(gemm=1e-2, r=1.0, latency=0.0, overhead=0.0, behind=0.0) -> Costs:
    """A GEMM of 10 ms, a megabyte, and a link that takes r times as long, beside its latency."""
    return Costs(gemm, 1e6, Link(latency, 1e6 / (gemm * r) if gemm * r else math.inf), overhead, behind)


def simulated(given: Costs, chunks: int) -> float:
    """The pipeline of the rule, event by event."""
    computed = carried = 0.0
    for _ in range(chunks):
        computed += given.gemm / chunks + given.overhead
        carried = max(carried, computed) + given.link.latency + given.nbytes / chunks / given.link.bandwidth
    return max(carried, computed + given.behind)


@pytest.mark.parametrize("chunks", [1, 2, 8, 64])
@pytest.mark.parametrize("r", [0.25, 1.0, 3.0])
@pytest.mark.parametrize("rest", [{}, {"latency": 1e-3}, {"overhead": 5e-4}, {"behind": 1e-2, "latency": 1e-4}])
def test_formula_is_the_pipeline_event_by_event(chunks, r, rest):
    given = costs(r=r, **rest)
    assert given.chunked(chunks) == pytest.approx(simulated(given, chunks), rel=1e-12)
    assert given.none == pytest.approx(given.gemm + given.communication + given.behind)


@pytest.mark.parametrize("r", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("rest", [{}, {"latency": 2e-4}, {"overhead": 3e-4}, {"behind": 1e-2}])
def test_no_other_power_of_two_is_faster(r, rest):
    given = costs(r=r, **rest)
    least = min(given.chunked(1 << i) for i in range(7))
    assert given.chunked(fastest(given, 1 << 20)) == least


def test_rule_at_its_ends():
    many = MOST_CHUNKS * LEAST_ROWS
    free = choose(costs(gemm=1e-2, r=0.0), many)
    assert (free.mode, free.gain, free.why) == ("none", 0.0, "the link costs nothing")
    assert choose(Costs(1e-2, 0.0, Link(1.0, 1e9), 0.0), many).why == "the link costs nothing"
    stolen = choose(costs(), many, overlaps=False, transport="shm")
    assert stolen.mode == "none" and stolen.why.startswith("shm moves bytes on the cores that compute")
    assert choose(costs(), many).chunks == MOST_CHUNKS, "what costs nothing is done often"
    assert choose(costs(), 4 * LEAST_ROWS + 1).chunks == 4
    assert choose(costs(), LEAST_ROWS).mode == "none", "one chunk hides nothing"
    assert choose(costs(behind=1e-2), LEAST_ROWS).chunks == 1, "but under the weight gradient"
    assert choose(costs(latency=1.0), many).mode == "none", "a latency for each chunk"
    assert choose(costs(gemm=0.0), many).mode == "none", "nothing to hide behind"
    assert choose(costs(r=LEAST_GAIN / 2), many).mode == "none", "too little to hide"
    assert choose(costs(r=2 * LEAST_GAIN), many).mode == "chunked"
    few = choose(costs(overhead=1e-3), many)
    assert few.chunks < 8 and "fastest" in few.why


def test_asked_for_chunks_are_taken_even_where_they_do_not_pay():
    comm = EmulatedLink(alone(2), latency=0.0, bandwidth=math.inf)
    plan = overlap.plan_of("linear_all_reduce", (7, 4), [(4, 4)], torch.float32, comm, mode="chunked")
    assert (plan.mode, plan.chunks) == ("chunked", 2) and plan.gain < 0
    asked = {"mode": "chunked", "chunks": 100}
    assert overlap.plan_of("linear_all_reduce", (7, 4), [(4, 4)], torch.float32, comm, **asked).chunks == 7


@pytest.mark.parametrize("rows", [0, 1, 5, 64])
@pytest.mark.parametrize("chunks", [1, 2, 3, 64])
def test_bounds_are_all_rows_evenly(rows, chunks):
    cut = bounds(rows, chunks)
    assert [row for each in cut for row in range(each.start, each.stop)] == list(range(rows))
    sizes = {each.stop - each.start for each in cut}
    assert max(sizes) - min(sizes) <= 1 and len(cut) == max(1, min(rows, chunks))


@pytest.mark.parametrize(
    ("name", "nbytes", "gemms"),
    [
        ("linear_all_reduce", 2 * 3 / 4 * 8 * 6, 1),
        ("copy_linear", 2 * 3 / 4 * 8 * 5, 1),
        ("linear_reduce_scatter", 3 * 2 * 6, 1),
        ("all_gather_linear", 3 * 8 * 5, 4),
    ],
)
def test_bytes_and_products_of_four_ranks(name, nbytes, gemms):
    comm = EmulatedLink(alone(4), latency=0.5, bandwidth=7.0)
    plan = overlap.plan_of(name, (8, 5), [(2, 5), (4, 5)], torch.float32, comm, rates=Rates({torch.float32: 2.0}, 0.0))
    assert plan.costs.nbytes == 4 * nbytes
    assert plan.costs.gemm == gemms * 8 * 5 * 6
    assert plan.costs.link == Link(0.5, 7.0)
    assert plan.costs.behind == (plan.costs.gemm if name == "copy_linear" else 0)


def test_explanation_says_what_and_why():
    comm = EmulatedLink(alone(2), latency=0.0, bandwidth=1e9)
    rates = Rates({torch.float32: 5e11}, 1e-5, source="made up")
    shapes = (1024, 1024), (1024, 1024), torch.float32
    explained = overlap.explain("linear_all_reduce", *shapes, comm, rates=rates)
    assert str(explained).splitlines() == [
        "linear_all_reduce in float32: x [1024, 1024], weight [1024, 1024], 2 ranks, self over an emulated link",
        "  mode           chunked, 16 chunks of up to 64 rows: the fastest, of at most 32 chunks",
        "  GEMM           4.29 ms (made up)",
        "  communication  4.19 ms, 4.19 MB, r = 0.98",
        "  expected       4.72 ms against 8.49 ms of none, gain 44 %",
    ]
    assert explained.r == pytest.approx(4.19 / 4.29, rel=1e-2)
    none = overlap.explain("copy_linear", *shapes, alone(2))
    assert "none: self moves bytes on the cores that compute" in str(none)


def run_calibrated() -> tuple:
    with open_comm("emulated shm", latency=1e-3, bandwidth=1e9) as comm:
        rates = overlap.calibrate(comm, torch.float32)
        plan = overlap.plan_of("linear_all_reduce", (4096, 512), [(512, 512)], torch.float32, comm, rates=rates)
        return rates, plan


def test_calibration_is_the_same_on_every_rank(ranks):
    (rates, plan), *others = ranks(3).run(run_calibrated)
    assert others == [(rates, plan)] * 2
    assert rates.link.latency >= 1e-3, "the link is never early"
    assert rates.flops[torch.float32] > 0 and rates.overhead >= 0 and torch.bfloat16 in rates.flops
