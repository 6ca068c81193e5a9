"""Weights from one seed: the same whole weights for every tp and pp, of which each rank keeps its shard."""

import zlib

import torch
from torch import nn

from tpmp_kernels.comm.communicator import Communicator
from tpmp_kernels.tensor_parallel import placement_of, take_shard

# The projections that write into the residual stream; their variance is divided by the number of them (GPT-2).
_INTO_RESIDUAL = ("o_proj.weight", "down_proj.weight")


@torch.no_grad()
def initialize(
    model: nn.Module, *, seed: int, layers: int, std: float = 0.02, comm: Communicator | None = None
) -> None:
    """Fill every parameter of `model`: norms with ones, matrices with N(0, std^2) drawn per parameter name.

    Each parameter has a generator of its own, seeded by (seed, name), so that its values depend neither on tp, pp nor
    on the order of modules; drawn in fp32 and then cast, so that runs of every dtype start from the same numbers.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        placement = placement_of(parameter)
        shape = list(parameter.shape)
        if placement.is_shard() and comm:
            shape[placement.dim] *= comm.size
        generator = torch.Generator().manual_seed(seed * 2**32 + zlib.crc32(name.encode()))
        scale = std / (2 * layers) ** 0.5 if name.endswith(_INTO_RESIDUAL) else std
        full = torch.empty(shape).normal_(0.0, scale, generator=generator)
        parameter.copy_(take_shard(full, placement, comm) if comm else full)
