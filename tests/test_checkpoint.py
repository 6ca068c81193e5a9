"""Checkpoints: what two pipeline stages of two shards each saved comes back bit for bit, whatever was there before."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard

from tpmp_kernels import checkpoint
from tpmp_kernels.errors import UsageError


def tensors(seed: int) -> dict:
    """A sharded and a replicated tensor of this rank's stage; ranks are (stage, tp)."""
    stage, part = divmod(dist.get_rank(), 2)
    generator = torch.Generator().manual_seed(seed * 100 + stage)
    weight = torch.randn(6, 4, generator=generator)
    norm = torch.randn(4, generator=generator)
    return {
        f"model.layers.{stage}.weight": (weight.chunk(2, dim=1)[part].contiguous(), Shard(1)),
        f"model.layers.{stage}.norm": (norm, Replicate()),
    }


def run_save_and_load(folder: str):
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("pp", "dp", "tp"))
    for step in (5, 10):
        checkpoint.save(Path(folder), step, tensors(seed=step), mesh["tp"])
    found = tensors(seed=0)
    step = checkpoint.load(checkpoint.latest(Path(folder)), found, mesh["tp"])
    saved = tensors(seed=10)
    return step, all(torch.equal(found[name][0], saved[name][0]) for name in saved)


def test_the_latest_checkpoint_comes_back_bit_for_bit(ranks, tmp_path):
    assert ranks(4).run(run_save_and_load, str(tmp_path)) == [(10, True)] * 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000005", "step-00000010"]


def test_an_unfinished_save_is_never_taken(tmp_path):
    (tmp_path / "step-00000003").mkdir()
    (tmp_path / "step-00000009.partial").mkdir()
    assert checkpoint.latest(tmp_path).name == "step-00000003"


def test_a_folder_without_checkpoint_is_refused(tmp_path):
    with pytest.raises(UsageError, match="holds no complete checkpoint"):
        checkpoint.latest(tmp_path / "missing")
