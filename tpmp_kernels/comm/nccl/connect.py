"""How the ranks of a group come together on NCCL, or agree that they cannot."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from tpmp_kernels.comm._ext import C
from tpmp_kernels.comm.communicator import Communicator
from tpmp_kernels.comm.meeting import CannotShare, Meeting, agree, meeting_place, refuse_any
from tpmp_kernels.comm.nccl import library
from tpmp_kernels.comm.nccl.communicator import NcclCommunicator
from tpmp_kernels.comm.nccl.device import Cuda, Device
from tpmp_kernels.errors import TransportError


def connect(
    group: dist.ProcessGroup,
    host: Callable[[], Communicator | None],
    *,
    name: str,
    timeout: float,
    max_ctas: int = 0,
    device: Device | None = None,
) -> NcclCommunicator:
    """The nccl communicator of `group`, or CannotShare with the same reason on every rank.

    `host()`, collective over the group, makes the communicator that carries CPU tensors. `max_ctas`: multiprocessors
    that a call may take, 0 for NCCL's own choice. `device`: torch's current CUDA device by default.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    meeting = Meeting(meeting_place(group), rank, size, name, timeout)
    obstacle, release = _obstacle(device)
    refuse_any(agree(meeting, "nccl", obstacle))
    told = meeting.exchange("release", release)
    if len(set(told)) > 1:  # they would wait for each other in the handshake
        versions = ", ".join(f"rank {other} has {text}" for other, text in enumerate(told))
        raise CannotShare(f"the ranks load different versions of NCCL: {versions}")
    ids = meeting.exchange("id", C.nccl_unique_id().hex() if rank == 0 else "")
    core = C.NcclTransport(bytes.fromhex(ids[0]), rank, size, timeout, max_ctas)
    return NcclCommunicator(group, core, device or Cuda(), host(), name=name, timeout=timeout)


def _obstacle(device: Device | None) -> tuple[str, str]:
    """Why this rank cannot use NCCL ("" where it can), and the version that it loads."""
    try:
        found = library.load()
    except TransportError as error:
        return str(error), ""
    if device is None and not torch.cuda.is_available():
        return "torch finds no CUDA device", found.release
    return "", found.release
