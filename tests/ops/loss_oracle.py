"""The losses by their definition, in fp64 and on whole rows, and what the tests of the losses measure against it.

A form is "logits" (ops.cross_entropy), "recompute" or "in forward" (ops.linear_cross_entropy without and with
grad_scale); its inputs are [logits] or [x, weight], its results the loss and the gradient of each input.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from tpmp_kernels import ops
from tpmp_kernels.ops import vocab, vocab_products, vocab_slices

FORMS = ["logits", "recompute", "in forward"]
OF_FEATURES = FORMS[1:]


def of_logits(
    logits: Tensor,
    target: Tensor,
    upstream: Tensor | float,
    *,
    vocab_size: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> list[Tensor]:
    """[loss, dlogits] for the gradient `upstream` of the loss; columns from vocab_size on have no part in either."""
    logits = logits.detach().double().requires_grad_()
    z = logits[..., :vocab_size]
    z = z if softcap is None else softcap * (z / softcap).tanh()
    valid = target != ignore_index
    share = torch.full_like(z, label_smoothing / z.shape[-1])
    truth = torch.full_like(share[..., :1], 1 - label_smoothing)
    share = share.scatter_add(-1, target.where(valid, 0).unsqueeze(-1), truth)
    lse = z.logsumexp(-1)
    each = (share * (lse.unsqueeze(-1) - z)).sum(-1) + z_loss * lse**2
    each = each.where(valid, 0)
    loss = {"none": each, "sum": each.sum(), "mean": each.sum() / valid.sum()}[reduction]
    return [loss.detach(), torch.autograd.grad(loss, logits, _spread(upstream, loss))[0]]


def exact(form: str, inputs: list[Tensor], target: Tensor, upstream: Tensor | float, **options) -> list[Tensor]:
    if form == "logits":
        return of_logits(*inputs, target, upstream, **options)
    x, weight = (t.detach().double() for t in inputs)
    loss, d = of_logits(x @ weight.t(), target, upstream, **options)
    return [loss, d @ weight, d.flatten(0, -2).t() @ x.flatten(0, -2) if d.dim() > 1 else d.outer(x)]


def measured(form: str, inputs: list[Tensor], target: Tensor, upstream: Tensor | float, **options) -> list[Tensor]:
    return _results(call_of(form, upstream), inputs, target, upstream, options)


def of_torch(form: str, inputs: list[Tensor], target: Tensor, upstream: Tensor | float, **options) -> list[Tensor]:
    """F.cross_entropy, of F.linear for features: all in the dtype of the inputs."""

    def loss(*inputs_and_target, softcap=None, **options):
        *inputs, target = inputs_and_target
        z = inputs[0] if form == "logits" else F.linear(*inputs)
        return F.cross_entropy(z if softcap is None else softcap * (z / softcap).tanh(), target, **options)

    return _results(loss, inputs, target, upstream, options)


def call_of(form: str, upstream: Tensor | float = 1.0) -> Callable[..., Tensor]:
    if form == "in forward":
        return partial(ops.linear_cross_entropy, grad_scale=float(upstream))
    return ops.cross_entropy if form == "logits" else ops.linear_cross_entropy


def _results(call: Callable, inputs: list[Tensor], target: Tensor, upstream: Tensor | float, options) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    loss = call(*leaves, target, **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, _spread(upstream, loss))]


def _spread(upstream: Tensor | float, loss: Tensor) -> Tensor:
    return torch.as_tensor(upstream, dtype=loss.dtype, device=loss.device).expand(loss.shape)


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def ids(*shape: int, classes: int) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(5))


def inputs_of(form: str, x: Tensor, weight: Tensor) -> list[Tensor]:
    return [x @ weight.t()] if form == "logits" else [x, weight]


@contextmanager
def small_cuts() -> Iterator[None]:
    """Slices of 4 ids, chunks of 2 tokens, tiles of 3 columns: all that large sizes go through, at small ones."""
    with (
        mock.patch.object(vocab_products, "_SLICES", dict.fromkeys(("cpu", "cuda"), (1, 4, 4))),
        mock.patch.object(vocab_slices, "_LIMITS", dict.fromkeys(("cpu", "cuda"), (2, 2))),
        mock.patch.multiple(vocab, _TILE=3, _WIDEST=3),
    ):
        yield


def assert_exact(got: list[Tensor], expected: list[Tensor], case="") -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13, equal_nan=True, msg=lambda text: f"{case}: {text}")
