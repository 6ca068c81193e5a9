"""What each layer of a decoder takes on this device: a short profile of the real modules, for `partition`."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from tpmp_kernels.comm import SelfCommunicator
from tpmp_kernels.models.config import ModelConfig
from tpmp_kernels.models.decoder import Decoder
from tpmp_kernels.models.layer_costs import Microbatch, layer_costs
from tpmp_kernels.models.weights import initialize
from tpmp_kernels.pipeline.partition import LayerCost


def measured_layer_costs(
    config: ModelConfig, seen: Microbatch, *, device: str = "cpu", repetitions: int = 5
) -> list[LayerCost]:
    """`layer_costs` with times in milliseconds, the median of `repetitions` behind one for warming up.

    One of the layers stands for all, which have the same shapes. F is a forward; B the gradient with respect to the
    input, of a forward whose parameters are frozen; W what a whole backward takes longer. Modules are whole, on one
    rank without collectives: where `seen` has tp above 1, times are those of all tp shards together, one after the
    other, and what the layers are to each other is what counts.
    """
    three = replace(config, layers=3)  # of which each of these parts is one layer alone
    first, layer, last = (
        _times(_part(three, layers, seen, device), three, seen, repetitions)
        for layers in (range(0), range(1, 2), range(3, 3))
    )
    costs = layer_costs(config, seen)
    times = [first, *[layer] * config.layers, last]
    return [replace(cost, **each) for cost, each in zip(costs, times, strict=True)]


def _part(config: ModelConfig, layers: range, seen: Microbatch, device: str) -> Decoder:
    dtype = getattr(torch, seen.dtype)
    part = Decoder(config, SelfCommunicator(), layers, sequence=seen.sequence, dtype=dtype, device=device)
    initialize(part, seed=0, layers=config.layers)
    return part


def _times(part: Decoder, config: ModelConfig, seen: Microbatch, repetitions: int) -> dict[str, float]:
    """F, B and W in milliseconds. Whole backwards and those of the input take turns."""
    weight, shape = next(part.parameters()), (seen.batch, seen.sequence)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, shape, generator=generator).to(weight.device)
    x = torch.randn(*shape, config.hidden, generator=generator).to(weight).requires_grad_()

    def forward() -> Tensor:
        output = part(tokens if part.first else x, step=0, microbatch=0)
        return part.loss(output, tokens) if part.last else output

    samples: dict[str, list[float]] = {"F": [], "B": [], "BW": []}
    for _ in range(1 + repetitions):
        took, output = _timed(forward, weight.device)
        samples["F"].append(took)
        grad = torch.ones_like(output)
        inputs = [*part.parameters()] if part.first else [x, *part.parameters()]
        samples["BW"].append(_timed(partial(torch.autograd.grad, output, inputs, grad), weight.device)[0])
        if part.first:  # tokens have no gradient
            samples["B"].append(0.0)
            continue
        with _frozen(part):
            samples["B"].append(_timed(partial(torch.autograd.grad, forward(), x, grad), weight.device)[0])
    median = {name: 1e3 * statistics.median(each[1:]) for name, each in samples.items()}
    return {"F": median["F"], "B": median["B"], "W": max(0.0, median["BW"] - median["B"])}


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


def _timed(call: Callable[[], object], device: torch.device) -> tuple[float, object]:
    """(seconds, what it returned)."""
    _wait(device)
    begin = time.perf_counter()
    result = call()
    _wait(device)
    return time.perf_counter() - begin, result


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
