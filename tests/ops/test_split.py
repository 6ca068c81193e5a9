"""B and W apart: the taps' gradients and wgrad give the bits of the unsplit backward, eager and compiled."""

import gc

import pytest
import torch
import torch.nn.functional as F
from bounds import assert_no_worse_than_torch
from torch.multiprocessing.reductions import StorageWeakRef

from tpmp_kernels import ops, reference

K, HIDDEN, ROWS = 6, 10, 7
OTHERS = [torch.float64, torch.bfloat16]


@pytest.fixture(scope="module", params=["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def form(request):
    if request.param == "eager":
        return lambda function: function
    torch._dynamo.reset()
    return lambda function: torch.compile(function, fullgraph=True, backend=request.param)


def unsplit(x, w1, b1, w2, b2):
    h = ops.linear(x, w1, b1, activation="gelu")
    return ops.linear(h, w2, b2, residual=x)


def split(x, w1, b1, w2, b2, t1, t2):
    """y, and the input of each GEMM, which W needs."""
    h = ops.linear(x, w1, b1, activation="gelu", tap=t1)
    return ops.linear(h, w2, b2, residual=x, tap=t2), (x, h)


def draw(dtype, seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def parameters(dtype):
    return draw(dtype, 1, (HIDDEN, K), (HIDDEN,), (K, HIDDEN), (K,))


class Microbatch:
    """F, B and W of one microbatch at times of their own; what W needs is cloned at B, as a runtime would keep it."""

    def __init__(self, run, weights, x):
        self.weights, self.x = weights, x
        h = x.new_empty(*x.shape[:-1], HIDDEN)
        self.taps = [ops.tap(x, weights[0]), ops.tap(h, weights[2])]
        self.y, self.gemm_inputs = run(x, *weights, *self.taps)

    def b(self):
        self.dx, *dzs = torch.autograd.grad(self.y.square().sum(), [self.x, *self.taps])
        self.stash = list(zip([t.detach() for t in self.gemm_inputs], dzs, strict=True))
        self.clones = [(x.clone(), dz.clone()) for x, dz in self.stash]
        return self.y.square().sum().detach(), self.dx

    def w(self, main_grads=(None, None)):
        for kept, clones in zip(self.stash, self.clones, strict=True):
            assert all(torch.equal(t, c) for t, c in zip(kept, clones, strict=True)), "the stash has changed"
        products = [ops.wgrad(dz, x, main_grad=m) for (x, dz), m in zip(self.stash, main_grads, strict=True)]
        biases = [dz.flatten(0, -2).sum(0) for _, dz in self.stash]
        return products[0], biases[0], products[1], biases[1]


@pytest.mark.parametrize("dtype", [torch.float32, *(pytest.param(d, marks=pytest.mark.full) for d in OTHERS)], ids=str)
def test_fullgraph_split_has_the_bits_of_the_whole(form, dtype):
    """loss, dx, dW and db, although another microbatch's F and B ran between this one's B and W."""
    weights = parameters(dtype)
    x, other = draw(dtype, 2, (2, ROWS, K), (2, ROWS, K))
    y = form(unsplit)(x, *weights)
    loss = y.square().sum()
    whole = [loss.detach(), *torch.autograd.grad(loss, [x, *weights])]

    run = form(split)
    first = Microbatch(run, weights, x)
    got = first.b()
    second = Microbatch(run, weights, other)
    second.b()
    for ours, theirs in zip([*got, *first.w()], whole, strict=True):
        assert torch.equal(ours, theirs)
    second.w()


def test_fullgraph_split_accumulates_the_bits_of_the_whole(form):
    """Two microbatches into fp32 main_grads: the same products, added in the same order, as an unsplit backward."""
    weights = [torch.nn.Parameter(w) for w in parameters(torch.float32)]
    ops.attach_main_grad([weights[0], weights[2]])
    batches = draw(torch.float32, 2, (2, ROWS, K), (2, ROWS, K))
    for x in batches:
        form(unsplit)(x, *weights).square().sum().backward()
    whole = [w.grad.clone() for w in weights]
    for w in weights:
        w.grad = None
    microbatches = [Microbatch(form(split), weights, x) for x in batches]
    for each in microbatches:
        each.b()
    for each in microbatches:
        each.w((weights[0].main_grad, weights[2].main_grad))
    assert torch.equal(weights[0].grad, whole[0]) and torch.equal(weights[2].grad, whole[2])


def test_the_gemms_are_those_of_the_backward():
    """ops.dgrad and ops.wgrad give the bits that ops.linear's own backward gives."""
    x, w, dz = draw(torch.float32, 3, (3, 70, 65), (67, 65), (3, 70, 67))
    dx, dw = torch.autograd.grad(ops.linear(x, w), [x, w], dz)
    assert torch.equal(ops.dgrad(dz, w), dx) and torch.equal(ops.wgrad(dz, x), dw)
    main_grad = torch.zeros_like(dw)
    ops.wgrad(dz, x, main_grad=main_grad)
    assert torch.equal(main_grad, dw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_adding_to_main_grad_is_no_worse_than_torch(dtype):
    """The product rounds once at most before it is added in fp32, eight times, against torch's sum in the dtype."""
    ours, theirs, exact = torch.zeros(67, 65), torch.zeros(67, 65, dtype=dtype), torch.zeros(67, 65).double()
    for seed in range(8):
        x, dz = (t.detach() for t in draw(dtype, seed, (70, 65), (70, 67)))
        ops.wgrad(dz, x, main_grad=ours)
        theirs += dz.t() @ x
        exact += dz.double().t() @ x.double()
    assert_no_worse_than_torch(ours, theirs, exact)


@pytest.mark.parametrize("activation", [None, "gelu", "relu2"])
@pytest.mark.parametrize("save_preact", [True, False])
def test_a_tap_is_the_references(activation, save_preact):
    """Values unchanged; dx and the tap's gradient those of z = F.linear(x, weight, bias) + tap; nothing for weight."""
    x, w, b, r = draw(torch.float64, 4, (2, 5, K), (HIDDEN, K), (HIDDEN,), (2, 5, HIDDEN))
    upstream = torch.randn(2, 5, HIDDEN, dtype=torch.float64)
    results = []
    for room in (ops, reference):
        tap = ops.tap(x, w)
        y = room.linear(x, w, b, activation=activation, residual=r, save_preact=save_preact, tap=tap)
        grads = torch.autograd.grad(y, [x, r, tap, w, b], upstream, allow_unused=True)
        assert grads[3] is None and grads[4] is None
        results.append([y, *grads[:3]])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(results[0][0], ops.linear(x, w, b, activation=activation, residual=r))


@pytest.mark.parametrize("save_preact", [True, False])
def test_taps_of_a_gated_linear_are_the_references(save_preact):
    x, g, u = draw(torch.float64, 5, (2, 5, K), (HIDDEN, K), (HIDDEN, K))
    upstream = torch.randn(2, 5, HIDDEN, dtype=torch.float64)
    results = []
    for room in (ops, reference):
        taps = ops.tap(x, g), ops.tap(x, u)
        y = room.gated_linear(x, g, u, save_preact=save_preact, taps=taps)
        grads = torch.autograd.grad(y, [x, *taps, g, u], upstream, allow_unused=True)
        assert grads[3] is None and grads[4] is None
        results.append([y, *grads[:3]])
    (_, dx, *_), (_, truth, *_) = results
    torch.testing.assert_close(dx, truth, rtol=1e-14, atol=1e-13)  # a sum of two products
    assert all(torch.equal(a, b) for i, (a, b) in enumerate(zip(*results, strict=True)) if i != 1)
    dg, du = torch.autograd.grad(ops.gated_linear(x, g, u), [g, u], upstream)
    assert torch.equal(ops.wgrad(results[0][2], x), dg) and torch.equal(ops.wgrad(results[0][3], x), du)


def test_a_tap_is_one_zero_in_the_dtype_of_the_product():
    x, w = torch.ones(2, 3, K), torch.ones(HIDDEN, K)
    tap = ops.tap(x, w)
    assert tap.shape == (2, 3, HIDDEN) and tap.stride() == (0, 0, 0) and tap.requires_grad and tap.is_leaf
    assert tap.untyped_storage().nbytes() == 4 and not tap.any()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = ops.tap(x, w)
        (dz,) = torch.autograd.grad(ops.linear(x, w, tap=low).sum(), low)
    assert low.dtype == dz.dtype == torch.bfloat16


def test_opcheck_with_taps():
    x, w, b = draw(torch.float32, 6, (2, 5, K), (HIDDEN, K), (HIDDEN,))
    tap = ops.tap(x, w)
    ops_ = torch.ops.tpmp_kernels
    torch.library.opcheck(ops_.linear.default, (x, w, b, None, tap, None, "gelu", None, True))
    torch.library.opcheck(ops_.linear.default, (x, w, b, None, tap, None, None, None, True))
    torch.library.opcheck(ops_.gated_linear.default, (x, w, w.detach(), tap, ops.tap(x, w), None, None, "silu", False))


def held_by(y) -> list[torch.Tensor]:
    return [t for t in y.grad_fn.saved_tensors if t is not None]


def test_nothing_is_kept_that_the_backward_does_not_need():
    """With a tap W runs elsewhere: a linear keeps weight and z, and no input; without save_preact, what makes z."""
    x, w, b = draw(torch.float32, 7, (2, 5, K), (HIDDEN, K), (HIDDEN,))
    frozen = w.detach()

    def kept(**options):
        return [tuple(t.shape) for t in held_by(ops.linear(x, w, b, **options))]

    z = (2, 5, HIDDEN)
    assert kept() == [x.shape, w.shape]
    assert kept(activation="gelu") == [x.shape, w.shape, z]
    assert kept(activation="gelu", save_preact=False) == [x.shape, w.shape, b.shape]
    assert kept(tap=ops.tap(x, w)) == [w.shape]
    assert kept(tap=ops.tap(x, w), activation="gelu") == [w.shape, z]
    assert [t.shape for t in held_by(ops.linear(x.detach(), w))] == [x.shape]
    assert [t.shape for t in held_by(ops.linear(x, frozen))] == [w.shape]
    assert [t.shape for t in held_by(ops.mlp(x, w, w.t().contiguous().detach()))] == [x.shape, w.shape, w.t().shape, z]
    gated = ops.gated_mlp(x, w, w, w.t().contiguous(), save_preact=False)
    assert [t.shape for t in held_by(gated)] == [x.shape, w.shape, w.shape, w.t().shape]


def test_fullgraph_inputs_are_free_as_soon_as_the_caller_lets_go(form):
    """The memory of a GEMM's input, while the graph that ends in y still lives."""
    weights = parameters(torch.float32)
    (x,) = draw(torch.float32, 8, (2, ROWS, K))
    microbatch = Microbatch(form(split), weights, x)
    memory = StorageWeakRef(microbatch.gemm_inputs[1].untyped_storage())
    assert not memory.expired()
    microbatch.gemm_inputs = None
    gc.collect()
    assert memory.expired() and microbatch.y.requires_grad


def test_second_derivatives_of_the_gemms_follow_the_reference():
    """dgrad and wgrad are differentiable themselves."""
    dz, w, x = draw(torch.float64, 9, (2, 5, HIDDEN), (HIDDEN, K), (2, 5, K))
    assert torch.autograd.gradcheck(ops.dgrad, (dz, w)) and torch.autograd.gradcheck(ops.wgrad, (dz, x))


def test_dgrad_is_f_linears():
    x, w, dz = draw(torch.float32, 10, (70, 65), (67, 65), (70, 67))
    (dx,) = torch.autograd.grad(F.linear(x, w), x, dz)
    assert torch.equal(ops.dgrad(dz, w), dx)


X, W, DZ = torch.zeros(2, 64), torch.zeros(3, 64), torch.zeros(2, 3)
REFUSED = [
    (lambda: ops.dgrad(DZ, torch.zeros(4, 64)), ValueError, "weight has shape [4, 64] but dz has shape [2, 3]"),
    (lambda: ops.dgrad(torch.tensor(1.0), W), ValueError, "pass dz [..., N] and a weight [N, K]"),
    (lambda: ops.wgrad(DZ, torch.zeros(3, 64)), ValueError, "dz has shape [2, 3] but x has shape [3, 64]"),
    (lambda: ops.wgrad(DZ.double(), X), TypeError, "dz has dtype torch.float64 but x has torch.float32"),
    (lambda: ops.tap(X, torch.zeros(3, 65)), ValueError, "pass a weight of shape [N, 64]"),
    (lambda: ops.linear(X, W, tap=torch.zeros(2, 4)), ValueError, "tap must have shape [2, 3], got [2, 4]"),
    (
        lambda: ops.gated_linear(X, W, W, taps=(DZ, torch.zeros(2, 4))),
        ValueError,
        "tap_up must have shape [2, 3], got [2, 4]",
    ),
]


@pytest.mark.parametrize(("call", "kind", "text"), REFUSED, ids=[text for _, _, text in REFUSED])
def test_refused_in_one_sentence(call, kind, text):
    with pytest.raises(kind) as error:
        call()
    assert text in str(error.value) and "\n" not in str(error.value)


class Blocks(torch.nn.Module):
    """Every op with a weight gradient, a norm and a torch linear between them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        shapes = {"w1": (HIDDEN, K), "w2": (K, HIDDEN), "gate": (HIDDEN, K), "up": (HIDDEN, K), "down": (K, HIDDEN)}
        for name, shape in shapes.items():
            setattr(self, name, torch.nn.Parameter(torch.randn(shape)))
        self.bias, self.scale = torch.nn.Parameter(torch.randn(HIDDEN)), torch.nn.Parameter(torch.rand(K))
        self.plain = torch.nn.Linear(K, K)

    def forward(self, x):
        x = x + ops.linear(ops.linear(x, self.w1, self.bias, activation="gelu"), self.w2)
        x = self.plain(ops.rms_norm(x, self.scale))
        x = x + ops.linear(ops.gated_linear(x, self.gate, self.up), self.down)
        return ops.mlp(x, self.w1, self.w2)  # weights that are used again


def gradients(form, checkpoints: bool, apart: bool) -> list[torch.Tensor]:
    """Of three microbatches, each backward in one go, or all of B before all of W."""
    module = Blocks()
    ops.attach_main_grad(module.parameters())
    run = form(module)
    batches, later = draw(torch.float32, 2, *3 * [(2, ROWS, K)]), []
    for x in batches:
        y = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False) if checkpoints else run(x)
        if not apart:
            y.square().sum().backward()
            continue
        loss = y.square().sum()
        with ops.split_backward(module.parameters()) as left:
            loss.backward()
        names = {name for name, p in module.named_parameters() if p in left.parameters}
        assert names == {"w1", "w2", "gate", "up", "down"}
        later.append((left, [(dz.clone(), h.clone()) for _, dz, h in left._products]))
    for left, clones in later:
        kept = [(dz, h) for _, dz, h in left._products]
        assert all(torch.equal(*each) for pair in zip(kept, clones, strict=True) for each in zip(*pair, strict=True))
        left.run()
        assert not left.parameters
    assert not any(hasattr(p, "main_grad_later") for p in module.parameters())
    return [p.grad.clone() for p in module.parameters()] + [x.grad for x in batches]


@pytest.mark.parametrize("checkpoints", [False, True])
def test_fullgraph_a_modules_backward_apart_has_the_bits_of_the_whole(form, checkpoints):
    """What is stashed does not change either, although other microbatches run in between."""
    whole, apart = (gradients(form, checkpoints, apart) for apart in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(whole, apart, strict=True))


def test_a_weight_without_main_grad_has_its_gradient_in_the_backward():
    module = Blocks()
    with ops.split_backward(module.parameters()) as left:
        module(torch.randn(2, K)).sum().backward()
    assert not left.parameters and all(p.grad is not None for p in module.parameters())
