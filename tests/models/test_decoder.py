"""The assembled decoder against the stock-torch reference in fp64: loss and every gradient, whole and sharded."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tpmp_kernels.comm import SelfCommunicator, communicator
from tpmp_kernels.models import Decoder, ModelConfig, ReferenceDecoder, initialize
from tpmp_kernels.tensor_parallel import placement_of, take_shard

CONFIG = ModelConfig(vocab_size=64, hidden=32, layers=2, heads=8, kv_heads=4, ffn=48)
# fp64 rounding (1e-16) through two layers and some hundred-term sums, relative to the largest entry of each gradient.
BOUND = 1e-12


def batch():
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(0, CONFIG.vocab_size, (3, 18), generator=generator)
    return rows[:, :-1], rows[:, 1:]


def reference():
    model = ReferenceDecoder(CONFIG)
    initialize(model, seed=1, layers=CONFIG.layers, std=0.3)
    model.double()
    tokens, targets = batch()
    loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="sum")
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def backward(comm):
    model = Decoder(CONFIG, comm, dtype=torch.float64)
    initialize(model, seed=1, layers=CONFIG.layers, std=0.3, comm=comm)
    tokens, targets = batch()
    loss = model.loss(model(tokens), targets)
    loss.backward()
    return loss.item(), {name: (p.grad, placement_of(p)) for name, p in model.named_parameters()}


def run_sharded():
    with communicator(dist.group.WORLD, name="decoder") as comm:
        return backward(comm)


def compare(comm, loss, grads):
    expected_loss, expected = reference()
    assert abs(loss - expected_loss) <= BOUND * abs(expected_loss)
    assert grads.keys() == expected.keys()
    for name, (grad, placement) in grads.items():
        want = take_shard(expected[name], placement, comm)
        assert (grad - want).abs().max() <= BOUND * expected[name].abs().max(), name


def test_unsharded_decoder_equals_the_reference():
    comm = SelfCommunicator()
    compare(comm, *backward(comm))


@pytest.mark.parametrize("size", [2, 4])
def test_sharded_decoder_equals_the_reference(ranks, size):
    for rank, result in enumerate(ranks(size).run(run_sharded)):
        comm = SelfCommunicator()
        comm.rank, comm.size = rank, size
        compare(comm, *result)


def test_stages_hold_disjoint_parts_of_the_same_whole():
    comm = SelfCommunicator()
    whole = dict(Decoder(CONFIG, comm).named_parameters())
    stages = [dict(Decoder(CONFIG, comm, layers).named_parameters()) for layers in (range(0, 1), range(1, 2))]
    assert stages[0].keys() | stages[1].keys() == whole.keys()
    assert not stages[0].keys() & stages[1].keys()


def test_weights_depend_neither_on_tp_nor_on_pp():
    whole = Decoder(CONFIG, SelfCommunicator())
    initialize(whole, seed=3, layers=CONFIG.layers)
    comm = SelfCommunicator()
    comm.rank, comm.size = 1, 2
    part = Decoder(CONFIG, comm, range(1, 2))
    initialize(part, seed=3, layers=CONFIG.layers, comm=comm)
    for name, parameter in part.named_parameters():
        assert torch.equal(parameter, take_shard(whole.get_parameter(name), placement_of(parameter), comm)), name


def test_kv_heads_that_do_not_divide_are_refused():
    comm = SelfCommunicator()
    comm.size = 8
    with pytest.raises(ValueError, match="kv_heads is 4, not divisible by tp=8"):
        Decoder(CONFIG, comm)


def test_a_config_is_read_without_torch():
    code = "import sys; from tpmp_kernels.models import ModelConfig; ModelConfig(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
