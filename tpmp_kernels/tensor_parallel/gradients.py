"""Gradients that are partial sums over tensor-parallel ranks after backward, added once a step.

| parameter                                                | each rank's gradient is that of | added over        |
| -------------------------------------------------------- | ------------------------------- | ----------------- |
| norm weights, row biases under sequence parallelism      | its own tokens                  | all ranks         |
| k, v projections where ranks share a key and value head  | its own query heads             | ranks that share  |

Such a parameter carries `tp_partial_grad = n`: the gradients of each n neighbouring ranks, 0 to n - 1 and so on, add up
to the parameter's. A layer cannot add them in backward: it would do so for every microbatch, a small message each.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from tpmp_kernels.comm.communicator import Communicator

BUCKET = 2**24  # elements in one message: far past where latency counts, and little beside a model's gradients


@torch.no_grad()
def reduce_partial_gradients(
    module: nn.Module, comm: Communicator, *, gradients: Mapping[str, Tensor | None] | None = None
) -> None:
    """Add the partial gradients of `module`'s parameters over the ranks of `comm`, in place: all replicas then hold the
    same bits. Collective; call it once a step, after the last microbatch's backward and before the gradients are used.

    gradients: by parameter name, where they are kept elsewhere than in `main_grad` or `.grad`. Parameters without one
    are passed over. ValueError where a parameter's `tp_partial_grad` does not divide the ranks.
    """
    if comm.size == 1:
        return
    alike = defaultdict(list)
    for name, parameter in module.named_parameters():
        ranks = getattr(parameter, "tp_partial_grad", 1)
        grad = _gradient(parameter) if gradients is None else gradients.get(name)
        if ranks == 1 or grad is None:
            continue
        if comm.size % ranks:
            raise ValueError(
                f"reduce_partial_gradients: {name} is added over {ranks} neighbouring ranks, which does not divide "
                f"tp={comm.size}; pass the communicator that its layer was made with"
            )
        alike[ranks, grad.dtype, grad.device].append(grad)
    for (ranks, *_), grads in alike.items():
        for bucket in _buckets(grads):
            _add(bucket, comm, ranks)


def _gradient(parameter: nn.Parameter) -> Tensor | None:
    main_grad = getattr(parameter, "main_grad", None)
    return parameter.grad if main_grad is None else main_grad


def _buckets(grads: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    bucket, size = [], 0
    for grad in grads:
        if bucket and size + grad.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(grad)
        size += grad.numel()
    yield bucket


def _add(grads: list[Tensor], comm: Communicator, ranks: int) -> None:
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    total = comm.all_reduce(flat, tag="partial gradients") if ranks == comm.size else _add_in_blocks(flat, comm, ranks)
    for grad, part in zip(grads, total.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view(grad.shape))


def _add_in_blocks(flat: Tensor, comm: Communicator, ranks: int) -> Tensor:
    """The sum of `flat` over this rank's block of `ranks` neighbours, each adding one part of it for all of them.

    An all-reduce within each block, spelt as two all-to-alls of the whole group that pass other blocks nothing: it
    needs no communicator for the block, and moves what such a one would.
    """
    part = -(-flat.numel() // ranks)
    mine = torch.arange(comm.size).div(ranks, rounding_mode="floor") == comm.rank // ranks
    splits = (mine * part).tolist()
    padded = torch.cat([flat, flat.new_zeros(part * ranks - flat.numel())])
    parts = comm.all_to_all(torch.empty_like(padded), padded, splits, splits, tag="partial gradients")
    added = parts.view(ranks, part).sum(0)
    return comm.all_to_all(parts, added.repeat(ranks), splits, splits, tag="partial gradients")[: flat.numel()]
