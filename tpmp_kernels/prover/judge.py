"""One rank's comparisons: each tensor that it sees, against its own part of what the tape holds for that site."""

from dataclasses import dataclass, field

from torch import Tensor, nn

from tpmp_kernels.prover.layouts import Layout, layout_of
from tpmp_kernels.prover.reference import Reference
from tpmp_kernels.prover.sites import Site, likeness


@dataclass(frozen=True)
class Check:
    """error: the largest of this rank's part, infinite where it has no such tensor; layout: None where its shape fits
    none."""

    error: float
    bound: float
    layout: Layout | None

    @property
    def right(self) -> bool:
        return self.error <= self.bound  # False for nan

    @property
    def ratio(self) -> float:
        return self.error / self.bound if self.bound else (0.0 if self.error == 0 else float("inf"))


@dataclass
class Judge:
    """run: "step", or "replay" where tensors give their places to the tape's.

    meant: None where it is not known yet which partial sums are meant to be: then a tensor that is wrong stays, so that
    it is right again behind the reduction where there is one. Otherwise those sites, of any microbatch, and all other
    tensors are replaced, so that no mistake is seen but where it is made.
    unclear: modules of which it cannot be told which call is which. split: see steps.split. modules: of this rank, by
    name. checks: what was compared. wrong: what this rank had where that was not its part of the tape, None where it
    had nothing. shapes: of tensors that are no part, (this rank's, the tape's).
    """

    reference: Reference
    run: str
    rank: int
    ranks: int
    meant: frozenset[Site] | None = None
    unclear: frozenset[str] = frozenset()
    split: frozenset[str] = frozenset()
    modules: dict[str, nn.Module] = field(default_factory=dict)
    checks: dict[Site, Check] = field(default_factory=dict)
    wrong: dict[Site, Tensor | None] = field(default_factory=dict)
    shapes: dict[Site, tuple] = field(default_factory=dict)

    def seen(self, site: Site, x: Tensor) -> Tensor | None:
        whole = self.reference.tape.get(site)
        if whole is None or x.is_complex() or (site.module in self.unclear and site.parameter is None):
            return None
        layout = layout_of(x.shape, whole.shape, self.rank, self.ranks, padded=self._padded(site))
        if layout is None or x.is_floating_point() != whole.is_floating_point():
            self.shapes[site] = (tuple(x.shape), tuple(whole.shape))
            return None
        part = layout.cut(whole)
        check = Check(_error(layout.real(x), part), self.bound(site), layout)
        self.checks[site] = check
        if not check.right:
            self.wrong[site] = x.detach().cpu().clone()
            if self.meant is None or likeness(site) in self.meant:
                return None
        return layout.filled(x, part) if self.run == "replay" and x.is_floating_point() else None

    def missing(self, site: Site) -> None:
        """There is no such tensor, but the reference has one."""
        self.checks[site] = Check(float("inf"), self.bound(site), None)
        self.wrong[site] = None

    def local(self, site: Site) -> Tensor | None:
        """What this rank had at the site, without padding; its part of the tape where that was right."""
        check = self.checks.get(site)
        if check is None or check.layout is None:
            return None
        if site in self.wrong:
            return check.layout.real(self.wrong[site])
        return check.layout.cut(self.reference.tape.get(site)).clone()

    def layout(self, site: Site) -> Layout | None:
        return self.checks[site].layout if site in self.checks else None

    def parts(self) -> dict[str, Layout]:
        """Of each parameter, where this rank's part lies in the whole."""
        return {s.parameter: c.layout for s, c in self.checks.items() if s.pass_ == "weights"}

    def bound(self, site: Site) -> float:
        bounds = self.reference.bounds
        return bounds.replay(site) if self.run == "replay" else bounds.step(site)

    def _padded(self, site: Site) -> bool:
        """Whether the module's weight is one whose vocabulary is padded: so are its results."""
        weight = getattr(self.modules.get(site.module), "weight", None)
        return hasattr(weight, "tp_unpadded") and not site.is_input


def _error(own: Tensor, part: Tensor) -> float:
    if not own.numel():
        return 0.0
    if not own.is_floating_point():
        return float((own.cpu() != part).sum())
    own = own.detach().double().cpu()
    off = (own - part).abs_()
    if bool(off.isfinite().all()):
        return float(off.max())
    return float(off.masked_fill_(own == part, 0.0).nan_to_num_(nan=float("inf")).max())  # infinite in both is equal
