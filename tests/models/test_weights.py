"""Initial weights: one whole for every tp, normal, drawn without ever holding a whole on a rank."""

import itertools
import json
import math

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard

from tpmp_kernels.comm import SelfCommunicator
from tpmp_kernels.models import Decoder, ModelConfig, initialize
from tpmp_kernels.models.weights import _tables
from tpmp_kernels.tensor_parallel import shard_of

CONFIG = ModelConfig(vocab_size=61, hidden=48, layers=2, heads=8, kv_heads=2, ffn=40)


def rank(number: int, size: int) -> SelfCommunicator:
    comm = SelfCommunicator()
    comm.rank, comm.size = number, size
    return comm


def drawn(rows: int, columns: int, *, seed: int = 0, name: str = "weight", **kwargs) -> torch.Tensor:
    module = nn.Module()
    module.register_parameter(name, nn.Parameter(torch.empty(rows, columns, **kwargs)))
    initialize(module, seed=seed, layers=1, std=1.0)
    return module.get_parameter(name).detach()


@pytest.mark.parametrize("size", [2, 4])
def test_every_rank_draws_its_shard_of_the_same_whole(size):
    whole = Decoder(CONFIG, SelfCommunicator())
    initialize(whole, seed=3, layers=CONFIG.layers)
    for number in range(size):
        comm = rank(number, size)
        part = Decoder(CONFIG, comm, sequence_parallel=True)
        initialize(part, seed=3, layers=CONFIG.layers, comm=comm)
        for name, parameter in part.named_parameters():
            full = whole.get_parameter(name)
            full = full[: getattr(full, "tp_unpadded", None)]
            assert torch.equal(parameter, shard_of(full, parameter, comm)), name


@pytest.mark.parametrize("columns", [1, 3, 10, 64])
def test_columns_that_no_four_divides_are_cut_alike(columns):
    whole = drawn(5, 2 * columns)
    for number in range(2):
        module = nn.Module()
        module.weight = nn.Parameter(torch.empty(5, columns))
        module.weight.tp_placement = Shard(1)
        initialize(module, seed=0, layers=1, std=1.0, comm=rank(number, 2))
        assert torch.equal(module.weight, whole[:, number * columns : (number + 1) * columns])


def test_replicas_of_a_key_and_value_head_are_equal():
    weights = []
    for number in range(4):
        comm = rank(number, 4)
        part = Decoder(CONFIG, comm)  # two key and value heads on four ranks
        initialize(part, seed=3, layers=CONFIG.layers, comm=comm)
        weights.append(part.layers["0"].self_attn.k_proj.weight)
    assert weights[0].shape == (6, 48) and torch.equal(weights[0], weights[1]) and torch.equal(weights[2], weights[3])
    assert not torch.equal(weights[0], weights[2])


def test_padding_is_zero_and_biases_and_norms_are_what_they_should_be():
    model = Decoder(CONFIG, SelfCommunicator())
    model.lm_bias = nn.ParameterDict({"bias": nn.Parameter(torch.empty(3))})
    initialize(model, seed=3, layers=CONFIG.layers)
    for weight in (model.embed_tokens.weight, model.lm_head.weight):
        assert weight.shape == (64, 48) and not weight[61:].any() and (weight[:61] != 0).any(1).all()
    assert (model.norm.weight == 1).all() and (model.lm_bias["bias"] == 0).all()


def test_seeds_names_and_places_give_other_numbers():
    base = drawn(64, 64)
    for other in (drawn(64, 64, seed=1), drawn(64, 64, seed=2**32), drawn(64, 64, name="another")):
        assert not (other == base).float().mean() > 0.01
        assert abs((other * base).mean()) <= 5 / 64  # a correlation of 4096 pairs
    assert base.unique().numel() > 0.99 * base.numel()
    assert torch.equal(base, drawn(64, 64)) and torch.equal(base[:9], drawn(9, 64))


def test_every_dtype_starts_from_the_same_numbers():
    base = drawn(8, 8)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert torch.equal(drawn(8, 8, dtype=dtype), base.to(dtype))


def test_the_distribution_is_normal():
    x = drawn(1000, 1000).double().flatten()
    n = x.numel()
    # Moments of a standard normal and the deviations of their estimates; five of them.
    for power, moment, deviation in ((1, 0, 1), (2, 1, math.sqrt(2)), (3, 0, math.sqrt(15)), (4, 3, math.sqrt(96))):
        assert abs((x**power).mean() - moment) <= 5 * deviation / math.sqrt(n), power
    # Kolmogorov and Smirnov: sqrt(n) times the largest distance passes 1.95 once in a thousand times.
    distance = (torch.special.ndtr(x.sort().values) - (torch.arange(n) + 0.5) / n).abs().max() + 0.5 / n
    assert math.sqrt(n) * distance <= 1.95
    for neighbour in (1, 2, 3, 4, 1000):
        assert abs((x[neighbour:] * x[:-neighbour]).mean()) <= 5 / math.sqrt(n)


def test_the_sum_of_two_table_entries_is_as_normal_as_its_docstring_says():
    low, high = (table.double() for table in _tables(torch.device("cpu")))
    assert low.sum() == 0 == high.sum() and abs(low.square().mean() + high.square().mean() - 1) <= 1e-7
    assert 6.05 < low.max() + high.max() < 6.15
    for z in torch.linspace(-6, 6, 121, dtype=torch.float64):
        below = torch.searchsorted(low, z - high, right=True).double().mean() / len(low)
        assert abs(below - torch.special.ndtr(z)) <= 3e-6, z


@pytest.mark.parametrize("placement", [Shard(0), Shard(1)])
def test_memory_beside_the_shard_is_bounded(placement, tmp_path):
    """A shard, 8 MB of 64, is drawn through one block of 2^15 counters, some twenty tensors of 256 KB."""
    module = nn.Module()
    module.weight = nn.Parameter(torch.empty((2048, 1024) if placement.is_shard(0) else (16384, 128)))
    module.weight.tp_placement = placement
    drawn(2, 2)  # makes the table
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        initialize(module, seed=0, layers=1, comm=rank(3, 8))
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    changes = [e["args"]["Bytes"] for e in sorted(events, key=lambda e: e.get("ts", 0)) if e["name"] == "[memory]"]
    assert 2**18 < max(itertools.accumulate(changes)) <= 6 * 2**20
