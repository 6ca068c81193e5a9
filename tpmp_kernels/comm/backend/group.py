"""TpmpGroup: the ProcessGroup of the backend "tpmp": its life, and how a call goes; calls.py has the calls.

A call with `asyncOp` false is carried out inline and returns COMPLETED; others are posted. Tags and shapes are as
strict as the communicator's: a receive takes the next message of its source, whose tag must be its own.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from tpmp_kernels.comm.backend.calls import BackendCalls
from tpmp_kernels.comm.backend.work import COMPLETED, Finisher, PostedWork, WorkPart
from tpmp_kernels.comm.communicator import Communicator


class TpmpGroup(BackendCalls):
    """`comm` carries CPU tensors; `backends` are torch's own for (device, backend type). They are registered here
    too, for the few calls that torch's C++ code makes past a Python group (gloo then carries them)."""

    def __init__(
        self,
        store: dist.Store,
        comm: Communicator,
        backends: Sequence[tuple[torch.device, dist.ProcessGroup.BackendType, object]],
        split: Callable[..., "TpmpGroup"],
    ):
        super().__init__(comm.rank, comm.size)  # the one constructor that torch gives to subclasses
        self.comm = comm
        self._store, self._make_split, self._splits = store, split, 0
        self._beside = dist.ProcessGroup(store, comm.rank, comm.size)
        for group in (self, self._beside):
            group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
            for device, kind, backend in backends:
                group._register_backend(device, kind, backend)
        self._batch: list[PostedWork] | None = None  # those since _start_coalescing
        self._finishers: dict[tuple[str, int], Finisher] = {}

    # ---- names, life

    def getBackendName(self) -> str:
        return "tpmp"

    @property
    def pg_name(self) -> str:
        return dist.distributed_c10d._world.pg_names[self]

    def get_group_store(self) -> dist.Store:
        return self._store

    def set_timeout(self, timeout: timedelta) -> None:
        self.comm.timeout = timeout.total_seconds()
        self._beside.set_timeout(timeout)

    def abort(self) -> None:
        self.comm.abort("torch.distributed aborted the group")
        self._leave()
        self._beside.abort()

    def shutdown(self) -> None:
        self._leave()
        self._beside.shutdown()

    def _leave(self) -> None:
        self.comm.close()
        while self._finishers:
            self._finishers.popitem()[1].close()

    def split_group(
        self, ranks, timeout=None, opts=None, group_name=None, group_desc=None, device_types=None
    ) -> "TpmpGroup | None":
        """A group of `ranks` of this group, of which every one calls it; None on the others."""
        self._splits += 1
        if self.rank() not in ranks:
            return None
        name = group_name or f"{self.group_name}:split:{self._splits}:{'_'.join(map(str, ranks))}"
        seconds = self.comm.timeout if timeout is None else timeout.total_seconds()
        store = dist.PrefixStore(f"{name}/", self._store)
        group = self._make_split(store, ranks.index(self.rank()), len(ranks), name, timedelta(seconds=seconds))
        group._set_group_name(name)
        group._set_group_desc(group_desc or f"{self.group_desc}:split:{self._splits}")
        return group

    # ---- coalescing

    def _start_coalescing(self, device: torch.device) -> None:
        """Collect the works up to _end_coalescing under one. Each call goes as it would alone: what is posted anyway
        gains nothing from being held back, and a block that an exception leaves holds nothing back for ever."""
        if device.type != "cpu":
            self._beside._start_coalescing(device)
        else:
            self._batch = []

    def _end_coalescing(self, device: torch.device):
        if device.type != "cpu":
            return self._beside._end_coalescing(device)
        batch, self._batch = self._batch, None
        tensors = [tensor for work in batch for tensor in work.result()]
        return self._posted([WorkPart(work) for work in batch], tensors, lane=("batch", 0))

    # ---- how a call goes

    def _carry(self, opts, tensors, call, *args, landed=None):
        """`call(*args)`, posted or inline; `tensors` are what torch's user knows, `landed` completes them."""
        if opts.asyncOp:
            return self._posted([call(*args, async_op=True)], tensors, landed)
        call(*args)
        if landed is not None:
            landed()
        return COMPLETED

    def _carry_all(self, opts, tensors, call, calls, landed=None):
        """One `call` for each of `calls` under one Work."""
        if opts.asyncOp:
            return self._posted([call(*args, async_op=True) for args in calls], tensors, landed)
        for args in calls:
            call(*args)
        if landed is not None:
            landed()
        return COMPLETED

    def _posted(self, posted, tensors, landed=None, lane=("collective", 0), source=None):
        work = PostedWork(posted, tensors, lambda: self._finisher(lane), landed, source)
        if self._batch is not None:
            self._batch.append(work)
        return work

    def _finisher(self, lane: tuple[str, int]) -> Finisher:
        """The works of a lane complete in order; a receive may outlast any number of collectives."""
        if lane not in self._finishers:
            self._finishers[lane] = Finisher()
        return self._finishers[lane]
