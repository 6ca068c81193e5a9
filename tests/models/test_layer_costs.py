"""What a layer is modelled to cost, against a count of the real modules; and the profile of them."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tpmp_kernels.comm import SelfCommunicator
from tpmp_kernels.comm.communicator import Communicator
from tpmp_kernels.models import Decoder, ModelConfig, initialize
from tpmp_kernels.models.layer_costs import Microbatch, layer_costs
from tpmp_kernels.models.layer_profile import measured_layer_costs
from tpmp_kernels.ops.backend import use_backend
from tpmp_kernels.training.config import OptimizerConfig
from tpmp_kernels.training.optimizer import Optimizer

CONFIG = ModelConfig(vocab_size=500, hidden=64, layers=3, heads=4, kv_heads=2, ffn=96)
SEEN = Microbatch(batch=2, sequence=24)
PARTS = [range(0), range(1, 2), range(3, 3)]  # embedding, a layer, norm and head
IDS = ["embedding", "layer", "head"]


class Shard(SelfCommunicator):
    """Rank 0 of a group, for the shapes of its shard; no collective is called."""

    def __init__(self, size: int):
        Communicator.__init__(self, 0, size, name="shard", timeout=60.0)


def costs_of(config: ModelConfig, seen: Microbatch):
    """Embedding, a layer, head."""
    costs = layer_costs(config, seen)
    return [costs[0], costs[2], costs[-1]]


def part(layers: range, config: ModelConfig = CONFIG) -> Decoder:
    module = Decoder(config, SelfCommunicator(), layers)
    initialize(module, seed=0, layers=config.layers)
    return module


def forward(module: Decoder, seen: Microbatch = SEEN):
    """(input, output, or the loss)."""
    tokens = torch.randint(CONFIG.vocab_size, (seen.batch, seen.sequence))
    x = tokens if module.first else torch.randn(*tokens.shape, CONFIG.hidden).requires_grad_()
    output = module(x)
    return x, module.loss(output, tokens) if module.last else output


def flops(module: Decoder, frozen: bool) -> tuple[int, int]:
    """(forward, backward) of the linears, in stock torch: the counter sees neither our ops nor attention on a CPU."""
    module.requires_grad_(not frozen)
    with use_backend("reference"):
        with FlopCounterMode(display=False) as before:
            _, output = forward(module)
        with FlopCounterMode(display=False) as behind:
            if output.requires_grad:
                output.sum().backward()
    return before.get_total_flops(), behind.get_total_flops()


def scores(seen: Microbatch) -> float:
    """Of causal attention, forward: half of what the counter sees of all scores in stock torch, and the diagonal."""
    shape = (seen.batch, CONFIG.heads, seen.sequence, CONFIG.head_size)
    with FlopCounterMode(display=False) as counted:
        q = k = v = torch.ones(shape)
        (q @ k.transpose(-1, -2)).softmax(-1) @ v
    return counted.get_total_flops() * (seen.sequence + 1) / (2 * seen.sequence)


@pytest.mark.parametrize("layers, number", list(zip(PARTS, range(3), strict=True)), ids=IDS)
def test_flops_are_those_of_the_modules(layers, number):
    cost, attention = costs_of(CONFIG, SEEN)[number], scores(SEEN) if number == 1 else 0.0
    f, b = flops(part(layers), frozen=True)
    both = flops(part(layers), frozen=False)[1]
    again = f if number == 2 else 0  # the loss makes its logits again in backward, which stock torch has kept
    assert math.isclose(cost.F, (f + attention) / 1e9) and (f > 0) == (number > 0)
    assert math.isclose(cost.B, (b + again + 2.5 * attention) / 1e9)
    assert math.isclose(cost.W, (both - b) / 1e9)


def test_attention_backward_is_five_products():
    """As torch counts its flash attention, on no device."""
    shape = (1, 2, 64, 32)
    with FlopCounterMode(display=False) as forward_count:
        q, k, v = (torch.ones(shape, device="meta", dtype=torch.bfloat16) for _ in range(3))
        out, lse, *rest = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)
    with FlopCounterMode(display=False) as backward_count:
        torch.ops.aten._scaled_dot_product_flash_attention_backward(
            out, q, k, v, out, lse, *rest[:4], 0.0, True, *rest[4:6]
        )
    assert backward_count.get_total_flops() == 2.5 * forward_count.get_total_flops()


@pytest.mark.parametrize("layers, number", list(zip(PARTS, range(3), strict=True)), ids=IDS)
def test_activations_are_what_autograd_keeps(layers, number):
    """But for a few numbers a token (norms, the logsumexp of attention, ids) and the rotary table."""
    module, seen = part(layers), Microbatch(batch=4, sequence=64)
    own, kept = {p.untyped_storage().data_ptr() for p in module.parameters()}, {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _, output = forward(module, seen)
    total, small = sum(each.nbytes() for each in kept.values()), seen.tokens * (CONFIG.head_size + 10) * 4
    assert total - small <= 1e6 * costs_of(CONFIG, seen)[number].activation <= total
    assert output.numel() * 4 == 1e6 * costs_of(CONFIG, seen)[number].message or number == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("tp, tied", [(1, False), (2, False), (4, True)])
def test_parameters_are_those_of_the_modules_with_gradients_and_optimizer(tp, tied, dtype):
    config = replace(CONFIG, tie_embeddings=tied, vocab_size=512)
    for layers, cost in zip(PARTS, costs_of(config, Microbatch(2, 24, tp=tp, dtype=dtype)), strict=True):
        module = Decoder(config, Shard(tp), layers, dtype=getattr(torch, dtype))
        optimizer = Optimizer(dict(module.named_parameters()), OptimizerConfig(), counts_replicas=True)
        held = [*module.parameters(), *(p for p in optimizer.main.values())]
        held += [state[moment] for state in optimizer.adamw.state.values() for moment in ("exp_avg", "exp_avg_sq")]
        nbytes = sum({each.data_ptr(): each.nbytes for each in held}.values())
        nbytes += sum(main.nbytes for main in optimizer.main.values())  # the gradients
        assert math.isclose(cost.parameters, nbytes / 1e6)


def test_shards_share_the_work_and_sequence_parallelism_the_rest():
    whole, half = costs_of(CONFIG, SEEN), costs_of(CONFIG, replace(SEEN, tp=2))
    cut = costs_of(CONFIG, replace(SEEN, tp=2, sequence_parallel=True))
    for one, two in zip(whole, half, strict=True):
        assert pytest.approx((2 * two.F, 2 * two.B, 2 * two.W)) == (one.F, one.B, one.W)
    assert [each.message for each in half] == [each.message for each in whole]
    assert [each.message for each in cut] == [each.message / 2 for each in whole]
    assert cut[1].activation == pytest.approx(whole[1].activation / 2) and half[1].activation > cut[1].activation
    assert cut[2].activation == pytest.approx(0.75 * half[2].activation)
    assert costs_of(CONFIG, replace(SEEN, tp=4))[1].F > whole[1].F / 4, "two ranks hold each key and value head"
    names = [each.name for each in layer_costs(CONFIG, SEEN)]
    assert names == ["embed_tokens", "layers.0", "layers.1", "layers.2", "lm_head"]


@pytest.mark.parametrize("changed", [{"vocab_size": 4000}, {"dropout": 0.5}, {"tie_embeddings": True}])
def test_a_profile_of_the_modules(changed):
    config, before = replace(CONFIG, **changed), torch.random.get_rng_state()
    costs = measured_layer_costs(config, Microbatch(batch=4, sequence=32), repetitions=3)
    modelled = layer_costs(config, Microbatch(batch=4, sequence=32))
    assert [replace(each, F=0, B=0, W=0) for each in costs] == [replace(each, F=0, B=0, W=0) for each in modelled]
    first, *layers, last = costs
    assert all((each.F, each.B, each.W) == (layers[0].F, layers[0].B, layers[0].W) for each in layers)
    assert first.B == 0 and min(first.F, layers[0].F, layers[0].B, last.F, last.B) > 0
    assert min(each.W for each in costs) >= 0
    if config.vocab_size == 4000:  # 65 MFLOP against a look-up of 32 KB: no busy machine turns that round
        assert last.F > first.F
    assert torch.equal(torch.random.get_rng_state(), before), "the caller's random numbers are left alone"


def test_a_profile_tells_b_and_w_apart(monkeypatch):
    """With a clock that counts matrix products: what is timed is what is meant."""
    from tpmp_kernels.models import layer_profile

    def counted(call, device):
        with FlopCounterMode(display=False) as counter:
            result = call()
        return counter.get_total_flops() / 1e12, result  # so that "milliseconds" are GFLOP

    monkeypatch.setattr(layer_profile, "_timed", counted)
    with use_backend("reference"):
        costs = measured_layer_costs(CONFIG, SEEN, repetitions=1)
    for number, (found, modelled) in enumerate(
        zip((costs[0], costs[1], costs[-1]), costs_of(CONFIG, SEEN), strict=True)
    ):
        attention = scores(SEEN) / 1e9 if number == 1 else 0.0
        again = modelled.F if number == 2 else 0.0
        assert pytest.approx(modelled.F - attention) == found.F
        assert pytest.approx(modelled.B - again - 2.5 * attention) == found.B
        assert pytest.approx(modelled.W) == found.W


def test_b_is_timed_on_a_graph_without_parameters(monkeypatch):
    """An autograd.Function is told what its inputs need, not what was asked for: it would make W as well."""
    from tpmp_kernels.models import layer_profile

    def leaves(output) -> list[torch.Tensor]:
        nodes, seen = [output.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node is not None and node not in seen:
                seen.add(node)
                nodes += [before for before, _ in node.next_functions]
        return [node.variable for node in seen if hasattr(node, "variable")]

    backwards = []

    def looked_at(call, device):
        if getattr(call, "func", None) is torch.autograd.grad:
            output, inputs, _ = call.args
            backwards.append((isinstance(inputs, torch.Tensor), len(leaves(output))))
        return 0.0, call()

    monkeypatch.setattr(layer_profile, "_timed", looked_at)
    measured_layer_costs(CONFIG, SEEN, repetitions=1)
    parameters = {False: [1, 10, 3], True: [1, 1]}  # of embedding, layer and head, with the input of the last two
    for of_input, leaf_counts in parameters.items():
        assert [count for which, count in backwards if which == of_input][::2] == leaf_counts
