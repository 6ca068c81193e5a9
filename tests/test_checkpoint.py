"""Checkpoints: what two pipeline stages of two shards each saved comes back bit for bit, whatever was there before."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.device_mesh import init_device_mesh

from tpmp_kernels import checkpoint
from tpmp_kernels.comm import communicator
from tpmp_kernels.errors import UsageError
from tpmp_kernels.tensor_parallel import ColumnParallelLinear, RowParallelLinear, head_shard, shard_of

HIDDEN, LAYERS, HEADS = 8, 2, 4


def wholes(layer: int, kv_heads: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed * 100 + layer)
    shapes = {"key.weight": (3 * kv_heads, HIDDEN), "out.weight": (HIDDEN, HIDDEN), "norm.weight": (HIDDEN,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def tensors(mesh, kv_heads: int, seed: int) -> dict[str, checkpoint.Placed]:
    """Of this rank's layers, a column layer whose heads ranks may share, a row layer and a norm; of each parameter the
    values, and twice these as what an optimizer has."""
    stage, stages, found = mesh["pp"].get_local_rank(), mesh["pp"].size(), {}
    with communicator(mesh["tp"].get_group(), name="tp") as comm:
        for layer in range(stage * LAYERS // stages, (stage + 1) * LAYERS // stages):
            replicas = head_shard(HEADS, kv_heads, comm).replicas
            key = ColumnParallelLinear(HIDDEN, 3 * kv_heads, comm, replicas=replicas)
            module = nn.ModuleDict(
                {"key": key, "out": RowParallelLinear(HIDDEN, HIDDEN, comm), "norm": nn.RMSNorm(HIDDEN)}
            )
            for name, parameter in module.named_parameters():
                parameter.data.copy_(shard_of(wholes(layer, kv_heads, seed)[name], parameter, comm))
                found[f"model.layers.{layer}.{name}"] = parameter, parameter
                found[f"optimizer.exp_avg.layers.{layer}.{name}"] = 2 * parameter.detach(), parameter
    return found


def pp_by_tp(pp: int, tp: int):
    return init_device_mesh("cpu", (pp, 1, tp), mesh_dim_names=("pp", "dp", "tp"))


def run_save(folder: str, pp: int, tp: int, kv_heads: int, steps: tuple[int, ...]) -> None:
    mesh = pp_by_tp(pp, tp)
    for step in steps:
        checkpoint.save(Path(folder), step, tensors(mesh, kv_heads, seed=step), mesh["tp"])


def run_load(folder: str, pp: int, tp: int, kv_heads: int) -> tuple[int, list[str]]:
    """The step, and the tensors that are not those of that step."""
    mesh = pp_by_tp(pp, tp)
    found = tensors(mesh, kv_heads, seed=0)
    step = checkpoint.load(checkpoint.latest(Path(folder)), found, mesh["tp"])
    saved = tensors(mesh, kv_heads, seed=step)
    return step, [name for name in saved if not torch.equal(found[name][0], saved[name][0])]


def test_the_latest_checkpoint_comes_back_bit_for_bit(ranks, tmp_path):
    ranks(4).run(run_save, str(tmp_path), 2, 2, 2, (5, 10))
    assert ranks(4).run(run_load, str(tmp_path), 2, 2, 2) == [(10, [])] * 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000005", "step-00000010"]


@pytest.mark.parametrize(
    ("saved", "loaded", "kv_heads"),
    [((1, 4), (1, 4), 2), ((1, 4), (1, 2), 2), ((2, 2), (1, 1), 1), ((1, 1), (2, 2), 1)],
)
def test_shards_that_ranks_share_are_saved_once_and_load_at_any_tp_and_pp(ranks, tmp_path, saved, loaded, kv_heads):
    ranks(saved[0] * saved[1]).run(run_save, str(tmp_path), *saved, kv_heads, (3,))
    entries = FileSystemReader(tmp_path / "step-00000003").read_metadata().state_dict_metadata
    for layer in range(LAYERS):
        for name, whole in wholes(layer, kv_heads, seed=3).items():
            for entry in (entries[f"{kind}.layers.{layer}.{name}"] for kind in ("model", "optimizer.exp_avg")):
                assert entry.size == whole.shape
                assert sum(chunk.sizes.numel() for chunk in entry.chunks) == whole.numel()
    assert ranks(loaded[0] * loaded[1]).run(run_load, str(tmp_path), *loaded, kv_heads) == [(3, [])] * (
        loaded[0] * loaded[1]
    )


def test_an_unfinished_save_is_never_taken(tmp_path):
    (tmp_path / "step-00000003").mkdir()
    (tmp_path / "step-00000009.partial").mkdir()
    assert checkpoint.latest(tmp_path).name == "step-00000003"


def test_a_folder_without_checkpoint_is_refused(tmp_path):
    with pytest.raises(UsageError, match="holds no complete checkpoint"):
        checkpoint.latest(tmp_path / "missing")
