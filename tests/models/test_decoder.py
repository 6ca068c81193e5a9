"""The assembled decoder against the stock-torch reference in fp64: loss and every gradient, whole and sharded, with and
without sequence parallelism, with fewer key and value heads than ranks, in one part and in two, with dropout and a tied
head."""

import copy
import itertools
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tpmp_kernels.comm import SelfCommunicator, communicator
from tpmp_kernels.models import Decoder, ModelConfig, ReferenceDecoder, initialize
from tpmp_kernels.tensor_parallel import DropoutKey, reduce_partial_gradients, shard_of
from tpmp_kernels.tensor_parallel.dropout import dropout_mask

CONFIG = ModelConfig(vocab_size=61, hidden=32, layers=2, heads=8, kv_heads=4, ffn=48)
# fp64 rounding (1e-16) through two layers and some hundred-term sums, relative to the largest entry of each gradient.
BOUND = 1e-12
NEW = replace(CONFIG, dropout=0.25, tie_embeddings=True)
TURN = {"step": 3, "microbatch": 2}
KEY = DropoutKey(seed=7, layer=0, **TURN)


def batch():
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(0, CONFIG.vocab_size, (4, 18), generator=generator)
    return rows[:, :-1], rows[:, 1:]


def reference(config: ModelConfig):
    """(loss, logits, the gradient of every parameter)."""
    model = ReferenceDecoder(config)
    initialize(model, seed=1, layers=config.layers, std=0.3)
    model.double()
    tokens, targets = batch()
    logits = model(tokens, [KEY]).flatten(0, 1)
    loss = F.cross_entropy(logits, targets.flatten(), reduction="sum")
    loss.backward()
    return loss.item(), logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def cut(comm, config: ModelConfig, sequence_parallel: bool, parts: int) -> list[Decoder]:
    bounds = [config.layers * part // parts for part in range(parts + 1)]
    stages = [
        Decoder(
            config,
            comm,
            range(start, stop),
            sequence_parallel=sequence_parallel,
            sequence=batch()[0].shape[1],
            dropout_seed=KEY.seed,
            dtype=torch.float64,
        )
        for start, stop in itertools.pairwise(bounds)
    ]
    for stage in stages:
        initialize(stage, seed=1, layers=config.layers, std=0.3, comm=comm)
    return stages


def check(comm, config: ModelConfig, sequence_parallel: bool = False, parts: int = 1) -> None:
    x, targets = batch()
    stages = cut(comm, config, sequence_parallel, parts)
    for stage in stages:
        x = stage(x, **TURN)
    ours = stages[-1].loss(x, targets)
    ours.backward()
    loss, logits, grads = reference(config)
    assert abs(ours.item() - loss) <= BOUND * abs(loss)
    own = stages[-1].logits(x).detach().flatten(0, -2)
    columns = logits[:, comm.rank * own.shape[1] : (comm.rank + 1) * own.shape[1]]
    assert (own[:, : columns.shape[1]] - columns).abs().max() <= BOUND * logits.abs().max() if columns.numel() else True
    found = {}
    for stage in stages:
        reduce_partial_gradients(stage, comm)
        for name, parameter in stage.named_parameters():
            if name in found:  # a tied weight
                assert torch.equal(parameter, found[name])
                parameter.grad += found[name].grad
            found[name] = parameter
    assert found.keys() == grads.keys()
    for name, parameter in found.items():
        want = shard_of(grads[name], parameter, comm)
        assert (parameter.grad - want).abs().max() <= BOUND * grads[name].abs().max(), name


def run_check(*args):
    with communicator(dist.group.WORLD, name="decoder") as comm:
        check(comm, *args)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_unsharded_decoder_equals_the_reference(kv_heads, sequence_parallel):
    check(SelfCommunicator(), replace(CONFIG, kv_heads=kv_heads), sequence_parallel)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [2, 4])
def test_sharded_decoder_equals_the_reference(ranks, size, kv_heads, sequence_parallel):
    ranks(size).run(run_check, replace(CONFIG, kv_heads=kv_heads), sequence_parallel)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_two_parts_of_it_equal_the_reference(ranks, sequence_parallel):
    ranks(2).run(run_check, CONFIG, sequence_parallel, 2)


@pytest.mark.parametrize(("parts", "sequence_parallel"), [(1, False), (1, True), (2, False), (2, True)])
@pytest.mark.parametrize("size", [1, 2])
def test_dropout_and_a_tied_head_equal_the_reference(ranks, size, parts, sequence_parallel):
    if size == 1:
        check(SelfCommunicator(), NEW, sequence_parallel, parts)
    else:
        ranks(size).run(run_check, NEW, sequence_parallel, parts)


def masks(comm, sequence_parallel: bool, parts: int):
    """The loss, the places where dropout stands by name, and by place what is kept."""
    (x, targets), names, kept = batch(), {}, {}

    def note(name):
        def hook(module, args, output):
            names[module.place], kept[module.place] = name, (output != 0).flatten(0, -2)

        return hook

    stages = cut(comm, NEW, sequence_parallel, parts)
    for stage in stages:
        for name, module in stage.named_modules():
            if hasattr(module, "place"):
                module.register_forward_hook(note(name))
        x = stage(x, **TURN)
    return stages[-1].loss(x, targets).item(), names, kept


def run_masks(*args):
    with communicator(dist.group.WORLD, name="masks") as comm:
        return masks(comm, *args)


def test_the_masks_are_parts_of_one_whole_however_the_model_is_cut(ranks):
    shape = torch.Size((4 * 17, CONFIG.hidden))
    wholes = [dropout_mask(shape, NEW.dropout, replace(KEY, layer=place)) for place in range(2 * CONFIG.layers + 1)]
    places = ["embed_dropout"]
    places += [f"layers.{i}.{name}_dropout" for i in range(CONFIG.layers) for name in ("self_attn", "mlp")]
    losses = {}
    for size, *how in itertools.product((1, 2), (False, True), (1, 2)):
        results = [masks(SelfCommunicator(), *how)] if size == 1 else ranks(size).run(run_masks, *how)
        losses.setdefault(size, set()).update(loss for loss, *_ in results)
        for rank, (_, names, kept) in enumerate(results):
            assert [names[place] for place in range(len(places))] == places
            for place, whole in enumerate(wholes):
                assert torch.equal(kept[place], whole.chunk(size)[rank] if how[0] else whole)
    assert [len(each) for each in losses.values()] == [1, 1], losses  # the same bits for every cut at the same tp


def test_evaluation_drops_nothing_and_asks_for_no_step():
    tokens, _ = batch()
    results = []
    for config in (NEW, replace(NEW, dropout=0.0)):
        (model,) = cut(SelfCommunicator(), config, False, 1)
        results.append(model.train(config.dropout == 0)(tokens))
    assert torch.equal(*results)


@pytest.mark.parametrize(("turn", "got"), [({}, "step=None and microbatch=None"), ({"step": 3}, "step=3 and mic")])
def test_dropout_in_training_must_know_its_step_and_microbatch(turn, got):
    with pytest.raises(ValueError, match=f"Decoder: dropout of 0.25 in training needs step and .*, got {got}.*; pass"):
        Decoder(NEW, SelfCommunicator())(batch()[0], **turn)


def test_a_tied_head_has_no_weight_of_its_own():
    comm = SelfCommunicator()
    whole = Decoder(NEW, comm)
    assert whole.lm_head.weight is whole.embed_tokens.weight
    assert "lm_head.weight" not in dict(whole.named_parameters())
    names = [dict(Decoder(NEW, comm, range(i, i + 1)).named_parameters()).keys() for i in range(2)]
    assert names[0] | names[1] == dict(whole.named_parameters()).keys()
    assert names[0] & names[1] == {"embed_tokens.weight"}
    assert not any("embed" in name for name in dict(Decoder(CONFIG, comm, range(1, 2)).named_parameters()))


def test_stages_hold_disjoint_parts_of_the_same_whole():
    comm = SelfCommunicator()
    whole = dict(Decoder(CONFIG, comm).named_parameters())
    stages = [dict(Decoder(CONFIG, comm, layers).named_parameters()) for layers in (range(0, 1), range(1, 2))]
    assert stages[0].keys() | stages[1].keys() == whole.keys()
    assert not stages[0].keys() & stages[1].keys()


def group(size: int) -> SelfCommunicator:
    comm = SelfCommunicator()
    comm.size = size
    return comm


@pytest.mark.parametrize(
    ("config", "size", "sentence"),
    [
        (CONFIG, 16, "heads is 8, not divisible by tp=16"),
        (replace(CONFIG, heads=16, vocab_multiple=96), 3, "heads is 16, not divisible by tp=3"),
        (
            replace(CONFIG, hidden=48, heads=12, vocab_multiple=96),
            6,
            r"kv_heads is 4 and tp=6, neither divides the other; use tp in \[1, 2, 4, 12\]",
        ),
        (replace(CONFIG, hidden=48, heads=12, kv_heads=3), 3, "padded_vocab is 64, not divisible by tp=3"),
    ],
)
def test_what_does_not_divide_is_refused(config, size, sentence):
    with pytest.raises(ValueError, match=sentence):
        Decoder(config, group(size))


def test_a_part_that_sees_flattened_tokens_must_know_their_sequence():
    with pytest.raises(ValueError, match="Decoder: layers 1 to 1 see tokens flattened by sequence parallelism; pass"):
        Decoder(CONFIG, group(2), range(1, 2), sequence_parallel=True)
    part = Decoder(CONFIG, group(2), range(1, 2), sequence_parallel=True, sequence=6)
    with pytest.raises(ValueError, match="Decoder: 4 tokens on each of 2 ranks are not whole sequences of 6; pass"):
        part(torch.zeros(4, CONFIG.hidden))


def test_a_config_is_read_without_torch():
    code = "import sys; from tpmp_kernels.models import ModelConfig; ModelConfig(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_vocabulary_of_the_demo_is_not_padded():
    assert ModelConfig().padded_vocab == ModelConfig().vocab_size == 256
    assert ModelConfig(vocab_size=50257).padded_vocab == 50304
    assert ModelConfig(vocab_size=61, vocab_multiple=1).padded_vocab == 61


def test_a_copy_keeps_the_marks_of_its_parameters():
    """Of the norms too, whose gradients are partial sums under sequence parallelism."""
    comm = SelfCommunicator()
    comm.size = 2
    model = Decoder(CONFIG, comm, sequence_parallel=True, sequence=8)
    partial = [
        {name for name, p in each.named_parameters() if hasattr(p, "tp_partial_grad")}
        for each in (model, copy.deepcopy(model), copy.deepcopy(model).double())
    ]
    assert "layers.0.input_layernorm.weight" in partial[0] and partial[0] == partial[1] == partial[2]
