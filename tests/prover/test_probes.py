"""Modules of any shape: several calls, results in tuples and dicts, keyword arguments, writes in place, recompute."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tpmp_kernels import verify
from tpmp_kernels.prover.probes import Probes
from tpmp_kernels.prover.sites import Site


class Split(nn.Module):
    """A tuple with a dict in it, and nothing."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, *, scale: Tensor, count: int = 1):
        return self.left(x) * scale, {"right": self.right(x) + count, "none": None}


class Complex(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.complex(x, -x)


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.twice, self.split, self.recomputed = nn.Linear(6, 6), Split(), nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.scale = nn.Parameter(torch.ones(6))  # of the root itself
        self.frozen = nn.Parameter(torch.ones(6), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("mask", torch.tensor([True, False] * 3))
        self.register_buffer("angles", torch.ones(6, dtype=torch.complex64))
        self.tokens = nn.Embedding(4, 6)
        self.never, self.complex = nn.Linear(6, 6), Complex()
        self.loss, self.out = nn.Linear(6, 6), nn.Parameter(torch.ones(6))  # names that mean something here

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu_(self.twice(x))
        once, y = y, self.twice(y)
        y += once
        left, rest = self.split(y, scale=self.scale, count=2)
        right = checkpoint(self.recomputed, rest["right"], use_reentrant=False)
        chosen = self.tokens(torch.arange(len(x)) % 4).unsqueeze(1)
        left = self.loss(left) * self.out + self.complex(left).imag
        return (left + right + chosen * self.frozen).masked_fill(self.mask, 0.5) * self.angles.real


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 6, generator=generator), torch.randn(4, 3, 6, generator=generator)


def as_it_is(module: nn.Module, comm) -> nn.Module:
    return module


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_odd_module_equals_itself(ranks, dtype):
    report = verify(Odd, data(), as_it_is, tp=1, microbatches=2, dtype=dtype, pool=ranks(1))
    assert report.equal, report


class _Seen:
    def __init__(self):
        self.sites: dict[Site, Tensor] = {}

    def seen(self, site: Site, x: Tensor) -> None:
        assert site not in self.sites
        self.sites[site] = x.detach().clone()


def test_every_tensor_is_seen_once_and_the_gradients_stay():
    x, module = data()[0], Odd()
    module(x.clone().requires_grad_()).sum().backward()
    grads = {name: p.grad for name, p in module.named_parameters()}
    module.zero_grad(set_to_none=True)

    observer = _Seen()
    Probes(observer, gradients=True).attach(module)
    module(x.clone().requires_grad_()).sum().backward()
    assert all(g is p.grad or torch.equal(g, p.grad) for g, p in zip(grads.values(), module.parameters(), strict=True))

    forward = {(s.module, s.call, s.slot) for s in observer.sites if s.pass_ == "forward"}
    assert forward >= {
        ("", 0, "in.0"), ("", 0, "out"), ("twice", 0, "in.0"), ("twice", 1, "out"), ("split", 0, "in.scale"),
        ("split", 0, "out.0"), ("split", 0, "out.1.right"), ("recomputed.0", 0, "out"), ("tokens", 0, "in.0"),
    }  # fmt: skip
    assert not any(call > 1 or name == "never" for name, call, _ in forward)
    backward = {(s.module, s.call, s.slot) for s in observer.sites if s.pass_ == "backward"}
    assert backward == forward - {("tokens", 0, "in.0")}
    # Of the module's own edge: what the sum beside it adds to the gradient of its input is not in it.
    edge = observer.sites[Site("backward", 0, "twice", 1, "in.0")]
    upstream = observer.sites[Site("backward", 0, "twice", 1, "out")]
    torch.testing.assert_close(edge, upstream @ module.twice.weight)
