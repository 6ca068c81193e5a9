"""The stage borders of one rank: every message to and from its neighbours, through memory that both ends can see.

A value that crosses a border is named by (payload, producing stage, microbatch): "F" is the activation that a stage's
forward made, "B" the gradient that a stage's backward made for its input. Shapes and dtype are known to both ends, so
that nothing but the values travels; the transport refuses a message of another size.

Receives are posted as early as the lowered schedule has them, into memory of the transport's, where the sender of a
long message copies it straight from where its stage made it: one copy in all. The schedule bounds how many buffers
there are, and a wait for a send is the back-pressure.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tpmp_kernels.comm.communicator import Communicator, Work
from tpmp_kernels.pipeline.memory import Meter
from tpmp_kernels.pipeline.schedule import Transfer

Value = tuple[str, int, int]


class Channels:
    """For one step. shape(microbatch): of the activation and the gradient at every border."""

    def __init__(
        self,
        comm: Communicator,
        shape: Callable[[int], Sequence[int]],
        dtype: torch.dtype,
        device: torch.device | str,
        meter: Meter,
    ):
        self.comm, self._shape, self._dtype, self._meter = comm, shape, dtype, meter
        self._device = torch.device(device)
        self._values: dict[Value, Tensor] = {}
        self._works: dict[tuple[str, Value], Work] = {}

    def put(self, payload: str, stage: int, microbatch: int, value: Tensor) -> None:
        """What a compute has made."""
        self._values[payload, stage, microbatch] = value

    def take(self, payload: str, stage: int, microbatch: int) -> Tensor:
        """What a compute consumes; it is its own from here."""
        return self._values.pop((payload, stage, microbatch))

    def recv_post(self, transfer: Transfer) -> None:
        value = _value(transfer)
        buffer = self._empty(self._shape(transfer.microbatch))
        self._values[value] = buffer
        self._works["recv", value] = self.comm.irecv(buffer, transfer.peer, tag=_tag(value))

    def recv_wait(self, transfer: Transfer) -> None:
        self._works.pop(("recv", _value(transfer))).wait()

    def send_post(self, transfer: Transfer) -> None:
        value = _value(transfer)
        # The work keeps the tensor alive until it is sent; nothing here needs it any more.
        tensor = self._values.pop(value).contiguous()
        self._works["send", value] = self.comm.isend(tensor, transfer.peer, tag=_tag(value))

    def send_wait(self, transfer: Transfer) -> None:
        self._works.pop(("send", _value(transfer))).wait()

    def _empty(self, shape: Sequence[int]) -> Tensor:
        if self._device.type == "cpu":
            buffer = self.comm.empty(*shape, dtype=self._dtype)
        else:
            buffer = torch.empty(shape, dtype=self._dtype, device=self._device)
        self._meter.note(buffer)
        return buffer


def _value(transfer: Transfer) -> Value:
    return transfer.payload, transfer.stage, transfer.microbatch


def _tag(value: Value) -> str:
    """What both ends call a transfer, for example "F0.3": ends that disagree get an error that says so."""
    payload, stage, microbatch = value
    return f"{payload}{stage}.{microbatch}"
