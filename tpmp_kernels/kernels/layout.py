"""How the rows of an operand lie in memory, as far as a kernel's loads depend on it."""

from torch import Tensor


def rows_adjacent(operand: Tensor) -> bool:
    """Whether it is a transposed matrix: its rows lie side by side."""
    return operand.stride(0) == 1 and operand.stride(1) != 1


def aligned(operand: Tensor) -> bool:
    """Whether one axis is adjacent in memory and steps of the other are multiples of 16 bytes, from such an address."""
    pitch, adjacent = operand.stride()[::-1] if rows_adjacent(operand) else operand.stride()
    return (
        adjacent == 1
        and operand.numel() > 0
        and pitch > 0
        and pitch * operand.element_size() % 16 == 0
        and operand.data_ptr() % 16 == 0
    )
