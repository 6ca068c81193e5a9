"""Shard a module of one's own by a plan: the stock layers that it names become tensor-parallel ones, in place."""

from collections import defaultdict

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate

from tpmp_kernels.comm import Communicator
from tpmp_kernels.tensor_parallel.layouts import Group
from tpmp_kernels.tensor_parallel.meshes import communicator_of, tp_mesh
from tpmp_kernels.tensor_parallel.plans import Plan, resolve
from tpmp_kernels.tensor_parallel.styled import SharedCopy, StyledColumn
from tpmp_kernels.tensor_parallel.styles import Style

Matches = list[tuple[str, nn.Module, Style]]


def parallelize(
    module: nn.Module,
    mesh: DeviceMesh | Communicator,
    plan: Plan,
    *,
    src_data_rank: int | None = 0,
    defer_partial_gradients: bool = False,
) -> nn.Module:
    """Shard `module` in place, over the "tp" dimension of `mesh`, and return it. Collective.

    plan: {pattern: style} or [(pattern, style)]: see plans.py. Names, and so the keys of state_dict, stay. Column
    layers of one parent that are called on the same tensor reduce its gradient once, behind their weights' gradients.

    src_data_rank: the rank of the tensor-parallel group whose parameters and buffers, those that the plan does not name
    among them, all others take; None where all ranks hold the same already. defer_partial_gradients: gradients of norms
    and biases on shards of the sequence, and of shared key and value heads, are left for `reduce_partial_gradients`,
    once a step; else every backward adds them.

    ValueError or TypeError, and nothing is changed, for a pattern that matches nothing, a module matched by two styles,
    a size that the ranks do not divide, a style that does not fit its module, tied weights that are cut differently.
    """
    matches = resolve(module, plan)
    has_mesh = isinstance(mesh, DeviceMesh)
    mesh = tp_mesh(mesh) if has_mesh else mesh
    ranks = mesh.size() if has_mesh else mesh.size
    for name, each, style in matches:
        style.check(name, each, ranks, has_mesh=has_mesh)
    _check_ties(module, matches)

    comm = communicator_of(mesh)
    group = Group(comm, mesh if has_mesh else None)
    if src_data_rank is not None:
        _take_from(src_data_rank, module, matches, comm)
    for name, each, style in matches:
        style.src_data_rank = src_data_rank
        style.install(name, each, group, defers=defer_partial_gradients)
    _share_copies(module, comm)
    return module


def _check_ties(module: nn.Module, matches: Matches) -> None:
    """ValueError where a parameter stands in several modules and is not cut alike in all of them."""
    cuts = {
        (id(each), key): placement for _, each, style in matches for key, placement in style.placements(each).items()
    }
    holders = defaultdict(list)
    for name, each in module.named_modules():
        for key, parameter in each.named_parameters(recurse=False):
            holders[id(parameter)].append((f"{name}.{key}", cuts.get((id(each), key), Replicate())))
    for tied in holders.values():
        if len({placement for _, placement in tied}) > 1:
            cut = ", ".join(f"{name} as {placement}" for name, placement in tied)
            raise ValueError(
                f"plan: one parameter stands in several modules and is cut differently: {cut}; cut it alike"
            )


def _take_from(source: int, module: nn.Module, matches: Matches, comm: Communicator) -> None:
    """Give every tensor of the module that no style cuts the values of rank `source`."""
    cut = {id(p) for _, each, style in matches if style.placements(each) for p in each.parameters(recurse=False)}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if id(tensor) not in cut and not tensor.is_meta and comm.size > 1:
            # As bytes: a transport need not know the dtypes of buffers, bool and complex among them.
            raw = tensor.detach().contiguous().reshape(-1)
            comm.broadcast(raw.view(torch.uint8), source, tag=name)
            tensor.detach().copy_(raw.view(tensor.shape))


def _share_copies(module: nn.Module, comm: Communicator) -> None:
    siblings = defaultdict(list)
    for name, each in module.named_modules():
        if isinstance(each, StyledColumn) and each.comm is comm and each.source.is_replicate():
            siblings[name.rpartition(".")[0]].append(each)
    for parent, layers in siblings.items():
        if len(layers) > 1 and all(layer.shares is None for layer in layers):
            shared = SharedCopy(module.get_submodule(parent), parent, layers, comm)
            for layer in layers:
                layer.shares = shared
