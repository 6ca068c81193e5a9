"""The optimizer against torch's own, its main gradients, and the global norm over shards and replicas."""

import torch
from torch import nn
from torch.distributed.tensor import Shard

from tpmp_kernels.training.config import OptimizerConfig
from tpmp_kernels.training.optimizer import Optimizer, learning_rate

CONFIG = OptimizerConfig(lr=0.01, warmup_steps=4, weight_decay=0.1, clip_norm=0.5)


def model(dtype=torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def test_equals_torch_adamw_with_clipping_bitwise():
    ours, theirs = model(), model()
    optimizer = Optimizer(dict(ours.named_parameters()), CONFIG, counts_replicas=True)
    groups = [
        {"params": [p for p in theirs.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, betas=CONFIG.betas, eps=CONFIG.eps)
    for step in range(6):
        x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        ours(x).square().sum().backward()
        theirs(x).square().sum().backward()
        norm = sum(optimizer.square_norms().values()).sqrt().item()
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), CONFIG.clip_norm).item()
        assert abs(norm - expected) <= 1e-14 * expected
        for group in adamw.param_groups:
            group["lr"] = learning_rate(CONFIG, step)
        adamw.step()
        adamw.zero_grad()
        optimizer.step(step, expected)
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_bf16_gradients_add_up_in_fp32():
    layer = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    optimizer = Optimizer(dict(layer.named_parameters()), CONFIG, counts_replicas=True)
    for value in [256.0] + [1.0] * 8:  # 256 + 1 = 256 in bf16
        layer(torch.full((1, 1), value, dtype=torch.bfloat16)).sum().backward()
    assert layer.weight.grad is None
    (main,) = optimizer.main.values()
    assert main.grad.dtype == torch.float32 and main.grad.item() == 264.0


def test_bf16_parameters_are_updated_through_their_fp32_main_parameters():
    layer = nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
    optimizer = Optimizer(dict(layer.named_parameters()), CONFIG, counts_replicas=True)
    (main,) = optimizer.main.values()
    layer(torch.ones(2, 4, dtype=torch.bfloat16)).sum().backward()
    optimizer.step(0, 1.0)
    assert torch.equal(layer.weight, main.bfloat16())
    assert not torch.equal(layer.weight.float(), main)


def test_replicas_are_counted_by_one_rank_only():
    parts = []
    for counts in (True, False):
        layer = nn.Linear(2, 2)
        layer.weight.tp_placement = Shard(0)
        optimizer = Optimizer(dict(layer.named_parameters()), CONFIG, counts_replicas=counts)
        layer.weight.grad, layer.bias.grad = torch.full((2, 2), 1.0), torch.full((2,), 3.0)
        parts.append(sum(optimizer.square_norms().values()).item())
    assert parts == [4 * 1.0 + 2 * 9.0, 4 * 1.0]


def test_shards_that_ranks_share_are_counted_once():
    parts = []
    for _ in range(2):
        layer = nn.Linear(2, 2, bias=False)
        layer.weight.tp_placement, layer.weight.tp_replicas = Shard(0), 2
        layer.weight.grad = torch.full((2, 2), 3.0)
        optimizer = Optimizer(dict(layer.named_parameters()), CONFIG, counts_replicas=False)
        parts.append(optimizer.square_norms()["weight"].item())
    assert sum(parts) == 4 * 9.0


def test_what_another_stage_counts_is_updated_and_not_counted():
    layer = nn.Linear(2, 2, bias=False)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.full((2, 2), 3.0)
    two = nn.ModuleDict({"copy": layer, "own": nn.Linear(2, 1, bias=False)})
    two["own"].weight.grad = torch.full((1, 2), 2.0)
    optimizer = Optimizer(dict(two.named_parameters()), CONFIG, counts_replicas=True, counted_elsewhere={"copy.weight"})
    assert {name: square.item() for name, square in optimizer.square_norms().items()} == {"own.weight": 2 * 4.0}
    optimizer.step(0, 1.0)
    assert not torch.equal(layer.weight, before)


def test_learning_rate_warms_up_and_stays():
    assert [learning_rate(CONFIG, s) for s in (0, 1, 3, 4, 99)] == [0.0025, 0.005, 0.01, 0.01, 0.01]
