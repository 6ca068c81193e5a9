"""Which transport a group gets: nccl where the group is of GPUs, shm where its ranks share memory, else
torch.distributed."""

import logging

import torch
import torch.distributed as dist

from tpmp_kernels import env
from tpmp_kernels.comm import nccl
from tpmp_kernels.comm.alone import SelfCommunicator
from tpmp_kernels.comm.communicator import Communicator
from tpmp_kernels.comm.meeting import CannotShare, connect
from tpmp_kernels.comm.process_group import ProcessGroupCommunicator
from tpmp_kernels.errors import UsageError

TRANSPORTS = ("shm", "process_group", "nccl")
_log = logging.getLogger(__name__)


def communicator(
    group: dist.ProcessGroup | None,
    *,
    transport: str | None = None,
    timeout: float = 60.0,
    name: str = "",
) -> Communicator:
    """A communicator over `group`; every rank of the group must call it. `timeout` in seconds bounds each wait.

    None or a group of one rank gives the "self" communicator. `transport` "nccl", "shm" or "process_group" (else
    TPMP_TRANSPORT) is taken or refused. By default it is nccl where the group's backend for CUDA tensors is nccl, each
    rank finds a device and the library (its CPU tensors go by what comes next); shm where every rank proves, by
    receiving a file descriptor, that it shares memory with rank 0; and process_group with one logged line elsewhere.
    All ranks decide the same. Raises UsageError for an unknown, impossible or disputed transport, TransportTimeout
    naming the ranks that did not come.
    """
    transport = transport or env.transport()
    if transport not in (None, *TRANSPORTS):
        raise UsageError(f"communicator: transport is {transport!r}; pass one of {', '.join(TRANSPORTS)} or None")
    if group is None or dist.get_world_size(group) == 1:
        return SelfCommunicator(name=name or "self", timeout=timeout)
    name = name or group.group_desc or group.group_name
    if transport == "nccl" or (transport is None and _on_gpus(group)):
        try:
            return nccl.connect(group, lambda: _of_hosts(group, None, name, timeout), name=name, timeout=timeout)
        except CannotShare as why:
            _refuse_or_log(group, transport, "nccl", name, why)
            return ProcessGroupCommunicator(group, name=name, timeout=timeout)  # it carries CUDA tensors, too
    return _of_hosts(group, transport, name, timeout)


def _on_gpus(group: dist.ProcessGroup) -> bool:
    return torch.cuda.is_available() and "cuda:nccl" in dist.get_backend_config(group).split(",")


def _of_hosts(group: dist.ProcessGroup, transport: str | None, name: str, timeout: float) -> Communicator:
    """For CPU tensors."""
    try:
        return connect(group, wish=transport, name=name, timeout=timeout)
    except CannotShare as why:
        if transport != "process_group":
            _refuse_or_log(group, transport, "shm", name, why)
        return ProcessGroupCommunicator(group, name=name, timeout=timeout)


def _refuse_or_log(group: dist.ProcessGroup, asked: str | None, transport: str, name: str, why: CannotShare) -> None:
    if asked is not None:
        raise UsageError(f"communicator {name!r}: transport {transport} is impossible: {why}") from None
    if dist.get_rank() == 0:
        _log.warning("communicator %r uses torch.distributed (%s): %s", name, group.name(), why)
