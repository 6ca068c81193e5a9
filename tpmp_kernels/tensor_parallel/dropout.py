"""Dropout whose mask is a function of (seed, step, layer, microbatch, place of the element): the same for every tp,
with and without sequence parallelism, on every device, and again in recomputation.

    drop = Dropout(0.1, comm, sequence_parallel=True)
    y = drop(x, DropoutKey(seed=7, step=120, layer=3, microbatch=0))
"""

from dataclasses import astuple, dataclass

import torch
from torch import Tensor, nn

from tpmp_kernels.comm.communicator import Communicator
from tpmp_kernels.tensor_parallel.philox import matrix_words

_LIMITS = {"seed": 2**64, "step": 2**32, "layer": 2**32, "microbatch": 2**16 - 1}


@dataclass(frozen=True)
class DropoutKey:
    """Which mask: two keys that differ in anything have independent ones. `layer` numbers the places in the model where
    dropout stands, two of one layer by two numbers. ValueError outside 0 .. 2^64 - 1 (seed), 2^32 - 1 (step, layer),
    2^16 - 2 (microbatch)."""

    seed: int
    step: int
    layer: int
    microbatch: int

    def __post_init__(self):
        for (name, limit), value in zip(_LIMITS.items(), astuple(self), strict=True):
            if not 0 <= value < limit:
                raise ValueError(f"DropoutKey: {name} must be from 0 to {limit - 1}, got {value}; count from 0")


class Dropout(nn.Module):
    """x [.., H] -> x / (1 - p) where the mask keeps it, else 0. In evaluation, and for p = 0, x itself.

    comm, with sequence_parallel: x is a shard of the rows (tokens) of the whole, or with columns_parallel one of its
    columns; the mask is the shard of the whole's. ValueError for a p outside [0, 1], or for both at once.
    """

    def __init__(
        self,
        p: float,
        comm: Communicator | None = None,
        *,
        sequence_parallel: bool = False,
        columns_parallel: bool = False,
    ):
        super().__init__()
        _check_p("Dropout", p)
        if ((sequence_parallel or columns_parallel) and comm is None) or (sequence_parallel and columns_parallel):
            raise ValueError(
                f"Dropout: sequence_parallel={sequence_parallel} and columns_parallel={columns_parallel} with "
                f"comm={comm}; pass at most one of them, and the communicator that cuts x"
            )
        self.p, self.comm = p, comm
        self.sequence_parallel, self.columns_parallel = sequence_parallel, columns_parallel

    def forward(self, x: Tensor, key: DropoutKey) -> Tensor:
        if not self.training:
            return x
        rows, width = x.shape[:-1].numel(), x.shape[-1]
        row = self.comm.rank * rows if self.sequence_parallel else 0
        column = self.comm.rank * width if self.columns_parallel else 0
        whole = self.comm.size * width if self.columns_parallel else width
        return dropout(x, self.p, key, first_row=row, first_column=column, width=whole)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def dropout(
    x: Tensor, p: float, key: DropoutKey, *, first_row: int = 0, first_column: int = 0, width: int | None = None
) -> Tensor:
    """x / (1 - p) where the mask of `key` keeps it, else 0, whatever x holds there; each element is dropped with
    probability p, to within 2^-32.

    x [.., H] is the part of a whole [rows, width] that begins at first_row and first_column: leading dimensions are
    flattened into rows. The mask is kept for backward, one byte an element. ValueError for a p outside [0, 1].
    """
    _check_p("dropout", p)
    if p == 0:
        return x
    dropped = dropout_mask(
        x.shape, p, key, first_row=first_row, first_column=first_column, width=width, device=x.device
    ).logical_not_()
    y = x.masked_fill(dropped, 0)
    return y if p == 1 else y * (1 / (1 - p))


def dropout_mask(
    shape: torch.Size,
    p: float,
    key: DropoutKey,
    *,
    first_row: int = 0,
    first_column: int = 0,
    width: int | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """True where an element is kept; see `dropout`."""
    rows, columns = shape[:-1].numel(), shape[-1]
    kept = torch.empty(rows, columns, dtype=torch.bool, device=device)
    blocks = matrix_words(
        key.seed,
        (key.microbatch, key.layer, key.step),
        rows=range(first_row, first_row + rows),
        columns=range(first_column, first_column + columns),
        width=first_column + columns if width is None else width,
        device=device,
    )
    threshold = round((1 - p) * 2**32)
    for row, words in blocks:
        torch.lt(words, threshold, out=kept[row - first_row : row - first_row + len(words)])
    return kept.view(shape)


def _check_p(name: str, p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"{name}: p must be from 0 to 1, got {p}; it is the share of elements that are dropped")
