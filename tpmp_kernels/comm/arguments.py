"""The arguments of a call, checked before anything reaches a peer: one sentence with expected, got and remedy."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

OPS = ("sum", "avg", "max", "min", "prod")


@dataclass(slots=True)
class Collective:
    """One collective call, checked: dense tensors (detached), and what must agree between the ranks.

    `numel` is n of the table in communicator.py: what one rank contributes to, or takes from, the others. It is 0 for
    a barrier and for an all_to_all with splits, whose parts only pairs of ranks agree on.
    """

    kind: str
    numel: int = 0
    input: torch.Tensor | None = None  # None where this rank contributes nothing
    output: torch.Tensor | None = None  # the input itself for a call in place; None where this rank gets nothing
    op: str | None = None
    root: int = -1
    tag: str = ""
    input_splits: Sequence[int] = ()  # elements for each rank, in all_to_all
    output_splits: Sequence[int] = ()

    @property
    def tensor(self) -> torch.Tensor | None:
        """The tensor that messages speak of."""
        return self.input if self.input is not None else self.output


def dense(call: str, tensor: torch.Tensor, *, written: bool) -> torch.Tensor:
    """`tensor` detached, through a copy where it is not contiguous; ValueError where a copy could not be put back."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.is_contiguous():
        return tensor
    overlapping = any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    if written and overlapping:
        raise ValueError(
            f"{call}: tensor of strides {tensor.stride()} is expanded, several elements share one place in memory; "
            "pass tensor.contiguous()"
        )
    return tensor.contiguous()


def check_op(call: str, dtype: torch.dtype, op: str) -> None:
    if op not in OPS:
        raise ValueError(f"{call}: op is {op!r}; pass one of {', '.join(OPS)}")
    if op == "avg" and not dtype.is_floating_point:
        raise TypeError(f"{call}: avg of {dtype} would not be exact; use sum and divide as you need")


def check_parts(call: str, size: int, whole: torch.Tensor, part: torch.Tensor, names: tuple[str, str]) -> None:
    """`whole` holds one part for each rank, each like `part`; `names` are theirs."""
    if whole.dtype != part.dtype or whole.numel() != part.numel() * size:
        raise ValueError(
            f"{call}: {names[0]} is {whole.dtype}{list(whole.shape)} and {names[1]} {part.dtype}{list(part.shape)}; "
            f"pass {names[0]} with {size} times the elements of {names[1]} (one part for each rank), in one dtype"
        )


def check_alike(call: str, size: int, output: torch.Tensor, input: torch.Tensor) -> None:
    """The two of an all_to_all in equal parts."""
    if input.dtype != output.dtype or input.numel() != output.numel() or input.numel() % size:
        raise ValueError(
            f"{call}: input is {input.dtype}{list(input.shape)} and output {output.dtype}{list(output.shape)}; pass "
            f"two of one dtype and count that {size} ranks divide, or splits"
        )


def elements(name: str, size: int, tensor: torch.Tensor, rows: Sequence[int]) -> list[int]:
    """The elements of each rank's part from its `rows` of dimension 0; without rows, equal parts."""
    total = tensor.shape[0] if tensor.dim() else tensor.numel()
    if len(rows) == 0 and total % size == 0:
        rows = [total // size] * size
    if len(rows) != size or any(n < 0 for n in rows) or sum(rows) != total:
        raise ValueError(
            f"all_to_all: {name}_splits is {list(rows)} for {total} rows of {name} and {size} ranks; pass one count of "
            "rows for each rank, which add up to all rows"
        )
    width = tensor.numel() // total if total else 0
    return [n * width for n in rows]


def check_root(call: str, size: int, root: int) -> None:
    if not 0 <= root < size:
        raise ValueError(f"{call}: root is {root}; pass a group rank, 0 to {size - 1}")


def check_peer(call: str, name: str, rank: int, size: int, peer: int) -> None:
    if not 0 <= peer < size or peer == rank:
        others = [r for r in range(size) if r != rank] or "none: the group has one rank and nobody to talk to"
        raise ValueError(f"{call}: {name} is {peer} on rank {rank}; pass another group rank, one of {others}")
