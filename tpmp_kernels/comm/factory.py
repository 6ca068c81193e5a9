"""Which transport a group gets: shm where its ranks prove that they share memory, else torch.distributed."""

import logging

import torch.distributed as dist

from tpmp_kernels import env
from tpmp_kernels.comm.alone import SelfCommunicator
from tpmp_kernels.comm.communicator import Communicator
from tpmp_kernels.comm.meeting import CannotShare, connect
from tpmp_kernels.comm.process_group import ProcessGroupCommunicator
from tpmp_kernels.errors import UsageError

TRANSPORTS = ("shm", "process_group")
_log = logging.getLogger(__name__)


def communicator(
    group: dist.ProcessGroup | None,
    *,
    transport: str | None = None,
    timeout: float = 60.0,
    name: str = "",
) -> Communicator:
    """A communicator over `group`; every rank of the group must call it. `timeout` in seconds bounds each wait.

    None or a group of one rank gives the "self" communicator. `transport` "shm" or "process_group" (else
    TPMP_TRANSPORT) is taken or refused; by default it is shm where every rank of the group proves, by receiving a
    file descriptor, that it shares memory with rank 0, and process_group with one logged line elsewhere. All ranks
    decide the same. Raises UsageError for an unknown, impossible or disputed transport, TransportTimeout naming the
    ranks that did not come.
    """
    transport = transport or env.transport()
    if transport not in (None, *TRANSPORTS):
        raise UsageError(f"communicator: transport is {transport!r}; pass one of {', '.join(TRANSPORTS)} or None")
    if group is None or dist.get_world_size(group) == 1:
        return SelfCommunicator(name=name or "self", timeout=timeout)
    name = name or group.group_desc or group.group_name
    try:
        return connect(group, wish=transport, name=name, timeout=timeout)
    except CannotShare as why:
        if transport == "shm":
            raise UsageError(f"communicator {name!r}: transport shm is impossible: {why}") from None
        if transport is None and dist.get_rank() == 0:
            _log.warning("communicator %r uses torch.distributed (%s): %s", name, group.name(), why)
        return ProcessGroupCommunicator(group, name=name, timeout=timeout)
