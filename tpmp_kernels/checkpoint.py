"""Checkpoints on torch.distributed.checkpoint, every tensor stated as the DTensor of which a rank holds its part.

<folder>/step-00000160/     complete: written under another name, then renamed
<folder>/step-00000160.partial/    a save that did not finish; the next save of that step replaces it
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from tpmp_kernels.errors import UsageError
from tpmp_kernels.tensor_parallel.state_dict import as_dtensor

# This rank's tensor, and the parameter that it is or belongs to, whose marks say which part of the whole it is.
Placed = tuple[Tensor, Tensor]


def save(folder: Path, step: int, tensors: Mapping[str, Placed], tp_mesh: DeviceMesh) -> Path:
    """Write the tensors of every rank as step `step`, and return the checkpoint's path. Collective over all ranks.

    tensors: by global name; a name may stand on the ranks of one pipeline stage only. What ranks share is written once,
    and every shape is that of the whole: another tp or pp can load it.
    """
    path = folder / f"step-{step:08d}"
    partial = path.with_suffix(".partial")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    dcp.save(_as_dtensors(tensors, tp_mesh), checkpoint_id=partial)
    if dist.get_rank() == 0:
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
    dist.barrier()
    return path


def load(path: Path, tensors: Mapping[str, Placed], tp_mesh: DeviceMesh) -> int:
    """Read a checkpoint into `tensors`, in place, and return its step. Collective over all ranks."""
    dcp.load(_as_dtensors(tensors, tp_mesh), checkpoint_id=path)
    return _step_of(path)


def latest(folder: Path) -> Path:
    """The newest complete checkpoint under `folder`. UsageError where there is none."""
    complete = [p for p in folder.glob("step-*") if _step_of(p) is not None] if folder.is_dir() else []
    if not complete:
        raise UsageError(f"{folder} holds no complete checkpoint (step-NNNNNNNN); name a run that saved one")
    return max(complete, key=_step_of)


def _step_of(path: Path) -> int | None:
    match = re.fullmatch(r"step-(\d+)", path.name)
    return int(match[1]) if match else None


def _as_dtensors(tensors: Mapping[str, Placed], tp_mesh: DeviceMesh) -> dict[str, DTensor]:
    return {name: as_dtensor(tensor, parameter, tp_mesh) for name, (tensor, parameter) in tensors.items()}
