"""main_grad: a plain training loop is right with it, eager and compiled, whatever happens to `.grad` in between.

Every scenario runs on one block in which a weight is used by each op, by two of them, and by plain torch.
"""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from bounds import assert_no_worse_than_torch
from torch.utils.checkpoint import checkpoint

from tpmp_kernels import ops, reference

K, HIDDEN = 6, 10
SHAPES = {
    "tied": (K, K),
    "gate": (HIDDEN, K),
    "up": (HIDDEN, K),
    "down": (K, HIDDEN),
    "mixed": (K, K),
    "plain": (K, K),
    "bias": (K,),
    "b_up": (HIDDEN,),
}
OURS = ("tied", "gate", "up", "down")


class Block(torch.nn.Module):
    def __init__(self, room, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.room = room
        for name, shape in SHAPES.items():
            self.register_parameter(
                name, torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) / 2)
            )

    def forward(self, x):
        room = self.room
        x = room.linear(x, self.tied, self.bias, activation="gelu", residual=x)
        x = x + room.linear(room.gated_linear(x, self.gate, self.up), self.down, save_preact=False)
        x = x + room.mlp(x, self.up, self.down, self.b_up, self.bias, activation="silu")
        x = x + room.gated_mlp(x, self.gate, self.up, self.down, activation="gelu", save_preact=False)
        x = F.linear(room.linear(x, self.mixed), self.mixed) + F.linear(x, self.plain)
        return room.linear(x, self.tied)


def batch(seed: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, K, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


@pytest.fixture(scope="module", params=["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def form(request):
    """How a function runs; a compiled block serves all tests, since the ops' parameters are its inputs."""
    if request.param == "eager":
        return lambda function: function
    torch._dynamo.reset()
    return lambda function: torch.compile(function, fullgraph=True, backend=request.param)


@pytest.fixture(scope="module")
def pair(form):
    """(block under test as it runs, its parameters; the unfused block, whose gradients are autograd's alone)."""
    ours, plain = Block(ops), Block(reference)
    ops.attach_main_grad(ours.parameters())
    return form(ours), ours, plain


def assert_same(ours, plain):
    for name in SHAPES:
        parameter = getattr(ours, name)
        assert parameter.grad is parameter.main_grad, name
        torch.testing.assert_close(parameter.grad, getattr(plain, name).grad, rtol=1e-12, atol=1e-12, msg=name)


def test_fullgraph_plain_loop_with_zero_grad(pair):
    """Three steps of two microbatches: F0 F1 B0 B1, then zero_grad between forward and backward."""
    run, ours, plain = pair
    for step, order in enumerate(["zero first", "zero after forward", "zero in place"]):
        for block, call in ((ours, run), (plain, plain)):
            if order != "zero after forward":
                block.zero_grad(set_to_none=order == "zero first")
            losses = [call(batch(2 * step + i)).square().mean() for i in range(2)]
            if order == "zero after forward":
                block.zero_grad()
            for loss in losses:
                loss.backward()
        assert_same(ours, plain)


def test_fullgraph_optimizer_step_for_step(pair):
    run, ours, plain = pair
    plain.load_state_dict(ours.state_dict())
    optimizers = [torch.optim.AdamW(block.parameters(), lr=1e-3) for block in (ours, plain)]
    for step in range(3):
        for optimizer, call in zip(optimizers, (run, plain), strict=True):
            optimizer.zero_grad()
            call(batch(step)).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.5)
            optimizer.step()
        assert_same(ours, plain)
        torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=1e-9, atol=1e-9)


def test_fullgraph_grad_that_someone_replaced_is_added_to(pair):
    run, ours, plain = pair
    for block, call in ((ours, run), (plain, plain)):
        block.zero_grad()
        call(batch(0)).sum().backward()
        for name in SHAPES:
            getattr(block, name).grad = getattr(block, name).grad * 0.5
        call(batch(1)).sum().backward()
    assert_same(ours, plain)


def test_fullgraph_what_autograd_would_not_accumulate_is_not_added(pair):
    """autograd.grad for the input, and backward for other inputs, touch no parameter's gradient."""
    run, ours, _ = pair
    ours.zero_grad()
    run(batch(0)).sum().backward()
    before = {name: getattr(ours, name).grad.clone() for name in SHAPES}
    x = batch(1)
    (dx,) = torch.autograd.grad(run(x).sum(), x)
    assert dx.abs().sum() > 0
    run(x).sum().backward(inputs=[x, ours.plain])
    for name in set(SHAPES) - {"plain"}:
        assert torch.equal(getattr(ours, name).grad, before[name]), name
    assert not torch.equal(ours.plain.grad, before["plain"])


def test_fullgraph_autograd_grad_for_a_weight_is_refused(pair):
    run, ours, _ = pair
    with pytest.raises(
        RuntimeError, match=r"expected backward\(\) for a parameter with a main_grad, got autograd.grad"
    ):
        torch.autograd.grad(run(batch(0)).sum(), [ours.gate])


def test_fullgraph_does_not_compile_again_for_another_state_of_grad(form):
    if form(len) is len:
        pytest.skip("eager")
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    weights = [torch.nn.Parameter(torch.randn(K, K)) for _ in range(4)]
    ops.attach_main_grad(weights)
    run = torch.compile(lambda x, w: ops.linear(x, w, activation="gelu"), fullgraph=True, backend=counter)
    for weight in weights:
        for _ in range(2):
            run(batch(0, dtype=torch.float32), weight).sum().backward()
            weight.grad = None
    assert counter.frame_count == 1


def products(dtype):
    """Integers, so that every sum is exact: (x, weight, upstream, the exact weight gradient)."""
    torch.manual_seed(0)
    x, weight = torch.randint(-2, 3, (9, K)).to(dtype), torch.randint(-2, 3, (HIDDEN, K)).to(dtype)
    upstream = torch.randint(-2, 3, (9, HIDDEN)).to(dtype)
    return x, torch.nn.Parameter(weight), upstream, upstream.double().t() @ x.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fullgraph_integers_are_exact(form, dtype):
    x, weight, upstream, exact = products(dtype)
    ops.attach_main_grad([weight])
    run = form(lambda x, weight: ops.linear(x, weight))
    for microbatches in range(1, 4):
        run(x, weight).backward(upstream)
        assert torch.equal(weight.main_grad.double(), microbatches * exact)
    wide = torch.promote_types(dtype, torch.float32)
    assert weight.main_grad.dtype == wide and (weight.grad is weight.main_grad) == (dtype == wide)


def test_fullgraph_wgrad_apart_starts_anew_too(form):
    """W on its own, in a graph of its own or in none: after zero_grad it starts from zero and puts `.grad` back."""
    x, weight, upstream, exact = products(torch.float32)
    ops.attach_main_grad([weight])
    run = form(lambda dz, x, weight: ops.wgrad(dz, x, main_grad=weight.main_grad))
    for _ in range(2):
        weight.grad = None
        for microbatches in (1, 2):
            assert run(upstream, x, weight) is None
            assert torch.equal(weight.grad.double(), microbatches * exact) and weight.grad is weight.main_grad
    weight.grad = torch.ones_like(weight)
    run(upstream, x, weight)
    assert torch.equal(weight.grad.double(), exact + 1) and weight.grad is weight.main_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_adds_up_in_fp32_and_leaves_grad_alone(dtype):
    """Autograd's own contributions arrive too; four microbatches are no worse than torch's, which add up in half."""
    ours, plain, exact = Block(ops, dtype), Block(reference, dtype), Block(reference)
    exact.load_state_dict(ours.state_dict())
    ops.attach_main_grad(ours.parameters())
    for seed in range(4):
        for block in (ours, plain, exact):
            x = batch(seed, dtype=dtype)
            block(x if block is not exact else x.detach().double()).mean().backward()
    for name in SHAPES:
        parameter = getattr(ours, name)
        assert parameter.grad is None
        assert_no_worse_than_torch(
            parameter.main_grad, getattr(plain, name).grad, getattr(exact, name).grad, unit=2.0**-8, least=1
        )


def test_autocast_adds_half_precision_products_to_the_fp32_gradient():
    x, weight, upstream, exact = products(torch.float32)
    ops.attach_main_grad([weight])
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = ops.linear(x, weight)
        y.backward(upstream.bfloat16())
    assert y.dtype == torch.bfloat16 and torch.equal(weight.grad.double(), 2 * exact)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    x, weight, upstream, exact = products(torch.float32)
    ops.attach_main_grad([weight])
    for _ in range(2):
        y = checkpoint(lambda x: ops.linear(x, weight), x.clone().requires_grad_(), use_reentrant=reentrant)
        y.backward(upstream)
    assert torch.equal(weight.grad.double(), 2 * exact)


def test_saved_tensors_may_move_meanwhile():
    x, weight, upstream, exact = products(torch.float32)
    ops.attach_main_grad([weight])
    with torch.autograd.graph.save_on_cpu():
        y = ops.linear(x, weight)
    y.backward(upstream)
    assert torch.equal(weight.grad.double(), exact)


def test_create_graph_leaves_the_gradient_to_autograd():
    """A sum in main_grad would have no graph: its second derivative would silently be zero."""
    x, weight, upstream, exact = products(torch.float64)
    ops.attach_main_grad([weight])
    ops.linear(x, weight).backward(upstream, create_graph=True)
    assert torch.equal(weight.grad, exact) and weight.grad.requires_grad
    ops.linear(x, weight).backward(upstream)
    assert torch.equal(weight.grad, 2 * exact) and weight.grad is weight.main_grad


def test_every_addition_bumps_the_version():
    x, weight, upstream, _ = products(torch.float32)
    ops.attach_main_grad([weight])
    for add in (
        lambda: ops.linear(x, weight).backward(upstream),
        lambda: ops.wgrad(upstream, x, main_grad=weight.main_grad),
    ):
        before = weight.main_grad._version
        add()
        assert weight.main_grad._version > before


def test_attaching_keeps_what_grad_holds_passes_over_frozen_parameters_and_is_done_once():
    _, weight, _, _ = products(torch.float32)
    half, frozen = torch.nn.Parameter(torch.ones(3).bfloat16()), torch.nn.Parameter(torch.ones(3), requires_grad=False)
    weight.grad, half.grad = torch.full_like(weight, 2.0), torch.full_like(half, 3.0)
    ops.attach_main_grad([weight, half, frozen])
    first = weight.main_grad
    ops.attach_main_grad([weight])
    assert weight.main_grad is first is weight.grad and torch.equal(first, torch.full_like(weight, 2.0))
    assert half.grad is None and torch.equal(half.main_grad, torch.full((3,), 3.0)) and not hasattr(frozen, "main_grad")


def test_a_copy_of_an_attached_parameter_does_not_write_to_the_original():
    x, weight, upstream, exact = products(torch.float32)
    ops.attach_main_grad([weight])
    other = copy.deepcopy(weight)
    ops.linear(x, other).backward(upstream)
    assert torch.equal(other.grad.double(), exact) and not weight.grad.any()
    unpickled = pickle.loads(pickle.dumps(weight))
    with pytest.raises(RuntimeError, match="expected a parameter that attach_main_grad saw in this process"):
        ops.linear(x, unpickled).backward(upstream)
    ops.attach_main_grad([unpickled])
    ops.linear(x, unpickled).backward(upstream)
    assert torch.equal(unpickled.grad.double(), exact) and not weight.grad.any()


def test_a_parameter_converted_after_attaching_is_refused():
    x, weight, upstream, _ = products(torch.float32)
    ops.attach_main_grad([weight])
    weight.data = weight.data.double()
    with pytest.raises(RuntimeError, match=r"must be torch.float64 \[10, 6\] on cpu as its parameter"):
        ops.linear(x.double(), weight).backward(upstream.double())


def test_compiled_autograd_is_refused():
    """It would set `.grad` back to None behind our back, and the next step would start from zero."""
    from torch._dynamo import compiled_autograd

    x, weight, _, _ = products(torch.float32)
    ops.attach_main_grad([weight])
    with (
        compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager")),
        pytest.raises(RuntimeError, match="expected torch's own autograd engine, got compiled autograd"),
    ):
        ops.linear(x, weight).sum().backward()


def test_parameters_are_not_kept_alive():
    x, weight, upstream, _ = products(torch.float32)
    ops.attach_main_grad([weight])
    ops.linear(x, weight).backward(upstream)
    alive = weakref.ref(weight), weakref.ref(weight.main_grad)
    del weight
    gc.collect()
    assert [each() for each in alive] == [None, None]


REFUSED = [
    (lambda w: ops.attach_main_grad([w * 2]), ValueError, "each parameter must be a leaf"),
    (
        lambda w: ops.wgrad(torch.ones(2, 3), torch.ones(2, 4), main_grad=torch.ones(4, 3)),
        ValueError,
        "main_grad must have shape [3, 4], got [4, 3]",
    ),
    (
        lambda w: ops.wgrad(torch.ones(2, 3), torch.ones(2, 4), main_grad=torch.ones(3, 4).double()),
        TypeError,
        "main_grad must be torch.float32 for torch.float32, got torch.float64",
    ),
    (
        lambda w: ops.wgrad(torch.ones(2, 3), torch.ones(2, 4), main_grad=torch.ones(4, 3).t()),
        ValueError,
        "main_grad must be contiguous and on cpu, got strides (1, 3) on cpu",
    ),
]


@pytest.mark.parametrize(("call", "kind", "text"), REFUSED, ids=[text for _, _, text in REFUSED])
def test_refused_in_one_sentence(call, kind, text):
    with pytest.raises(kind) as error:
        call(torch.nn.Parameter(torch.ones(2, 2)))
    assert text in str(error.value) and "\n" not in str(error.value)
