"""What the transport must know of the device that holds its tensors."""

from typing import Protocol

import torch


class Device(Protocol):
    """`type`: of the tensors that are carried."""

    type: str

    def stream(self) -> int:
        """The address of the stream on which the caller's tensors are ready and will be read."""

    def capturing(self) -> bool:
        """Whether that stream is being captured into a graph."""


class Cuda:
    """The current CUDA device of torch."""

    type = "cuda"

    def stream(self) -> int:
        return torch.cuda.current_stream().cuda_stream

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()
