"""The tape: what the reference computed, tensor by tensor, in a file without a name that all ranks of a host map.

A file, so that a large model's activations exist once in a host's memory, and can leave it; without a name, so that
nothing is left behind whichever process is killed.
"""

import hashlib
import math
import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tpmp_kernels.prover.sites import Site

_ALIGNED = 64  # bytes


class Entry(NamedTuple):
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    order: int


class Tape:
    """Written by one process with `put`, then read by any of the host, from `path` and `index`."""

    def __init__(self, path: str | None = None, index: dict[Site, Entry] | None = None):
        self._file = tempfile.TemporaryFile() if path is None else open(path, "rb")  # noqa: SIM115
        self.index: dict[Site, Entry] = {} if index is None else index
        self._map: mmap.mmap | None = None
        self._end, self._written = 0, dict[bytes, int]()

    @property
    def path(self) -> str:
        """How another process of this user opens the file while this one has it open. Linux only."""
        self._file.flush()
        return f"/proc/{os.getpid()}/fd/{self._file.fileno()}"

    def put(self, site: Site, tensor: Tensor) -> None:
        """Append a tensor. Floating-point ones are kept in fp64."""
        tensor = tensor.detach().cpu()
        tensor = (tensor.double() if tensor.is_floating_point() else tensor).contiguous()
        offset = self._write(memoryview(tensor.reshape(-1).numpy()).cast("B")) if tensor.numel() else 0
        self.index[site] = Entry(offset, tuple(tensor.shape), tensor.dtype, len(self.index))

    def _write(self, raw: memoryview) -> int:
        """Where the bytes lie in the file. What one module puts out the next is given: it is written once."""
        digest = hashlib.blake2b(raw, digest_size=16).digest()
        if digest not in self._written:
            self._file.write(b"\0" * (-self._end % _ALIGNED))
            self._written[digest] = self._end + -self._end % _ALIGNED
            self._end = self._written[digest] + self._file.write(raw)
        return self._written[digest]

    def alias(self, site: Site, other: Site) -> None:
        """Let `site` stand for what `other` holds."""
        self.index[site] = self.index[other]

    def get(self, site: Site) -> Tensor | None:
        """What was put at the site, not to be written into."""
        entry = self.index.get(site)
        if entry is None or not math.prod(entry.shape):
            return None if entry is None else torch.empty(entry.shape, dtype=entry.dtype)
        if self._map is None:
            if self._file.writable():
                self._file.flush()
            # Private pages: torch takes no read-only buffer.
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
        flat = torch.frombuffer(self._map, dtype=entry.dtype, count=math.prod(entry.shape), offset=entry.offset)
        return flat.view(entry.shape)

    def __contains__(self, site: Site) -> bool:
        return site in self.index

    def sites(self, pass_: str) -> Iterator[Site]:
        return (site for site in self.index if site.pass_ == pass_)

    def close(self) -> None:
        self._file.close()  # the mapping goes with the last tensor that looks into it


def can_be_shared() -> bool:
    """Whether other processes of this host can open a tape by its path."""
    return Path("/proc/self/fd").exists()
