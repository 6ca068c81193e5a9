"""What computing, sending and remembering cost: the numbers that the simulator and the greedy schedules take."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tpmp_kernels.pipeline.schedule import Kind


@dataclass(frozen=True)
class Costs:
    """Times in any one unit, the same for all; memory in any other.

    F, B, W, BW: of one microbatch on one rank, that is on all stages of that rank together; each stage takes its equal
    share, so the same numbers compare schedules with different numbers of chunks. A sequence instead gives each stage
    its own time, as it is. BW is B + W where it is None.
    pair: time of a joint step as a share of its F and its B one after the other: 1.0 hides nothing, so the two then
    start each on its own input. early_release: whether the output of the F of a joint step leaves when that F ends, or
    at the end of a step that waits for both inputs whatever it hides, as the published DualPipe does.
    latency, bandwidth, message: a transfer between ranks takes latency + message / bandwidth; its link, one for each
    direction between two ranks, is taken for message / bandwidth.
    activation: memory of one microbatch on one rank, shared equally by its stages, or a sequence with one number for
    each stage; held from the start of F to the end of the weight gradient. kept: the share of it that is still held
    between B and W, where these are apart.

    Raises ValueError for a number that none of this can be.
    """

    F: float | Sequence[float] = 1.0
    B: float | Sequence[float] = 1.0
    W: float | Sequence[float] = 1.0
    BW: float | Sequence[float] | None = None
    pair: float = 1.0
    early_release: bool = True
    latency: float = 0.0
    bandwidth: float = math.inf
    message: float = 0.0
    activation: float | Sequence[float] = 1.0
    kept: float = 1.0

    def __post_init__(self):
        for name in ("F", "B", "W", "BW", "latency", "message", "activation"):
            value = getattr(self, name)
            for each in value if isinstance(value, Sequence) else [value]:
                if each is not None and not 0 <= each < math.inf:
                    raise ValueError(f"costs: {name} is {each}; expected a finite number of at least 0")
        if not self.bandwidth > 0:
            raise ValueError(f"costs: bandwidth is {self.bandwidth}; expected more than 0, or inf for no limit")
        if not 0 < self.pair < math.inf:
            raise ValueError(f"costs: pair is {self.pair}; expected a finite number above 0; 1 hides nothing")
        if not 0 <= self.kept <= 1:
            raise ValueError(f"costs: kept is {self.kept}; expected a share from 0 to 1")

    def times(self, stages: int, ranks: int) -> dict[Kind, list[float]]:
        """Time of each compute kind on one microbatch, by stage. ValueError where a sequence has another length."""
        times = {kind: self._by_stage(kind, stages, ranks) for kind in (Kind.F, Kind.B, Kind.W)}
        if self.BW is None:
            both = [b + w for b, w in zip(times[Kind.B], times[Kind.W], strict=True)]
        else:
            both = self._by_stage("BW", stages, ranks)
        return {**times, Kind.BW: both}

    def activations(self, stages: int, ranks: int) -> list[float]:
        """Memory of the activations of one microbatch, by stage."""
        return self._by_stage("activation", stages, ranks)

    def _by_stage(self, name: str, stages: int, ranks: int) -> list[float]:
        value = getattr(self, name)
        if not isinstance(value, Sequence):
            return [value * ranks / stages] * stages
        if len(value) != stages:
            raise ValueError(f"costs: {name} has {len(value)} numbers; expected one for each of {stages} stages")
        return list(value)

    @property
    def joint(self) -> bool:
        """Whether the parts of a joint step run together."""
        return self.pair != 1 or not self.early_release

    @property
    def occupied(self) -> float:
        """How long one message takes its link."""
        return self.message / self.bandwidth

    @property
    def transfer(self) -> float:
        """From the moment that both ends have posted to the arrival of a message, on a free link."""
        return self.latency + self.occupied
