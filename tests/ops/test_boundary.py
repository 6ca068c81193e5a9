"""At home in torch: opcheck with gradients, torch.compile(fullgraph=True), autocast, and inputs left alone."""

import pytest
import torch
from problems import ADD_RMS_NORM, GATED, INNER, LINEARS, PROBLEMS, RMS_NORM, flat

from tpmp_kernels import ops, reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
each_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
# One of each kind, where a case takes long.
a_few = pytest.mark.parametrize(
    "problem", [LINEARS[0], LINEARS[1], GATED[0], RMS_NORM, ADD_RMS_NORM], ids=lambda p: p.name
)


def raw(problem):
    return getattr(torch.ops.tpmp_kernels, problem.op).default


@each_problem
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(problem, requires_grad):
    inputs = problem.inputs(torch.float32, requires_grad=requires_grad)
    torch.library.opcheck(raw(problem), problem.raw(*inputs))


@a_few
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_opcheck_dtypes_and_layouts(problem, dtype, layout):
    inputs = problem.inputs(dtype, layout=layout, requires_grad=True)
    torch.library.opcheck(raw(problem), problem.raw(*inputs))


@pytest.mark.parametrize("inner", INNER, ids=lambda i: i.name)
def test_opcheck_inner_ops(inner):
    torch.library.opcheck(raw(inner), inner.arguments())


@a_few
def test_fullgraph_follows_eager_at_many_lengths_with_one_recompile(problem):
    """No break, the same numbers and gradients, and a second length recompiles once, to a dynamic one."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(problem.call, fullgraph=True, backend=counter)
    long = problem.inputs(torch.float32, requires_grad=True)
    for length in (5, 4, 3, 2):
        tensors = [t[:, :length] if t.dim() == 3 else t for t in long]
        got, expected = flat(compiled(ops, *tensors)), flat(problem.call(ops, *tensors))
        upstream = [torch.ones_like(t) for t in expected]
        grads, truth = (torch.autograd.grad(r, long, upstream) for r in (got, expected))
        torch.testing.assert_close([*got, *grads], [*expected, *truth], rtol=0, atol=0)
    assert counter.frame_count <= 2


def test_fullgraph_through_inductor():
    """A block of all three ops, forward and backward, in one graph on the default compiler."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    x, w, norm = torch.randn(6, 8), torch.randn(8, 8, requires_grad=True), torch.ones(8, requires_grad=True)

    def block(x, w, norm):
        h, stream = ops.rms_norm(x, norm, residual=x)
        return ops.linear(ops.gated_linear(h, w, w), w, activation="gelu", residual=stream)

    got, expected = torch.compile(block, fullgraph=True)(x, w, norm), block(x, w, norm)
    torch.testing.assert_close(got, expected)
    grads, truth = (torch.autograd.grad(y.square().sum(), [w, norm]) for y in (got, expected))
    torch.testing.assert_close(grads, truth)


def test_fullgraph_sees_a_change_of_backend():
    """A compiled function that saw one backend runs another when asked, instead of the graph it has."""
    torch._dynamo.reset()
    x, w = LINEARS[6].inputs(torch.float32)
    graphs = []

    def record(graph, _):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph

    compiled = torch.compile(lambda: ops.linear(x, w), fullgraph=True, backend=record)
    compiled()
    with ops.use_backend("reference"):
        compiled()
    assert ["tpmp_kernels.linear" in str(targets) for targets in graphs] == [True, False]


@pytest.mark.parametrize("problem", [*LINEARS[:2], GATED[0]], ids=lambda p: p.name)
def test_autocast_casts_like_a_linear(problem):
    """fp32 inputs run in bf16 and their gradients come back in fp32, as with F.linear; fp64 is left alone."""
    inputs = problem.inputs(torch.float32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = problem.call(ops, *inputs)
        exact = problem.call(ops, *problem.inputs(torch.float64))
    low = problem.call(ops, *(t.bfloat16() for t in inputs))
    assert y.dtype == torch.bfloat16 and torch.equal(y, low) and exact.dtype == torch.float64
    grads = torch.autograd.grad(y.sum(), inputs)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)


def test_autocast_keeps_a_norm_in_its_widest_dtype():
    """bf16 from a linear plus an fp32 residual stream stays an fp32 stream."""
    x, w, r = ADD_RMS_NORM.inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        normed, stream = ops.rms_norm(x.bfloat16(), w, residual=r)
    assert normed.dtype == stream.dtype == torch.float32
    torch.testing.assert_close(stream, x.bfloat16() + r, rtol=0, atol=0)


@each_problem
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_inputs_are_only_read_and_outputs_are_new(problem, dtype, requires_grad):
    """No input or saved tensor changes, no output shares memory with an input, and outputs are contiguous."""
    inputs = problem.inputs(dtype, layout="transposed", requires_grad=requires_grad)
    before = [t.detach().clone() for t in inputs]
    outputs = flat(problem.call(ops, *inputs))
    if requires_grad:
        torch.autograd.grad(outputs, inputs, [torch.ones_like(t) for t in outputs])
    assert all(torch.equal(t, b) for t, b in zip(inputs, before, strict=True))
    storages = {t.untyped_storage().data_ptr() for t in inputs}
    assert all(t.is_contiguous() and t.untyped_storage().data_ptr() not in storages for t in outputs)


def test_only_the_gradients_asked_for_are_computed(monkeypatch):
    products = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: products.append(a.shape) or mm(a, b))
    x, w, b, r = LINEARS[1].inputs(torch.float64)
    for wanted, expected in ((x, 1), (w, 1), (b, 0), (r, 0)):
        products.clear()
        wanted.requires_grad_()
        y = ops.linear(x, w, b, activation="gelu", residual=r)
        products.clear()
        y.sum().backward()
        wanted.requires_grad_(False)
        assert len(products) == expected


def test_reference_backend_is_the_reference():
    x, w, b, r = LINEARS[1].inputs(torch.float32, requires_grad=True)
    with ops.use_backend("reference"):
        y = ops.linear(x, w, b, activation="gelu", residual=r)
    assert torch.equal(y, reference.linear(x, w, b, activation="gelu", residual=r))
    assert "Add" in type(y.grad_fn).__name__
