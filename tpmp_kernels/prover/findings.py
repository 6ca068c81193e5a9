"""What the ranks of a stage found: their comparisons brought together, differences diagnosed from the tensors of all of
them, and partial sums that are no mistake taken out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch.distributed as dist

from tpmp_kernels.prover.diagnose import EVERY, Case, Test, diagnose
from tpmp_kernels.prover.judge import Judge
from tpmp_kernels.prover.sites import Site, likeness, of_parameter
from tpmp_kernels.prover.subject import Subject
from tpmp_kernels.training.layout import Layout

_DIAGNOSED = 64  # further ones only where nothing like them was
_AT_ONCE = 16  # sites whose tensors the ranks exchange in one message


@dataclass(frozen=True)
class Finding:
    """A site where some rank of a stage is wrong."""

    site: Site
    run: str
    kind: str
    words: str
    error: float
    bound: float


@dataclass(frozen=True)
class Status:
    """Of a site on all ranks of a stage: the largest error in units of its bound."""

    ratio: float
    right: bool


@dataclass
class StageFindings:
    """statuses (by run) and findings are with the first rank of the stage alone.

    shapes: of tensors that fit no layout, (the rank's, the reference's). parameters: those that this rank holds.
    unclear: see steps.unclear.
    meant: sites where partial sums are meant to be. called: modules that its step called. drift: see steps.replicas.
    """

    parameters: frozenset[str]
    unclear: frozenset[str] = frozenset()
    statuses: dict[str, dict[Site, Status]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    shapes: dict[Site, tuple] = field(default_factory=dict)
    meant: frozenset[Site] = frozenset()
    called: set[str] = field(default_factory=set)
    drift: dict[str, list[int]] = field(default_factory=dict)

    def forget(self, run: str) -> None:
        """Make room for what the same run finds when it is better known where to look."""
        self.statuses.pop(run, None)
        self.findings = [finding for finding in self.findings if finding.run != run]

    def shapes_of(self, pass_: str) -> dict[Site, tuple]:
        return {site: pair for site, pair in self.shapes.items() if site.pass_ == pass_}


def add(
    found: StageFindings, judge: Judge, subject: Subject, where: Layout, *, tests: Sequence[Test] | None = EVERY
) -> None:
    """Add what the judges of the stage's ranks saw in a run. Collective over these ranks.

    tests: the mistakes that differences are tried against; None: differences are counted, and not yet looked into.
    """
    checks = _gathered({site: (check.ratio, check.right) for site, check in judge.checks.items()}, where)
    for theirs in _gathered(judge.shapes, where):
        found.shapes |= theirs
    statuses = _merged(checks)
    if where.tp.rank == 0:
        found.statuses.setdefault(judge.run, {}).update(statuses)
    if tests is not None:
        diagnosed = list(_diagnosed(statuses, judge, subject, where, tests))
        if where.tp.rank == 0:
            found.findings += diagnosed + _like(_wrong(statuses, judge), diagnosed)
        meant = {likeness(f.site) for f in found.findings if _is_meant(f, found, isolated=judge.meant is not None)}
        found.meant = _gathered(found.meant | meant, where)[0]
    found.findings = [f for f in found.findings if not (f.kind == "partial" and likeness(f.site) in found.meant)]
    for statuses in found.statuses.values():
        right = {site: Status(0.0, True) for site, each in statuses.items() if not each.right}
        statuses.update({site: each for site, each in right.items() if likeness(site) in found.meant})


def _merged(every: list[dict[Site, tuple[float, bool]]]) -> dict[Site, Status]:
    """Of each site on all ranks; one that a rank has not seen is wrong there."""
    merged = {}
    for site in {site for theirs in every for site in theirs}:
        of_ranks = [theirs.get(site, (float("inf"), False)) for theirs in every]
        merged[site] = Status(max(ratio for ratio, _ in of_ranks), all(right for _, right in of_ranks))
    return merged


def _gathered(mine, where: Layout) -> list:
    every: list = [mine]
    if where.tp.size > 1:
        every = [None] * where.tp.size
        dist.all_gather_object(every, mine, group=where.mesh.get_group("tp"))
    return every


def _diagnosed(
    statuses: dict[Site, Status], judge: Judge, subject: Subject, where: Layout, tests: Sequence[Test]
) -> Iterator[Finding]:
    """On the first rank. Collective."""
    sites = list(_worth_diagnosing(_wrong(statuses, judge)))
    for first in range(0, len(sites), _AT_ONCE):
        batch = sites[first : first + _AT_ONCE]
        every = _gathered([(judge.local(site), judge.layout(site)) for site in batch], where)
        if where.tp.rank == 0:
            for site, tensors in zip(batch, zip(*every, strict=True), strict=True):
                yield _finding(site, judge, tensors, subject, statuses[site], tests)


def _wrong(statuses: dict[Site, Status], judge: Judge) -> list[Site]:
    return sorted((site for site, status in statuses.items() if not status.right), key=judge.reference.order)


def _worth_diagnosing(wrong: list[Site]) -> Iterator[Site]:
    seen: set[tuple] = set()
    for number, site in enumerate(wrong):
        if number < _DIAGNOSED or likeness(site) not in seen:
            yield site
        seen.add(likeness(site))


def _like(wrong: list[Site], diagnosed: list[Finding]) -> list[Finding]:
    """Findings for the sites that were not diagnosed, as those of another microbatch."""
    known = {likeness(f.site): f for f in reversed(diagnosed)}
    done = {f.site for f in diagnosed}
    return [replace(known[likeness(site)], site=site) for site in wrong if site not in done]


def _finding(
    site: Site, judge: Judge, tensors: tuple, subject: Subject, status: Status, tests: Sequence[Test]
) -> Finding:
    locals_, layouts = zip(*tensors, strict=True)
    tape, bound = judge.reference.tape, judge.bound(site)
    case = Case(
        site, list(locals_), list(layouts), tape.get(site), bound, subject.microbatches, tape.get, subject.tokens
    )
    kind, words = diagnose(case, tests)
    return Finding(site, judge.run, kind, words, status.ratio * bound if bound else status.ratio, bound)


def _is_meant(finding: Finding, found: StageFindings, isolated: bool) -> bool:
    """Whether a partial sum is one by design: what stands around it adds it up, and is right. isolated: what stands
    around it is right for another reason, and only a step's gradients say that those of a microbatch are added."""
    site, statuses = finding.site, found.statuses[finding.run]
    if finding.kind != "partial":
        return False
    if site.parameter is not None:
        # Of one microbatch: added once a step.
        total = statuses.get(of_parameter("gradients", site.parameter))
        return site.pass_ == "backward" and total is not None and total.right
    if isolated:
        return False
    around = _around(site, statuses)
    if around is None or statuses[around].right:
        return around is not None
    outer = next((f for f in found.findings if (f.site, f.run) == (around, finding.run)), None)
    return outer is not None and _is_meant(outer, found, isolated)


def _around(site: Site, found: dict[Site, Status]) -> Site | None:
    """Behind an input or its gradient the same module's other end, around an output the nearest module's."""
    if site.pass_ == "forward" and site.is_input:
        return next((s for s in found if s[:4] == site[:4] and s.is_output), None)
    name, end = site.module, "out" if site.pass_ == "forward" else "in"
    if site.pass_ == "backward" and site.is_output:
        return next((s for s in found if s[:4] == site[:4] and s.is_input), None)
    while name:
        name = name.rpartition(".")[0]
        near = [s for s in found if s[:3] == (site.pass_, site.microbatch, name) and s.slot.split(".")[0] == end]
        if near:
            return near[0]
    return None
