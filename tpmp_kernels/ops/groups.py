"""Groups of ranks inside ops: an int at the torch.library boundary, where only data may pass, and what ranks exchange.

A group is any object with `rank`, `size`, `all_gather(output, input, tag=)` and `all_reduce(tensor, tag=)`. One whose
`overlaps` is true also takes `async_op=True` in the latter, and returns something to `wait()` for.
"""

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_HANDLE = "_tpmp_ops_handle"
_numbers = itertools.count(1)
_groups: dict[int, weakref.ref] = {}
# The layouts of all ranks, by (handle, own layout), of calls whose ranks were found to agree: on CUDA, reading what the
# others sent waits for the GPU.
_agreed: dict[tuple, list] = {}


def handle(group: Any) -> int:
    """The number that stands for `group` in an op's arguments; 0 for None.

    It is an attribute of the group, which torch.compile reads and guards on as on any other. Entering a new group
    is no part of a graph, so a trace does that on the side.
    """
    if group is None:
        return 0
    number = getattr(group, _HANDLE, 0)
    if torch.compiler.is_compiling():
        if number == 0:
            from torch._dynamo.comptime import comptime

            comptime(lambda context: _enter(context.get_local("group")._ComptimeVar__variable.value))
        return getattr(group, _HANDLE)
    return number if number in _groups and _groups[number]() is group else _enter(group)


def _enter(group: Any) -> int:
    number = next(_numbers)
    try:
        setattr(group, _HANDLE, number)
        _groups[number] = weakref.ref(group, lambda _: _groups.pop(number))
    except (AttributeError, TypeError):
        raise TypeError(
            f"ops: group must be an object that takes attributes and weak references, got {type(group).__name__}; "
            "leave out its __slots__"
        ) from None
    return number


def find(number: int) -> Any:
    """The group behind a handle, or None where there is none to talk to: handle 0, or a group of one rank."""
    if number == 0:
        return None
    group = _groups[number]() if number in _groups else None
    if group is None:
        raise RuntimeError(f"ops: group {number} is gone; keep it alive for as long as its losses and graphs are")
    return group if group.size > 1 else None


def all_reduce(tensor: Tensor, number: int, tag: str) -> Tensor:
    """`tensor`, summed over the group in place."""
    group = find(number)
    if group is not None:
        group.all_reduce(tensor, tag=tag)
    return tensor


def overlaps(number: int) -> bool:
    """Whether the group moves what is posted while this rank computes."""
    return getattr(find(number), "overlaps", False)


def post_all_reduce(tensor: Tensor, number: int, tag: str) -> Callable[[], object]:
    """As all_reduce, on its way under what is computed next where the group overlaps; call the result for its end."""
    if overlaps(number):
        return find(number).all_reduce(tensor, tag=tag, async_op=True).wait
    all_reduce(tensor, number, tag)
    return lambda: None


def all_gather(
    op: str, values: Tensor, layout: tuple[int, int, int, int], number: int
) -> tuple[list[Tensor], list[tuple[int, int, int, int]]]:
    """The `values` and the layout (start, rows, vocab_size, checksum of options) of every rank, in one message.

    ValueError, in the same words on every rank, unless the layouts describe one loss over one vocabulary.
    """
    group = find(number)
    if group is None:
        return [values], [layout]
    header = torch.tensor(layout, dtype=torch.int64, device=values.device).view(values.dtype)
    message = torch.cat([values.reshape(-1), header])
    messages = message.new_empty(group.size, message.numel())
    group.all_gather(messages, message, tag=f"{op}.statistics")
    layouts = _agreed.get((number, layout)) if values.is_cuda else None
    if layouts is None:
        layouts = [tuple(each) for each in messages[:, values.numel() :].contiguous().view(torch.int64).tolist()]
        check_layouts(op, layouts)
        if values.is_cuda:
            _agreed[number, layout] = layouts
    return [each[: values.numel()].view(values.shape) for each in messages], layouts


def check_layouts(op: str, layouts: list) -> None:
    """One loss on all ranks, over a vocabulary of which every id lies on one rank; rows from vocab_size on are padding,
    of which a rank may hold any number, or nothing else."""
    starts, rows, sizes, options = zip(*layouts, strict=True)
    if len(set(sizes)) > 1:
        raise ValueError(f"{op}: vocab_size must be the same on all ranks, got {list(sizes)}; pass one")
    if len(set(options)) > 1:
        raise ValueError(
            f"{op}: label_smoothing, z_loss, softcap, ignore_index and grad_scale must be the same on all ranks, but "
            "differ; pass the same"
        )
    vocab_size = sizes[0]
    shards = [(start, start + count) for start, count in zip(starts, rows, strict=True)]
    covered = 0
    for start, stop in [*sorted(s for s in shards if s[0] < min(s[1], vocab_size)), (vocab_size, vocab_size)]:
        if start != covered:
            got = ", ".join(f"{start}:{stop}" for start, stop in shards)
            raise ValueError(
                f"{op}: the rows of all ranks must tile the ids 0:{vocab_size} with no gap and no overlap, got {got}; "
                "pass vocab_start and vocab_size to match the weight"
            )
        covered = min(stop, vocab_size)
