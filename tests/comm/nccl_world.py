"""What the tests of the nccl transport share: the double of NCCL and CUDA loaded, ranks as threads, a host as a device.

nccl_double/ has the same ABI on host memory: streams run their work in order on threads of their own, so that a wait
which is missing shows as wrong data. `run` gives each thread a transport of the extension; `connected` is the
communicator of a rank process, whose tensors lie in host memory.
"""

import ctypes
import functools
import os
import threading
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from nccl_double.build import libraries

from tpmp_kernels.comm import nccl
from tpmp_kernels.comm._ext import C
from tpmp_kernels.comm.nccl import library


@functools.cache
def double() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """The double's (libcuda, libnccl), loaded here and by the extension."""
    cuda, nccl_path = libraries()
    os.environ.update(TPMP_CUDA=cuda, TPMP_NCCL=nccl_path, FAKE_NCCL_DIR=str(Path(cuda).with_name("worlds")))
    library.load()
    made = ctypes.CDLL(cuda), ctypes.CDLL(nccl_path)
    made[0].fake_cuda_capture_end.restype = ctypes.c_void_p
    _types(made[0])
    made[0].cuStreamSynchronize(None)  # makes the null stream
    return made


def _types(cuda: ctypes.CDLL) -> None:
    address, word, size = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t
    cuda.cuStreamWaitValue32_v2.argtypes = [address, word, ctypes.c_uint32, ctypes.c_uint]
    cuda.cuMemcpyAsync.argtypes = [word, word, size, address]
    cuda.fake_cuda_capture_begin.argtypes = [address]
    cuda.fake_cuda_capture_end.argtypes = [address, address, ctypes.c_int]
    cuda.fake_cuda_graph_launch.argtypes = [address, address]


def plan(text: str) -> None:
    """Faults of NCCL from here on: see nccl_double/nccl.cpp."""
    double()[1].fake_nccl_plan(text.encode())


def stream() -> int:
    made = ctypes.c_void_p()
    assert double()[0].cuStreamCreateWithPriority(ctypes.byref(made), 1, 0) == 0
    return made.value


def synchronize(address: int) -> None:
    assert double()[0].cuStreamSynchronize(ctypes.c_void_p(address)) == 0


def log() -> list[str]:
    text = ctypes.create_string_buffer(1 << 20)
    double()[1].fake_nccl_log(text, len(text))
    return text.value.decode().splitlines()


# Tensors whose addresses were passed on: as on a device, an operation may still touch them when its call is long over.
KEPT: list[torch.Tensor] = []


class Rank:
    """One thread's transport with a stream of the caller's."""

    def __init__(self, core, rank: int, size: int):
        self.core, self.rank, self.size, self.stream = core, rank, size, stream()

    def collective(self, kind: str, input, output, numel: int, op: str | None = "sum", root: int = -1, tag: str = "",
                   splits: tuple = ((), ())):  # fmt: skip
        KEPT.extend(t for t in (input, output) if t is not None)
        tensor = input if input is not None else output
        dtype = str(torch.float32 if tensor is None else tensor.dtype).removeprefix("torch.")
        ends = [0 if t is None else t.data_ptr() for t in (input, output)]
        return C.Collective(C.KINDS[kind], *ends, numel, C.DTYPES[dtype], C.REDUCE_OPS[op] if op else 0, root, tag,
                            *splits, self.stream)  # fmt: skip

    def message(self, tensor: torch.Tensor, peer: int, tag: str = ""):
        KEPT.append(tensor)
        dtype = str(tensor.dtype).removeprefix("torch.")
        return C.Message(tensor.data_ptr(), tensor.numel(), C.DTYPES[dtype], peer, tag, self.stream)

    def all_reduce(self, tensor: torch.Tensor, timeout: float = 10.0, tag: str = ""):
        return self.core.post(self.collective("all_reduce", tensor, tensor, tensor.numel(), tag=tag), timeout)

    def finish(self, work) -> None:
        """As kernels on the caller's stream would: what it does next comes after the call."""
        work.order(self.stream)
        synchronize(self.stream)


def run(size: int, function: Callable, *, timeout: float = 10.0, max_ctas: int = 0, connected: bool = False) -> list:
    """function(Rank) on `size` threads, each with a transport of its own; what it returned or raised, by rank.

    `connected`: each pair of ranks, for messages in both directions.
    """
    double()
    own = C.nccl_unique_id()
    pairs = [(a, b, C.nccl_unique_id()) for a in range(size) for b in range(size) if a != b] if connected else []
    outcomes: list = [None] * size

    def serve(rank: int) -> None:
        try:
            core = C.NcclTransport(own, rank, size, timeout, max_ctas)
            try:
                for a, b, unique in pairs:
                    if rank in (a, b):
                        core.connect(b if rank == a else a, rank == a, unique, timeout)
                outcomes[rank] = function(Rank(core, rank, size))
            finally:
                core.close()
        except Exception as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=serve, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a rank hangs"
    return outcomes


# ---- communicators of processes


class HostDevice:
    """Test double of a device: host memory is its memory."""

    type = "cpu"

    def __init__(self):
        self._stream = stream()

    def stream(self) -> int:
        return self._stream

    def capturing(self) -> bool:
        return False


class Synced:
    """The extension's transport, whose works let host code play the part of kernels on the caller's stream: what
    follows `order` there must find the data."""

    def __init__(self, core):
        self._core = core

    def __getattr__(self, name: str):
        made = getattr(self._core, name)
        if name not in ("post", "post_gated", "isend", "irecv"):
            return made
        return lambda *args: SyncedWork(made(*args))


class SyncedWork:
    def __init__(self, work):
        self._work, self.done, self.over, self.wait = work, work.done, work.over, work.wait

    def order(self, address: int) -> None:
        self._work.order(address)
        self._work.wait(60.0)
        synchronize(address)


def connected(timeout: float = 20.0, name: str = "") -> nccl.NcclCommunicator:
    """The communicator of this rank's process over all ranks."""
    double()
    comm = nccl.connect(dist.group.WORLD, lambda: None, name=name, timeout=timeout, device=HostDevice())
    comm._core = Synced(comm._core)
    return comm
