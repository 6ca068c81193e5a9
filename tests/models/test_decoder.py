"""The assembled decoder against the stock-torch reference in fp64: loss and every gradient, whole and sharded, with and
without sequence parallelism, with fewer key and value heads than ranks, in one part and in two."""

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
from tpmp_kernels.tensor_parallel import reduce_partial_gradients, shard_of

CONFIG = ModelConfig(vocab_size=61, hidden=32, layers=2, heads=8, kv_heads=4, ffn=48)
# fp64 rounding (1e-16) through two layers and some hundred-term sums, relative to the largest entry of each gradient.
BOUND = 1e-12


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
    logits = model(tokens).flatten(0, 1)
    loss = F.cross_entropy(logits, targets.flatten(), reduction="sum")
    loss.backward()
    return loss.item(), logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def check(comm, config: ModelConfig, sequence_parallel: bool = False, parts: int = 1) -> None:
    tokens, targets = batch()
    bounds = [config.layers * part // parts for part in range(parts + 1)]
    stages = [
        Decoder(
            config,
            comm,
            range(start, stop),
            sequence_parallel=sequence_parallel,
            sequence=tokens.shape[1],
            dtype=torch.float64,
        )
        for start, stop in itertools.pairwise(bounds)
    ]
    x = tokens
    for stage in stages:
        initialize(stage, seed=1, layers=config.layers, std=0.3, comm=comm)
        x = stage(x)
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
        found |= dict(stage.named_parameters())
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
