"""Weights from one seed: the same whole weights for every tp and pp, of which each rank draws its shard alone."""

import hashlib
from functools import lru_cache

import torch
from torch import Tensor, nn

from tpmp_kernels.comm.communicator import Communicator
from tpmp_kernels.tensor_parallel import placement_of, replicas_of
from tpmp_kernels.tensor_parallel.philox import WORD, matrix_words

# The projections that write into the residual stream; their variance is divided by the number of them (GPT-2).
_INTO_RESIDUAL = ("o_proj.weight", "down_proj.weight")
_STREAM = 2**16 - 1  # a microbatch that no DropoutKey has: weights and masks of one seed are independent


@torch.no_grad()
def initialize(
    model: nn.Module, *, seed: int, layers: int, std: float = 0.02, comm: Communicator | None = None
) -> None:
    """Fill every parameter of `model`: norms with ones, biases and padding with zeros, matrices with N(0, std^2).

    An element is a function of (seed, parameter name, row, column) in the whole weight, so that it depends neither on
    tp, pp nor on the order of modules, and no rank draws or holds more than its shard. Drawn in fp32 and then cast, so
    that runs of every dtype start from the same numbers.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        scale = std / (2 * layers) ** 0.5 if name.endswith(_INTO_RESIDUAL) else std
        _draw(parameter, scale, seed, name, comm)


def _draw(parameter: nn.Parameter, scale: float, seed: int, name: str, comm: Communicator | None) -> None:
    placement, shard = placement_of(parameter), 0 if comm is None else comm.rank // replicas_of(parameter)
    (rows, columns), row, column, width = parameter.shape, 0, 0, parameter.shape[1]
    if placement.is_shard(0):
        row = shard * rows
    elif placement.is_shard(1) and comm is not None:
        column, width = shard * columns, comm.size // replicas_of(parameter) * columns
    drawn = max(row, min(row + rows, getattr(parameter, "tp_unpadded", row + rows)))
    digest = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())
    low, high = _tables(parameter.device)
    for first, words in matrix_words(
        seed,
        (_STREAM, digest & WORD, digest >> 32),
        rows=range(row, drawn),
        columns=range(column, column + columns),
        width=width,
        device=parameter.device,
    ):
        normal = low[words & 0xFFFF].add_(high[words >> 16])
        parameter[first - row : first - row + len(words)] = normal.mul_(scale)
    parameter[drawn - row :] = 0.0


@lru_cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Two tables of which a random entry each add up to N(0, 1): 0.8 and 0.6 times the normal quantiles at the middles
    of 2^16 equal strata, scaled to a variance of exactly one. (Of one table twice, every 2^16th sum would be zero.)

    Additions and look-ups are exact everywhere, where log and cos differ by a unit between devices, and on one CPU
    between the body of a tensor and its end: a shard would differ from the whole. Against N(0, 1) the distribution
    function is off by less than 3e-6, and the largest value is 6.1.
    """
    middles = (torch.arange(2**15, dtype=torch.float64) + 0.5) / 2**16
    lower = torch.special.ndtri(middles)
    lower *= lower.square().mean() ** -0.5
    quantiles = torch.cat((lower, -lower.flip(0)))
    return (0.8 * quantiles).float().to(device), (0.6 * quantiles).float().to(device)
