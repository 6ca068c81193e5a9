"""How a rank's tensor lies in the whole one, told from the two shapes and the rank alone.

| local shape, of whole [B, S, H] over R ranks | layout                                                          |
| -------------------------------------------- | --------------------------------------------------------------- |
| [B, S, H]                                    | whole                                                           |
| one dimension shorter, by R                  | shard of it; by a divisor of R, neighbouring ranks hold the same |
| one dimension shorter, R of it a bit more    | shard of it, with padding at the end of the whole               |
| [B S, H], [B S/R, H], [B S, H/R]             | the same, with tokens flattened                                 |
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_PADDED = 8  # of a dimension, one in so many at the end may be padding where nothing says that there is some


@dataclass(frozen=True)
class Layout:
    """shape: the whole, with tokens flattened or not; dim: which is cut, None for none; start, size: this rank's part
    of it without padding; block: this rank's number among the different parts; parts: how many there are."""

    shape: tuple[int, ...]
    dim: int | None = None
    start: int = 0
    size: int = 0
    block: int = 0
    parts: int = 1

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's part of `whole`, without padding (a view)."""
        whole = whole.reshape(self.shape)
        return whole if self.dim is None else whole.narrow(self.dim, self.start, self.size)

    def real(self, local: Tensor) -> Tensor:
        """`local` without padding (a view)."""
        return local if self.dim is None else local.narrow(self.dim, 0, self.size)

    def filled(self, local: Tensor, part: Tensor) -> Tensor:
        """A tensor like `local` in dtype, device and strides that holds `part`, and the padding of `local`."""
        filled = torch.empty_like(local)
        if self.dim is not None and self.size < local.shape[self.dim]:
            filled.copy_(local)
        self.real(filled).copy_(part)
        return filled


def layout_of(local: torch.Size, whole: torch.Size, rank: int, ranks: int, *, padded: bool = False) -> Layout | None:
    """None where a tensor of shape `local` is no part of one of shape `whole` on this rank of `ranks`.

    padded: the ranks' parts are known to be more than the whole, where the shapes would also allow that neighbouring
    ranks hold the same.
    """
    local, whole = tuple(local), tuple(whole)
    if len(local) != len(whole):
        if not local or not whole or len(local) > len(whole):
            return None
        whole = (math.prod(whole[: len(whole) - len(local) + 1]), *whole[len(whole) - len(local) + 1 :])
    cut = [dim for dim, (part, all_) in enumerate(zip(local, whole, strict=True)) if part != all_]
    if not cut:
        return Layout(whole)
    return _shard(local, whole, cut[0], rank, ranks, padded) if len(cut) == 1 else None


def _shard(local: tuple, whole: tuple, dim: int, rank: int, ranks: int, padded: bool) -> Layout | None:
    part, all_ = local[dim], whole[dim]
    if not padded and part and all_ % part == 0 and ranks % (all_ // part) == 0 and part < all_:
        parts = all_ // part
        block = rank // (ranks // parts)
        return Layout(whole, dim, block * part, part, block, parts)
    chunk = -(-all_ // ranks)
    if part == max(0, min(chunk, all_ - rank * chunk)):  # torch.chunk's: the last ones shorter
        return Layout(whole, dim, min(all_, rank * chunk), part, rank, ranks)
    if 0 <= part * ranks - all_ <= (part * ranks if padded else all_ // _PADDED):
        start = min(all_, rank * part)
        return Layout(whole, dim, start, min(part, all_ - start), rank, ranks)
    return None
