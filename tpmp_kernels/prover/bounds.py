"""How far from the tape a right parallel model may be at each site, told from the reference itself.

The noise run: the reference in the dtype that is judged, each of its modules fed what is on the tape, rounded to that
dtype (in fp64: moved by a unit in the last place, up or down), and its results compared with the tape's. What they are
off by is rounding at this site and no other's, since no error is carried from module to module. So

    bound = 32 noise + 4 sqrt(n) u max|tape|        n: the longest sum in the model, u: the dtype's unit roundoff

another order of summation being a few times off what this one is. A gradient that is zero but for rounding, such as
that of a key's bias, has noise and tape of one size, and is bounded by that. In the step as it is, rounding does travel
on: there the bound is taken 256 times, and for a parameter behind the optimizer it is how far gradients moved within
their bounds move it, because AdamW makes a full step of a gradient that is noise.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tpmp_kernels.prover.sites import Site
from tpmp_kernels.prover.tape import Tape

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24}
FACTOR = 32
GROWTH = 256


@dataclass
class Bounds:
    """terms: n. size: the largest value on the tape. travelled: the bounds of parameters behind the optimizer in the
    step as it is."""

    dtype: torch.dtype
    terms: int
    noise: dict[Site, float] = field(default_factory=dict)
    size: dict[Site, float] = field(default_factory=dict)
    travelled: dict[Site, float] = field(default_factory=dict)

    def replay(self, site: Site) -> float:
        """The bound for a module that was fed from the tape."""
        rounding = 4 * self.terms**0.5 * UNIT[self.dtype]
        return FACTOR * self.noise.get(site, 0.0) + rounding * self.size.get(site, 0.0)

    def step(self, site: Site) -> float:
        """The bound in the step as it is."""
        if site.pass_ == "weights":
            return self.replay(site)
        return self.travelled[site] if site in self.travelled else GROWTH * self.replay(site)

    def alias(self, site: Site, other: Site) -> None:
        """Let `site` have what `other` has."""
        for table in (self.noise, self.size, self.travelled):
            if other in table:
                table[site] = table[other]

    def vague(self) -> list[Site]:
        """Sites of forward where the reference in this dtype is not the reference in fp64, so that little is proved:
        randomness that is not the same in both."""
        return [s for s in self.noise if s.pass_ == "forward" and self.replay(s) > 0.1 * self.size[s] > 0]


class Noise:
    """The observer of the noise run: measures, and gives the next module what is on the tape."""

    def __init__(self, tape: Tape, bounds: Bounds):
        self.tape, self.bounds = tape, bounds
        self._signs = torch.empty(0, dtype=torch.float64)

    def seen(self, site: Site, x: Tensor) -> Tensor | None:
        whole = self.tape.get(site)
        if whole is None or whole.shape != x.shape or not whole.is_floating_point():
            return None
        off = (x.detach().double() - whole).abs_()
        self.bounds.noise[site] = float(off[off.isfinite()].max()) if off.isfinite().any() else 0.0
        self.bounds.size[site] = largest(whole)
        return self.rounded(whole)

    def rounded(self, whole: Tensor) -> Tensor:
        """`whole` in the judged dtype, as far from itself as that dtype rounds."""
        if self.bounds.dtype != torch.float64:
            return whole.to(self.bounds.dtype)
        return whole * (1 + UNIT[torch.float64] * 2 * self.signs(whole))

    def signs(self, like: Tensor) -> Tensor:
        """1 or -1 for each element, fp64."""
        if len(self._signs) < like.numel():
            generator = torch.Generator().manual_seed(1)
            self._signs = torch.randint(0, 2, (like.numel(),), generator=generator).double().mul_(2).sub_(1)
        return self._signs[: like.numel()].view(like.shape)


def largest(x: Tensor) -> float:
    """The largest finite absolute value, 0 for an empty tensor."""
    x = x.detach().abs()
    x = x[x.isfinite()] if not bool(x.isfinite().all()) else x
    return float(x.max()) if x.numel() else 0.0
