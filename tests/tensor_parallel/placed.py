"""A mesh of all ranks, small integers, and the part of a tensor that a rank holds: for the tests of styles."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard

WHOLE = Replicate()


def tp() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))


def integers(*shape: int, seed: int) -> Tensor:
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).to(torch.float64)


def part(x: Tensor, layout: Placement, mesh: DeviceMesh) -> Tensor:
    return x.chunk(mesh.size(), layout.dim)[mesh.get_local_rank()] if isinstance(layout, Shard) else x
