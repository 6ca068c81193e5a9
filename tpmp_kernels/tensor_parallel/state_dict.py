"""The state of a sharded module as DTensors, or whole, and back: independent of how many ranks held it.

    dcp.save(state_dict(model, mesh), checkpoint_id=folder)     # DTensors; dcp.load fills them, and with them the model
    load_state_dict(model, stock.state_dict(), mesh)            # each rank keeps its part
    whole = state_dict(model, mesh, full=True)                  # plain tensors without padding, for a stock module

The global shape of a DTensor is that of the weight with its padded vocabulary, for every tp. Weights of key and value
heads that neighbouring ranks share lie on the mesh (tp_kv, tp_rep), as [Shard(dim), Replicate()].
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from tpmp_kernels.comm import Communicator
from tpmp_kernels.tensor_parallel.meshes import communicator_of, replicated_mesh, tp_mesh
from tpmp_kernels.tensor_parallel.shard import placement_of, replicas_of


def state_dict(module: nn.Module, mesh: DeviceMesh | Communicator, *, full: bool = False) -> dict[str, Tensor]:
    """{name: tensor} of parameters and persistent buffers, under the names of module.state_dict(). Collective.

    Parameters are DTensors over the "tp" dimension of `mesh`, which share their memory; one that has several names is
    under its first alone. Buffers are plain. full: plain tensors of the whole, without padding, under every name, on
    every rank; there a Communicator will do. ValueError, on all ranks, where their shards do not make up one tensor.
    """
    if full:
        return dict(full_tensors(module, mesh))
    mesh, state, seen = tp_mesh(mesh), {}, set()
    for name, tensor in _tensors(module).items():
        if id(tensor) not in seen:
            state[name] = tensor
            seen.add(id(tensor))
    _check_alike(state, mesh)
    return {name: as_dtensor(t, t, mesh) if isinstance(t, nn.Parameter) else t for name, t in state.items()}


def full_tensors(module: nn.Module, mesh: DeviceMesh | Communicator) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor without padding) of what state_dict holds, one after the other, so that the caller decides
    how many live. Collective at each step. A tensor that no rank cuts is the module's own."""
    comm = communicator_of(mesh)
    made: dict[int, Tensor] = {}
    names = defaultdict(list)
    tensors = _tensors(module)
    for name, tensor in tensors.items():
        names[id(tensor)].append(name)
    for name, tensor in tensors.items():
        whole = made.pop(id(tensor), None)
        if whole is None:
            whole = _gathered(tensor.detach(), tensor, comm, tag=name)
        names[id(tensor)].remove(name)
        if names[id(tensor)]:
            made[id(tensor)] = whole
        yield name, whole


@torch.no_grad()
def load_state_dict(
    module: nn.Module, state: Mapping[str, Tensor], mesh: DeviceMesh | Communicator, *, strict: bool = True
) -> None:
    """Fill `module` from `state`, in place, each rank with its part. Collective where `state` holds DTensors.

    state: whole plain tensors, with or without padding, or DTensors over any mesh of these ranks, of any tp; a tensor
    with several names may be there under one of them. One DTensor at a time is made whole, and none that lies as the
    parameter does. ValueError, and nothing is changed, for names that are missing or too many (unless not `strict`),
    for shapes that do not fit, and for parameters on the device meta.
    """
    tensors = _tensors(module)
    sources = _sources(tensors, state, strict=strict)
    ranks = mesh.size if isinstance(mesh, Communicator) else tp_mesh(mesh).size()
    for name, source in sources.items():
        _check_fits(name, source, tensors[name], ranks)
    for name, source in sources.items():
        _fill(tensors[name], source, mesh)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """What module.state_dict() holds, with the parameters' attributes; extra state that is no tensor is left alone."""
    return {name: t for name, t in module.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}


def _check_alike(state: Mapping[str, Tensor], mesh: DeviceMesh) -> None:
    """ValueError, on every rank the same, unless the ranks' tensors are equal parts of one each."""
    mine = {name: (list(t.shape), t.stride(), str(t.dtype), *_cut(t), t.is_contiguous()) for name, t in state.items()}
    every = [mine] * mesh.size()
    if mesh.size() > 1:
        every = [None] * mesh.size()
        dist.all_gather_object(every, mine, group=mesh.get_group())
    for rank, theirs in enumerate(every):
        if theirs.keys() != every[0].keys():
            odd = min(theirs.keys() ^ every[0].keys())
            holder = rank if odd in theirs else 0
            raise ValueError(f"state_dict: only rank {holder} of 0 and {rank} has {odd!r}; build the same on all ranks")
        for name, (shape, stride, dtype, placement, replicas, contiguous) in theirs.items():
            if (shape, stride, dtype, placement, replicas) != every[0][name][:5]:
                first = _describe(every[0][name])
                raise ValueError(
                    f"state_dict: {name} is {first} on rank 0 and {_describe(theirs[name])} on rank {rank}, which are "
                    "no equal parts of one tensor; build and shard the module alike on all ranks"
                )
            if placement.is_shard() and not contiguous:
                raise ValueError(
                    f"state_dict: {name} on rank {rank} has strides {stride} for {shape}, so that its parts are not in "
                    "the order of the whole; make the parameter contiguous"
                )


def _describe(entry: tuple) -> str:
    shape, stride, dtype, placement, replicas, _ = entry
    shared = f", shared by {replicas}" if replicas > 1 else ""
    return f"{shape} {dtype.removeprefix('torch.')} with strides {list(stride)} as {placement}{shared}"


def _cut(tensor: Tensor) -> tuple[Placement, int]:
    """Where the tensor is cut, and how many neighbouring ranks hold the same part."""
    placement = placement_of(tensor)
    return placement, replicas_of(tensor) if placement.is_shard() else 1


def _whole_shape(tensor: Tensor, ranks: int) -> torch.Size:
    placement, replicas = _cut(tensor)
    shape = list(tensor.shape)
    if isinstance(placement, Shard):
        shape[placement.dim] *= ranks // replicas
    return torch.Size(shape)


def _layout(tensor: Tensor, mesh: DeviceMesh) -> tuple[DeviceMesh, tuple[Placement, ...]]:
    placement, replicas = _cut(tensor)
    return (replicated_mesh(mesh, replicas), (placement, Replicate())) if replicas > 1 else (mesh, (placement,))


def as_dtensor(tensor: Tensor, parameter: Tensor, mesh: DeviceMesh) -> DTensor:
    """`tensor`, of the parameter's shape and cut as it is, as a DTensor that shares its memory; the other ranks' are
    taken to be equal parts. Collective over the whole of which `mesh` is a slice where neighbours share the parameter.
    """
    shape = _whole_shape(parameter, mesh.size())
    strides = tensor.stride()
    if shape != tensor.shape:
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    mesh, placements = _layout(parameter, mesh)
    return DTensor.from_local(tensor.detach(), mesh, placements, run_check=False, shape=shape, stride=strides)


def _gathered(local: Tensor, tensor: Tensor, comm: Communicator, *, tag: str) -> Tensor:
    placement, replicas = _cut(tensor)
    if not isinstance(placement, Shard):
        return local
    if comm.size > 1:
        parts = comm.all_gather(local.new_empty(comm.size, *local.shape), local, tag=tag)[::replicas]
        local = parts.flatten(0, 1) if placement.dim == 0 else torch.cat(parts.unbind(), dim=placement.dim)
    length = getattr(tensor, "tp_unpadded", local.shape[placement.dim])
    return local.narrow(placement.dim, 0, length)


def _sources(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor], *, strict: bool) -> dict[str, Tensor]:
    """Of each tensor of the module, under its first name, what is to fill it."""
    names = defaultdict(list)
    for name, tensor in tensors.items():
        names[id(tensor)].append(name)
    found = {every[0]: next((state[name] for name in every if name in state), None) for every in names.values()}
    missing = [name for name, source in found.items() if source is None]
    unexpected = [name for name in state if name not in tensors]
    for what, wrong in (("has no", missing), ("has what the module has not:", unexpected)):
        if wrong and strict:
            some = ", ".join(wrong[:5]) + (", ..." if len(wrong) > 5 else "")
            raise ValueError(f"load_state_dict: the state {what} {some}; pass the state of this model, or strict=False")
    return {name: source for name, source in found.items() if source is not None}


def _check_fits(name: str, source: Tensor, tensor: Tensor, ranks: int) -> None:
    whole = _whole_shape(tensor, ranks)
    if tensor.is_meta:
        raise ValueError(f"load_state_dict: {name} is on the device meta; allocate it first, by shard or to_empty")
    shape = source.shape
    if isinstance(placement := placement_of(tensor), Shard) and len(shape) == len(whole):
        # Any padding will do, this model's, another's or none: what counts is the real part.
        real = getattr(tensor, "tp_unpadded", whole[placement.dim])
        if real < whole[placement.dim] and shape[placement.dim] >= real:
            shape = torch.Size((*shape[: placement.dim], whole[placement.dim], *shape[placement.dim + 1 :]))
    if shape != whole:
        raise ValueError(
            f"load_state_dict: {name} is {list(source.shape)} in the state and {list(whole)} in the module; pass the "
            "state of a model of the same sizes"
        )


def _fill(tensor: Tensor, source: Tensor, mesh: DeviceMesh | Communicator) -> None:
    target, (placement, replicas) = tensor.detach(), _cut(tensor)
    if isinstance(source, DTensor):
        if isinstance(mesh, DeviceMesh):
            own = _layout(tensor, tp_mesh(mesh))
            shape = _whole_shape(tensor, tp_mesh(mesh).size())
            if (source.device_mesh, tuple(source.placements), source.shape) == (*own, shape):
                target.copy_(source.to_local())
                return
        source = source.full_tensor()
    if not isinstance(placement, Shard):
        target.copy_(source)
        return
    rank = mesh.rank if isinstance(mesh, Communicator) else tp_mesh(mesh).get_local_rank()
    dim, length = placement.dim, target.shape[placement.dim]
    start = rank // replicas * length
    end = min(start + length, getattr(tensor, "tp_unpadded", start + length))
    real = max(0, end - start)
    target.narrow(dim, 0, real).copy_(source.narrow(dim, min(start, source.shape[dim] - real), real))
    target.narrow(dim, real, length - real).zero_()
