"""A vocabulary in parts without processes: the ranks of a loss run one after the other, on whatever device there is."""

from collections.abc import Callable
from typing import Any

from torch import Tensor


class _Left(Exception):
    """A rank has left its message and knows nothing of the others' yet."""


class Alone:
    """Test double of a group, for a loss with one exchange: a rank leaves its message, or takes those of all ranks.

    It stands in for no all_reduce: dx is to be asked for with partial_dx, and added up by the test.
    """

    def __init__(self, rank: int, messages: list[Tensor | None]):
        self.rank, self.size, self.messages = rank, len(messages), messages

    def all_gather(self, output: Tensor, input: Tensor, *, tag: str) -> None:
        if self.messages[self.rank] is None:
            self.messages[self.rank] = input.clone()
            raise _Left
        for rank, message in enumerate(self.messages):
            output[rank] = message


def on_each_rank(size: int, run: Callable[[Alone], Any]) -> list[Any]:
    """What `run(group)` returns on each rank; it is called twice, and left at its exchange the first time."""
    messages: list[Tensor | None] = [None] * size
    groups = [Alone(rank, messages) for rank in range(size)]
    for group in groups:
        try:
            run(group)
        except _Left:
            continue
        raise AssertionError(f"rank {group.rank} made no exchange")
    return [run(group) for group in groups]
