"""The communicator of a group of one rank: collectives copy input to output, and there is no peer to send to."""

from collections.abc import Callable

import torch

from tpmp_kernels.comm.arguments import Collective
from tpmp_kernels.comm.communicator import Communicator, Done, Work


class SelfCommunicator(Communicator):
    """Every call of a communicator, at once and without a transport."""

    transport = "self"

    def __init__(self, *, name: str = "self", timeout: float = 60.0):
        super().__init__(0, 1, name=name, timeout=timeout)

    def abort(self, reason: str) -> None:
        return None

    def last_ops(self) -> list[str]:
        return []

    def close(self) -> None:
        return None

    def _check_tensor(self, call: str, tensor: torch.Tensor) -> None:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{call}: expected a torch.Tensor, got {type(tensor).__name__}")

    def _run(self, call: Collective) -> None:
        if call.output is not None and call.input is not None and call.output is not call.input:
            call.output.view(-1).copy_(call.input.view(-1))

    def _post(self, call: Collective, landed: Callable[[], None] | None) -> Work:
        self._run(call)
        if landed is not None:
            landed()
        return Done()

    _isend = _irecv = None  # never reached: no peer passes the check
