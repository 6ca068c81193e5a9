"""How much memory a call needs beside its operands and what it returns: the peak of what is resident."""

import ctypes
import gc
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

_STATUS, _REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): the high-water mark becomes what is resident now


def extra_bytes(call: Callable[..., Iterable[Tensor]], operands: tuple[Tensor, ...]) -> int | None:
    """The most that `call` held at one time. On the CPU whatever became resident, whoever allocated it (within a
    MiB; None where the system does not tell); on CUDA as torch's allocator counts."""
    call(*operands)  # whatever is allocated once, is
    if operands[0].is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call(*operands)
        return max(0, torch.cuda.max_memory_allocated() - before - _nbytes(kept))
    try:
        _give_back()
        _REFERENCES.write_text(_RESET_PEAK)
        before = _resident("VmRSS")
    except OSError:
        return None
    kept = call(*operands)
    return max(0, _resident("VmHWM") - before - _nbytes(kept))


def _give_back() -> None:
    """Free memory goes back to the system: what is used again would not be seen."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc
        libc.malloc_trim(0)


def _resident(name: str) -> int:
    return int(re.search(rf"^{name}:\s*(\d+) kB$", _STATUS.read_text(), re.MULTILINE)[1]) << 10


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
