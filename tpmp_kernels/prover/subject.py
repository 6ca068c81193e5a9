"""What is to be proved: an unsharded training step, and one rank's part of the parallel step that should equal it."""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tpmp_kernels.pipeline.stage import Stage
from tpmp_kernels.training.layout import Layout


@dataclass(frozen=True)
class Whole:
    """The unsharded step. forward(input, microbatch): a call of the module. inputs, targets: by microbatch. Gradients
    are those of loss_scale * (sum of the microbatch losses); update() applies them to the parameters."""

    module: nn.Module
    forward: Callable[[Tensor, int], Tensor]
    inputs: Sequence[Tensor]
    targets: Sequence[Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    loss_scale: float
    update: Callable[[], None]


@dataclass(frozen=True)
class Part:
    """One rank's part of the parallel step. stages: those of this rank, by number, of `last + 1`.

    step(before): run the schedule, make the gradients what they should be on every rank, call before(norm) with the
    global norm of the gradients, or None where the step does not use it, and update the parameters.
    """

    stages: Mapping[int, Stage]
    last: int
    step: Callable[[Callable[[float | None], None]], None]

    def parameters(self) -> dict[str, nn.Parameter]:
        """By every name that one has."""
        return {
            name: parameter
            for stage in self.stages.values()
            for name, parameter in stage.module.named_parameters(remove_duplicate=False)
        }


class Subject(ABC):
    """Pickled to every rank. dtype: that of the parallel step. timeout: seconds that a rank waits for its peers."""

    tp: int
    pp: int
    schedule: str
    microbatches: int
    dtype: torch.dtype
    seed: int
    timeout: float

    @property
    @abstractmethod
    def title(self) -> str:
        """One line that says what is proved."""

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Targets of a microbatch."""

    @abstractmethod
    def whole(self, dtype: torch.dtype) -> Whole:
        """The unsharded step in `dtype`, from the same weights at every call."""

    @abstractmethod
    def part(self, where: Layout) -> Part:
        """This rank's part, from the same weights at every call. Collective."""

    @property
    def ranks(self) -> int:
        return self.tp * self.pp


def nudge(name: str, shape: torch.Size, size: float) -> Tensor:
    """What is added to a fresh parameter, fp64: N(0, size^2), of the name alone.

    At a norm's ones a norm that leaves its weight out is right, and at a bias of zeros one that is added twice.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.empty(shape).normal_(0.0, size, generator=generator).double()
