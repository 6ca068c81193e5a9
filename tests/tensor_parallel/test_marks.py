"""A parameter's marks stay with it where torch makes another of it, and copies of layers stand among the same ranks."""

import copy

import pytest
import torch
import torch.distributed as dist
from tiny_llama import PLAN, SEQUENCE_PLAN, Llama, far, loss_of, tokens, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from tpmp_kernels.comm import SelfCommunicator
from tpmp_kernels.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
    communicator_of,
    parallelize,
    shard_of,
)


def model(**how) -> nn.ModuleDict:
    comm = SelfCommunicator()
    comm.rank, comm.size = 1, 4
    table = VocabParallelEmbedding(41, 8, comm, **how)
    return nn.ModuleDict(
        {
            "table": table,
            "key": ColumnParallelLinear(8, 6, comm, bias=True, replicas=2, **how),
            "out": RowParallelLinear(8, 8, comm, bias=True, sequence_parallel=True, **how),
            "head": VocabParallelHead(8, 41, comm, weight=table.weight),
            "other": VocabParallelHead(8, 41, comm, **how),
        }
    )


def marks(module: nn.Module) -> dict:
    found = {name: vars(p) for name, p in module.named_parameters(remove_duplicate=False)}
    return {name: {key: v for key, v in of.items() if key.startswith("tp_")} for name, of in found.items()}


def assigned() -> nn.Module:
    into = model(device="meta")
    into.load_state_dict(model().state_dict(), assign=True)
    return into


MADE = {
    "deepcopy": lambda: copy.deepcopy(model()),
    "to_empty": lambda: model(device="meta").to_empty(device="cpu"),
    "to": lambda: model().to(torch.bfloat16),
    "assign": assigned,
}


@pytest.mark.parametrize("made", MADE)
def test_layers_keep_their_marks(made):
    module, expected = MADE[made](), marks(model())
    assert marks(module) == expected and not any(p.is_meta for p in module.parameters())
    assert expected["key.bias"].keys() == {"tp_placement", "tp_replicas", "tp_partial_grad"}
    assert expected["out.bias"] == {"tp_partial_grad": 4} and expected["other.weight"]["tp_unpadded"] == 41


def test_a_copy_has_parameters_of_its_own_and_the_same_ranks():
    first = model()
    first["key"].register_forward_hook(print)
    second = copy.deepcopy(first)
    assert {p.data_ptr() for p in first.parameters()}.isdisjoint(p.data_ptr() for p in second.parameters())
    assert second["head"].weight is second["table"].weight
    assert all(second[name].comm is first[name].comm for name in first)
    assert list(second["key"]._forward_hooks.values()) == [print] and not second["out"]._forward_hooks


def run_copied(plan: dict, on: str) -> float:
    """The worst gradient of a copy of a sharded model, of which the original then knows nothing."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    comm = communicator_of(mesh)
    first = parallelize(Llama(bias=True), mesh if on == "mesh" else comm, plan)
    second = copy.deepcopy(first)
    loss_of(second(tokens())).backward()
    assert all(p.grad is None for p in first.parameters())
    grads = whole(bias=True)[1]
    return max(far(p.grad, shard_of(grads[name], p, comm)) for name, p in second.named_parameters())


@pytest.mark.parametrize(("plan", "on"), [(PLAN, "communicator"), (SEQUENCE_PLAN, "mesh")], ids=["whole", "sequence"])
def test_a_copy_of_a_sharded_model_works_like_it(ranks, plan, on):
    assert max(ranks(2).run(run_copied, plan, on)) < 256
