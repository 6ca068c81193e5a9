"""torch.compile(fullgraph=True) and torch.export over ops: the same bits as eager, in one graph, at any length."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from block import Block
from problems import LINEARS, PROBLEMS, RMS_NORM, flat
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from tpmp_kernels import ops

# The first problem of one op of each family.
FIRST = [next(p for p in PROBLEMS if p.op == op) for op in ("linear", "rope", "cross_entropy")]


def each_problem(plain):
    """All problems, those that are not `plain` in full runs alone: a case takes half a second."""
    marked = [pytest.param(p, id=p.name, marks=[pytest.mark.full] * (p not in plain)) for p in PROBLEMS]
    return pytest.mark.parametrize("problem", marked)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def compile_counting(call, **options):
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(call, fullgraph=True, backend=counter, **options), counter


def with_gradients(results: list, inputs: list) -> list:
    wanted, results = [t for t in inputs if t.requires_grad], flat(results)
    upstream = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape) for t in results]
    return [*results, *torch.autograd.grad(results, wanted, upstream)]


def assert_same_bits(got, expected):
    assert len(got) == len(expected) and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def shortened(problem, length: int) -> list[torch.Tensor]:
    """The problem's inputs, [3, 5, ...], with `length` in place of 5."""
    inputs = problem.inputs(torch.float32, requires_grad=True)
    return [
        t[:, :length].detach().clone().requires_grad_(t.requires_grad) if t.shape[:2] == (3, 5) else t for t in inputs
    ]


@each_problem(FIRST)
def test_fullgraph_at_many_lengths_recompiles_once(problem):
    """A second length makes the graph dynamic, and that one serves all others."""
    compiled, counter = compile_counting(problem.call)
    for length in (5, 4, 3):
        inputs = shortened(problem, length)
        got, expected = compiled(ops, *inputs), problem.call(ops, *inputs)
        assert_same_bits(with_gradients(got, inputs), with_gradients(expected, inputs))
    assert counter.frame_count <= 2


@each_problem([LINEARS[1], RMS_NORM])
def test_fullgraph_dynamic_from_the_start_never_recompiles(problem):
    compiled, counter = compile_counting(problem.call, dynamic=True)
    graphs = set()
    for length in (4, 3):
        inputs = shortened(problem, length)
        # Otherwise sizes that are equal by chance, as 4 tokens and 4 heads, are taken for one.
        with torch.fx.experimental._config.patch(use_duck_shape=False):
            got = compiled(ops, *inputs)
        assert_same_bits(with_gradients(got, inputs), with_gradients(problem.call(ops, *inputs), inputs))
        graphs.add(counter.frame_count)
    assert len(graphs) == 1


def block_and_inputs() -> tuple[Block, list[torch.Tensor]]:
    torch.manual_seed(0)
    block = Block()
    return block, [torch.randn(2, 5, 8, requires_grad=True), *block.parameters()]


def autocast(call, dtype: torch.dtype):
    def cast(x):
        with torch.autocast("cpu", dtype=dtype):
            return call(x)

    return cast


@pytest.mark.parametrize(
    "around",
    [
        partial(autocast, dtype=torch.bfloat16),
        pytest.param(partial(autocast, dtype=torch.float16), marks=pytest.mark.full),
        pytest.param(lambda block: partial(checkpoint, block, use_reentrant=False), marks=pytest.mark.full),
        lambda block: autocast(partial(checkpoint, block, use_reentrant=False), torch.bfloat16),
    ],
    ids=["bf16", "fp16", "checkpoint", "checkpoint-bf16"],
)
def test_fullgraph_of_a_block(around):
    block, inputs = block_and_inputs()
    call = around(block)
    compiled, counter = compile_counting(call)
    assert_same_bits(with_gradients(compiled(inputs[0]), inputs), with_gradients(call(inputs[0]), inputs))
    assert counter.frame_count == 1


def test_fullgraph_through_inductor():
    """Forward and backward of a block on the default compiler."""
    block, inputs = block_and_inputs()
    compiled = torch.compile(block, fullgraph=True)
    torch.testing.assert_close(with_gradients(compiled(inputs[0]), inputs), with_gradients(block(inputs[0]), inputs))


def test_fullgraph_of_func_grad():
    x, w = torch.randn(3, 7), torch.randn(5, 7)
    gradient = torch.func.grad(lambda w: ops.linear(x, w, activation="gelu").square().sum())
    assert torch.equal(compile_counting(gradient)[0](w), gradient(w))


def test_fullgraph_sees_a_change_of_backend():
    """A compiled function that saw one backend runs another when asked, instead of the graph it has."""
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


def test_export_of_a_block_is_dynamic_and_survives_a_file():
    block, (x, *_) = block_and_inputs()
    exported = torch.export.export(block, (x.detach(),), dynamic_shapes=({1: torch.export.Dim("length", min=2)},))
    targets = {str(node.target) for node in exported.graph.nodes}
    assert {f"tpmp_kernels.{op}.default" for op in ("linear", "gated_linear", "rms_norm")} <= targets
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for length in (5, 3):
        assert torch.equal(loaded(x[:, :length].detach()), block(x[:, :length]))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_modules_of_ops_can_be_copied_and_pickled(duplicate):
    block, inputs = block_and_inputs()
    other, call = duplicate(block), duplicate(ops.linear)
    assert call is ops.linear
    assert_same_bits(
        with_gradients(other(inputs[0]), [inputs[0], *other.parameters()]), with_gradients(block(inputs[0]), inputs)
    )
