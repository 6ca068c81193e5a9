"""The communicator of a DeviceMesh's tensor-parallel dimension: made once, kept on the mesh, closed with it.

comm = communicator_of(mesh)        # collective the first time; `parallelize` and the styles ask for the same one
close_communicators(mesh)           # or leave it to the mesh: what it keeps goes when it goes
"""

from dataclasses import dataclass, field

from torch.distributed.device_mesh import DeviceMesh

from tpmp_kernels.comm import Communicator, communicator

TP = "tp"


@dataclass
class _Kept:
    """What belongs to a mesh's process groups. Copied or pickled with the mesh (a DTensor holds one) it is empty."""

    communicators: dict[str, Communicator] = field(default_factory=dict)
    unflattened: dict[tuple[str, int], DeviceMesh] = field(default_factory=dict)

    def __reduce__(self):
        return _Kept, ()


def tp_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The tensor-parallel dimension of `mesh`: the one called "tp", or the only one. ValueError where there is none."""
    if mesh.ndim == 1:
        return mesh
    if TP in (mesh.mesh_dim_names or ()):
        return mesh[TP]
    raise ValueError(
        f'the mesh has {mesh.ndim} dimensions, {mesh.mesh_dim_names}, none of them called "tp"; pass one of its '
        'dimensions, or init_device_mesh(..., mesh_dim_names=(..., "tp"))'
    )


def communicator_of(mesh: DeviceMesh | Communicator) -> Communicator:
    """The communicator over the tensor-parallel dimension of `mesh`; a communicator is its own. Collective the first
    time it is asked for. Errors as tpmp_kernels.comm.communicator."""
    if isinstance(mesh, Communicator):
        return mesh
    mesh = tp_mesh(mesh)
    group = mesh.get_group()
    made = _kept(mesh).communicators
    if group.group_name not in made:
        made[group.group_name] = communicator(group)
    return made[group.group_name]


def close_communicators(mesh: DeviceMesh) -> None:
    """Close what `communicator_of` made for `mesh` and for slices of the same whole mesh."""
    made = _kept(mesh).communicators
    while made:
        made.popitem()[1].close()


def replicated_mesh(mesh: DeviceMesh, replicas: int) -> DeviceMesh:
    """A one-dimensional `mesh` as (tp_kv, tp_rep), where each `replicas` neighbours hold the same. Collective, over
    every rank of the whole mesh, the first time. ValueError where the dimension has no name."""
    if not mesh.mesh_dim_names:
        raise ValueError('the mesh has no name for its dimension; pass mesh_dim_names=("tp",) where it is made')
    made, key = _kept(mesh).unflattened, (mesh.get_group().group_name, replicas)
    if key not in made:
        made[key] = mesh._unflatten(0, (mesh.size() // replicas, replicas), ("tp_kv", "tp_rep"))
    return made[key]


def _kept(mesh: DeviceMesh) -> _Kept:
    whole = getattr(mesh, "_root_mesh", None) or mesh
    if not hasattr(whole, "_tpmp_kept"):
        whole._tpmp_kept = _Kept()
    return whole._tpmp_kept
