"""What PyTorch builds on torch.distributed, each in a small model: run(group) returns what the ranks computed.

The functions take the name of a backend, make groups of it and know nothing else of what carries the bytes.
"""

import copy
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

STEPS = 2


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


def batch(rank: int = 0) -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(100 + rank))


def mesh_of(backend: str) -> DeviceMesh:
    """DTensor takes meshes of one shape and one name for the same, groups and all: each gets a name of its own."""
    group = dist.new_group(backend=backend)
    return DeviceMesh.from_group(group, "cpu", mesh_dim_names=(f"{backend}{group.group_name}",))


def trained(model: nn.Module, inputs: torch.Tensor) -> list[torch.Tensor]:
    """The losses and the parameters after some steps, whole."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(STEPS):
        loss = model(inputs).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(whole(loss))
    return losses + [whole(parameter) for parameter in model.parameters()]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def tensor_parallel(backend: str) -> list[torch.Tensor]:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = parallelize_module(mlp(), mesh_of(backend), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return trained(model, batch())


def sequence_parallel(backend: str) -> list[torch.Tensor]:
    """Gathers the sequence before the first layer and scatters the reduction after the last."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {"0": ColwiseParallel(input_layouts=Shard(0)), "2": RowwiseParallel(output_layouts=Shard(0))}
    model = parallelize_module(mlp(), mesh_of(backend), plan)
    rank, size = dist.get_rank(), dist.get_world_size()
    return trained(model, batch().chunk(size)[rank])[STEPS:]


def ddp(backend: str) -> list[torch.Tensor]:
    model = nn.parallel.DistributedDataParallel(
        mlp(), process_group=dist.new_group(backend=backend), bucket_cap_mb=0.0005, gradient_as_bucket_view=True
    )
    return trained(model, batch(dist.get_rank()))


def fsdp(backend: str) -> list[torch.Tensor]:
    from torch.distributed.fsdp import fully_shard

    model, mesh = mlp(), mesh_of(backend)
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    return trained(model, batch(dist.get_rank()))


def functional(backend: str) -> list[torch.Tensor]:
    from torch.distributed import _functional_collectives as ops

    group, rank, size = dist.new_group(backend=backend), dist.get_rank(), dist.get_world_size()
    x = batch(rank)
    counts = [1 + (rank + d) % 2 for d in range(size)]
    rows = torch.cat([x, x])[: sum(counts)]
    out = [
        ops.all_reduce(x, "sum", group),
        ops.all_reduce(x, "avg", group),
        ops.all_gather_tensor(x, 0, group),
        ops.all_gather_tensor(x, 1, group),
        ops.reduce_scatter_tensor(x, "sum", 0, group),
        ops.all_to_all_single(rows, counts, counts, group),
        ops.broadcast(x, 1, group),
        *ops.all_reduce_coalesced([x, x * 2], "sum", group),
        *ops.all_gather_into_tensor_coalesced([x, x * 2], group),
        *ops.reduce_scatter_tensor_coalesced([x, x * 2], "sum", [0, 0], group),
    ]
    leaf = x.clone().requires_grad_()
    y = ops.all_gather_tensor_autograd(leaf * 2, 0, group)
    y = ops.reduce_scatter_tensor_autograd(y * (1 + rank), "sum", 0, group)
    y = ops.all_to_all_single_autograd(y, None, None, group)
    (y * x).sum().backward()
    return [ops.wait_tensor(tensor).clone() for tensor in (*out, y.detach(), leaf.grad)]


def compiled(backend: str) -> list[torch.Tensor]:
    """A graph with collectives inside, traced by dynamo and run as it is."""
    from torch.distributed import _functional_collectives as ops

    group = dist.new_group(backend=backend)

    def step(x):
        y = ops.all_reduce(x * 2, "sum", group)
        return ops.reduce_scatter_tensor(ops.all_gather_tensor(y.relu(), 0, group), "sum", 0, group) + 1

    x = batch(dist.get_rank())
    return [step(x), torch.compile(step, backend="aot_eager", fullgraph=True)(x)]


def checkpoint(backend: str, directory: str) -> list[torch.Tensor]:
    """DCP: saved from a sharded model, loaded into one of other values."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.fsdp import fully_shard

    mesh = mesh_of(backend)
    saved, loaded = mlp(), mlp()
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    for model in (saved, loaded):
        fully_shard(model, mesh=mesh)
    where = {"checkpoint_id": directory, "process_group": mesh.get_group()}
    dcp.save({"model": saved.state_dict()}, **where)
    state = {"model": loaded.state_dict()}
    dcp.load(state, **where)
    return [whole(tensor) for tensor in state["model"].values()]


def pipelined(backend: str, schedule: str) -> list[torch.Tensor]:
    """Two stages; the loss on the last, the gradients of each."""
    from torch.distributed import pipelining

    group = dist.new_group(backend=backend, timeout=timedelta(seconds=20))
    model, rank = mlp(), dist.get_rank()
    part = copy.deepcopy(model[:2] if rank == 0 else model[2:])
    stage = pipelining.PipelineStage(part, rank, 2, torch.device("cpu"), group=group)
    runner = getattr(pipelining, schedule)(
        stage, n_microbatches=4, loss_fn=lambda out, want: (out - want).square().sum()
    )
    if rank == 0:
        runner.step(batch())
        return [parameter.grad for parameter in part.parameters()]
    losses: list[torch.Tensor] = []
    runner.step(target=batch(1), losses=losses)
    return [*(loss.detach() for loss in losses), *(parameter.grad for parameter in part.parameters())]
