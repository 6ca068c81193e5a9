"""The torch.distributed backend "tpmp": how it is registered, how a group is made, and how the process leaves.

    import tpmp_kernels.comm                                  # registers it
    dist.init_process_group("cpu:tpmp,cuda:nccl")             # or "tpmp"; also new_group(backend="tpmp")

CPU tensors go through a communicator over shared memory (group.py). Where the ranks of a group do not share
memory, which is said in one logged line, or TPMP_TRANSPORT asks for process_group, the group is torch's own gloo.
Where this torch has NCCL and a GPU, CUDA tensors go to NCCL: c10d keeps nothing but the group that this backend
returns, and does not say which others were asked for.
"""

import atexit
import logging
import os
import weakref
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

from tpmp_kernels import env
from tpmp_kernels.comm import meeting
from tpmp_kernels.comm.alone import SelfCommunicator
from tpmp_kernels.comm.backend.group import TpmpGroup
from tpmp_kernels.comm.communicator import Communicator
from tpmp_kernels.errors import UsageError

_log = logging.getLogger(__name__)
_groups: weakref.WeakSet = weakref.WeakSet()


def register() -> None:
    """Make "tpmp" known to torch.distributed; a second call does nothing."""
    if "TPMP" not in dist.Backend._plugins:
        dist.Backend.register_backend("tpmp", _create, extended_api=True, devices=["cpu"])
        atexit.register(_leave_all)
        os.register_at_fork(after_in_child=_groups.clear)  # the groups are the parent's to leave


def _create(options: c10d._DistributedBackendOptions, backend_options):
    name = options.group_id if options.global_ranks_in_group else "default group"
    nccl_options = None
    if dist.is_nccl_available():
        known = isinstance(backend_options, dist.ProcessGroupNCCL.Options)
        nccl_options = backend_options if known else dist.ProcessGroupNCCL.Options()
        nccl_options.global_ranks_in_group = options.global_ranks_in_group
    return _group(options.store, options.group_rank, options.group_size, name, options.timeout, nccl_options)


def _group(store: dist.Store, rank: int, size: int, name: str, timeout: timedelta, nccl_options=None):
    """A TpmpGroup, or the gloo backend where the ranks do not share memory; alike on every rank."""
    # A group may be made anew on the same store under the same name: each rank counts its own arrivals.
    store = dist.PrefixStore(f"tpmp/{store.add(f'tpmp/arrivals/{rank}', 1)}/", store)
    wish = env.transport()
    try:
        comm = _communicator(store, rank, size, wish, name, timeout.total_seconds())
    except meeting.CannotShare as why:
        if wish == "shm":
            raise UsageError(f"tpmp: group {name!r}: transport shm is impossible: {why}") from None
        if rank == 0 and wish is None:
            _log.warning("tpmp: group %r runs on gloo: %s", name, why)
        gloo = dist.ProcessGroupGloo(dist.PrefixStore("gloo/", store), rank, size, timeout=timeout)
        gloo._set_sequence_number_for_group()
        return gloo
    backends = [(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, _gloo(store, rank, size, timeout))]
    if dist.is_nccl_available() and torch.cuda.is_available():
        nccl = _nccl(store, rank, size, name, timeout, nccl_options)
        backends.append((torch.device("cuda"), dist.ProcessGroup.BackendType.NCCL, nccl))
    group = TpmpGroup(store, comm, backends, split=_split)
    _groups.add(group)
    return group


def _split(store: dist.Store, rank: int, size: int, name: str, timeout: timedelta) -> dist.ProcessGroup:
    """The same for TpmpGroup.split_group, which needs a ProcessGroup in either case."""
    made = _group(store, rank, size, name, timeout)
    if isinstance(made, TpmpGroup):
        return made
    group = dist.ProcessGroup(store, rank, size)
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, made)
    return group


def _communicator(store: dist.Store, rank: int, size: int, wish: str | None, name: str, timeout: float) -> Communicator:
    if size == 1:
        return SelfCommunicator(name=name, timeout=timeout)
    return meeting.connect_store(dist.PrefixStore("shm/", store), rank, size, wish=wish, name=name, timeout=timeout)


def _gloo(store: dist.Store, rank: int, size: int, timeout: timedelta):
    """gloo over the loopback, which ranks that share memory have in common, whatever the host's name resolves to."""
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout, options._threads = timeout, 1
    return dist.ProcessGroupGloo(dist.PrefixStore("gloo/", store), rank, size, options)


def _nccl(store: dist.Store, rank: int, size: int, name: str, timeout: timedelta, options):
    options = options or dist.ProcessGroupNCCL.Options()
    options._timeout, options.group_name = timeout, name
    nccl = dist.ProcessGroupNCCL(dist.PrefixStore("nccl/", store), rank, size, options)
    nccl._set_sequence_number_for_group()
    return nccl


def _leave_all() -> None:
    """Leave the groups that were not destroyed while Python still runs.

    A thread of ours that came back for the interpreter's lock after its end would be ended by Python inside C++ frames
    that forbid it, and the process would abort.
    """
    for group in list(_groups):
        group.shutdown()
