"""What the shm tests share: the communicator of all ranks, and a way to look at the error of a call."""

import torch.distributed as dist

from tpmp_kernels.comm import Communicator, communicator
from tpmp_kernels.errors import TransportError


def world(timeout: float = 30) -> Communicator:
    return communicator(dist.group.WORLD, transport="shm", timeout=timeout)


def caught(call) -> tuple:
    """(class, culprit, message) of the TransportError that `call` raises, or what it returned."""
    try:
        result = call()
    except TransportError as error:
        return type(error).__name__, error.culprit, str(error)
    return "returned", None, repr(result)


def refusals(calls) -> list[str]:
    """The text of the ValueError or TypeError that each call raises, or what it returned."""
    texts = []
    for call in calls:
        try:
            texts.append(f"returned {call()}")
        except (ValueError, TypeError) as error:
            texts.append(str(error))
    return texts
