"""What a linear keeps for backward, the dtype of its result, and how often it crosses into Python: forms of one op."""

import pytest
import torch
from bounds import assert_no_worse_than_torch, assert_within, linear_bound
from linear_problems import AGAIN, GATED, LINEARS, MLPS, SPLIT
from torch.utils._python_dispatch import TorchDispatchMode

from tpmp_kernels import ops, reference

ACTIVATIONS = (None, *reference.ACTIVATIONS)
HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("saved", "again"), AGAIN, ids=lambda p: p.name)
def test_gradients_are_the_same_bits_whether_preactivations_are_saved_or_made_again(saved, again, dtype):
    inputs = saved.inputs(dtype, layout="strided", requires_grad=True)
    first, second = saved.call(ops, *inputs), again.call(ops, *inputs)
    upstream = torch.randn_like(first)
    grads, others = (torch.autograd.grad(y, inputs, upstream) for y in (first, second))
    assert all(torch.equal(a, b) for a, b in zip(grads, others, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("saved", [saved for saved, _ in AGAIN], ids=lambda p: p.name)
def test_gradients_in_fp64_are_the_references_to_the_bit(saved, dtype):
    """But for dx of a gated one: a sum of two products, of which the second adds to the first as it goes."""
    inputs = saved.inputs(dtype, requires_grad=True)
    got, expected = saved.call(ops, *inputs), saved.call(reference, *inputs)
    upstream = torch.randn_like(expected)
    grads, truth = (torch.autograd.grad(y, inputs, upstream) for y in (got, expected))
    if dtype is torch.float64:
        if saved.op.startswith("gated"):
            torch.testing.assert_close(grads[0], truth[0], rtol=1e-14, atol=1e-13)
            grads, truth = grads[1:], truth[1:]
        assert all(torch.equal(a, b) for a, b in zip([got, *grads], [expected, *truth], strict=True))
    else:
        torch.testing.assert_close([got, *grads], [expected, *truth])


@pytest.mark.parametrize("problem", [p for pair in AGAIN for p in pair], ids=lambda p: p.name)
def test_gradients_in_bf16_are_no_worse_than_twice_torchs(problem):
    inputs = problem.inputs(torch.bfloat16, requires_grad=True)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    got, eager, oracle = problem.call(ops, *inputs), problem.call(reference, *inputs), problem.call(reference, *wide)
    upstream = torch.randn_like(got)
    ours, theirs = (torch.autograd.grad(y, inputs, upstream) for y in (got, eager))
    truth = torch.autograd.grad(oracle, wide, upstream.double())
    for each in zip([got.detach(), *ours], [eager.detach(), *theirs], [oracle.detach(), *truth], strict=True):
        assert_no_worse_than_torch(*each, least=1)


def draw(dtype, *shapes):
    return [torch.randn(s, dtype=torch.float64).to(dtype) for s in shapes]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_out_dtype_is_the_accumulator(dtype, activation):
    """fp32 results of half-precision inputs within the bound of an fp32 linear: nothing was rounded to half."""
    torch.manual_seed(0)
    x, w, b = draw(dtype, (31, 97), (64, 97), (64,))
    for residual in (*draw(dtype, (31, 64)), *draw(torch.float32, (31, 64)), None):
        wide = [None if t is None else t.float() for t in (x, w, b, residual)]
        oracle, bound = linear_bound(*wide[:3], activation=activation, residual=wide[3], unfused=True)
        for saved in (False, True):
            weight = w.detach().requires_grad_(saved)
            y = ops.linear(x, weight, b, activation=activation, residual=residual, out_dtype=torch.float32)
            assert y.dtype == torch.float32
            assert_within(y.detach(), oracle, bound)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("activation", [None, "gelu", "relu2"])
@pytest.mark.parametrize("save_preact", [True, False])
def test_out_dtype_gradients_follow_the_reference(dtype, activation, save_preact):
    torch.manual_seed(0)
    inputs = [t.requires_grad_() for t in draw(dtype, (3, 5, 33), (48, 33), (48,), (3, 5, 48))]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    options = {"activation": activation, "out_dtype": torch.float32, "save_preact": save_preact}

    def call(room, x, w, b, r, **options):
        return room.linear(x, w, b, residual=r, **options)

    got, eager = call(ops, *inputs, **options), call(reference, *inputs, **options)
    oracle = call(reference, *wide, activation=activation)
    upstream = torch.randn_like(eager)
    ours, theirs = (torch.autograd.grad(y, inputs, upstream) for y in (got, eager))
    truth = torch.autograd.grad(oracle, wide, upstream.double())
    for mine, torchs, exact in zip(ours, theirs, truth, strict=True):
        assert mine.dtype == dtype
        assert_no_worse_than_torch(mine, torchs, exact, least=1)


def test_out_dtype_under_autocast_keeps_an_fp32_residual():
    torch.manual_seed(0)
    x, w, r = draw(torch.float32, (5, 33), (48, 33), (5, 48))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.linear(x, w, residual=r, out_dtype=torch.float32)
    torch.testing.assert_close(y, ops.linear(x.bfloat16(), w.bfloat16(), out_dtype=torch.float32) + r, rtol=0, atol=0)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("save_preact", [True, False])
def test_opcheck_out_dtype(requires_grad, save_preact):
    x, w, b = (t.requires_grad_(requires_grad) for t in draw(torch.bfloat16, (2, 5, 7), (11, 7), (11,)))
    (r,) = draw(torch.float32, (2, 5, 11))
    op = torch.ops.tpmp_kernels.linear.default
    torch.library.opcheck(op, (x, w, b, r, None, None, "gelu", torch.float32, save_preact))


X, W = torch.zeros(2, 64), torch.zeros(3, 64)
REFUSED = [
    (lambda: ops.linear(X, W, out_dtype=torch.bfloat16), "out_dtype must be torch.float32 as the product's inputs"),
    (lambda: ops.linear(X.bfloat16(), W.bfloat16(), out_dtype=torch.float64), "got torch.float64; cast the result"),
    (
        lambda: ops.linear(X.bfloat16(), W.bfloat16(), residual=torch.zeros(2, 3).half(), out_dtype=torch.float32),
        "residual has dtype torch.float16 but x has torch.bfloat16 and the result torch.float32; cast it",
    ),
]


@pytest.mark.parametrize(("call", "text"), REFUSED, ids=[text for _, text in REFUSED])
def test_out_dtype_refused_in_one_sentence(call, text):
    with pytest.raises(TypeError) as error:
        call()
    assert text in str(error.value) and "\n" not in str(error.value)


class Seen(TorchDispatchMode):
    """The ops that arrive below autograd."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("problem", [*LINEARS, *GATED, *MLPS, *SPLIT], ids=lambda p: p.name)
def test_a_forward_is_one_op_below_autograd(problem, requires_grad):
    inputs = problem.inputs(torch.float32, requires_grad=requires_grad)
    with Seen() as seen:
        problem.call(ops, *inputs)
    assert len(seen.names) == 1 and seen.names[0].startswith("tpmp_kernels::"), seen.names
