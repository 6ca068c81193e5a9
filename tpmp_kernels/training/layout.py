"""Where this rank stands: the device mesh of a run, and the communicators over its groups."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tpmp_kernels.comm import Communicator, communicator
from tpmp_kernels.training.config import Config


@dataclass(frozen=True)
class Layout:
    """mesh: dims pp, dp, tp. tp, pp: this rank's groups of the mesh; world: all ranks."""

    mesh: DeviceMesh
    tp: Communicator
    pp: Communicator
    world: Communicator


@contextmanager
def layout(config: Config, device: str) -> Iterator[Layout]:
    """The mesh and communicators of a run. Collective over all ranks; torch.distributed is initialised."""
    parallel = config.parallel
    mesh = init_device_mesh(device, (parallel.pp, 1, parallel.tp), mesh_dim_names=("pp", "dp", "tp"))
    transport = None if config.training.transport == "auto" else config.training.transport
    groups = {"tp": mesh.get_group("tp"), "pp": mesh.get_group("pp"), "world": dist.group.WORLD}
    with ExitStack() as stack:  # an exception on this rank reaches the others with its text, as each is left
        made = {
            name: stack.enter_context(
                communicator(group, transport=transport, name=name, timeout=config.training.timeout)
            )
            for name, group in groups.items()
        }
        yield Layout(mesh, **made)
