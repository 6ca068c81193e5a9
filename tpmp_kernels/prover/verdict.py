"""What all ranks found, brought together: differences are diagnosed from the tensors of a stage's ranks, and those that
are no mistake are taken out."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch.distributed as dist

from tpmp_kernels.prover.diagnose import Case, diagnose
from tpmp_kernels.prover.judge import Judge
from tpmp_kernels.prover.reference import Reference
from tpmp_kernels.prover.report import Difference, Report, Row, microbatch_words
from tpmp_kernels.prover.sites import PASSES, WHOLE_STEP, Site, likeness, of_parameter, place, shown
from tpmp_kernels.prover.subject import Subject
from tpmp_kernels.training.layout import Layout

_DIAGNOSED = 64  # of a stage; further ones only where nothing like them was
_RUNS = ("step", "replay")


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
    """What the ranks of one stage found. statuses (by run) and findings are with the first of them alone.

    shapes: of tensors that fit no layout, (the rank's, the reference's). parameters: those that this rank holds.
    meant: sites where partial sums are meant to be. called: modules that its step called. drift: see steps.replicas.
    """

    parameters: frozenset[str]
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


def gather(found: StageFindings, judges: Iterable[Judge], subject: Subject, where: Layout) -> None:
    """Add to `found` what the judges of the ranks of a stage saw, and diagnose it. Collective over these ranks."""
    group = where.mesh.get_group("tp")
    for judge in judges:
        statuses = _merged(_gathered({s: (c.ratio, c.right) for s, c in judge.checks.items()}, where, group))
        for theirs in _gathered(judge.shapes, where, group):
            found.shapes |= theirs
        wrong = [site for site, status in statuses.items() if not status.right]
        wrong.sort(key=judge.reference.order)
        diagnosed = []
        for site in _worth_diagnosing(wrong):
            every = _gathered((judge.local(site), _layout(judge, site)), where, group)
            if where.tp.rank == 0:
                diagnosed.append(_finding(site, judge, every, subject, statuses[site]))
        if where.tp.rank == 0:
            found.findings += diagnosed + _like(wrong, diagnosed)
            found.statuses.setdefault(judge.run, {}).update(statuses)
        meant = {likeness(f.site) for f in found.findings if _is_meant(f, found, judge.meant is not None)}
        found.meant = _gathered(found.meant | meant, where, group)[0]
        for finding in [f for f in found.findings if f.kind == "partial" and likeness(f.site) in found.meant]:
            found.findings.remove(finding)
            found.statuses[finding.run][finding.site] = Status(0.0, True)


def _merged(every: list[dict[Site, tuple[float, bool]]]) -> dict[Site, Status]:
    """Of each site on all ranks; one that a rank has not seen is wrong there."""
    merged = {}
    for site in {site for theirs in every for site in theirs}:
        of_ranks = [theirs.get(site, (float("inf"), False)) for theirs in every]
        merged[site] = Status(max(ratio for ratio, _ in of_ranks), all(right for _, right in of_ranks))
    return merged


def _gathered(mine, where: Layout, group) -> list:
    every: list = [mine]
    if where.tp.size > 1:
        every = [None] * where.tp.size
        dist.all_gather_object(every, mine, group=group)
    return every


def _layout(judge: Judge, site: Site):
    return judge.checks[site].layout if site in judge.checks else None


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


def _finding(site: Site, judge: Judge, every: list, subject: Subject, status: Status) -> Finding:
    locals_, layouts = zip(*every, strict=True)
    bound = judge.reference.bounds.replay(site) if judge.run == "replay" else judge.reference.bounds.step(site)
    tape = judge.reference.tape
    case = Case(
        site, list(locals_), list(layouts), tape.get(site), bound, subject.microbatches, tape.get, subject.tokens
    )
    kind, words = diagnose(case)
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


def of_all(mine: StageFindings, reference: Reference, subject: Subject) -> Report:
    """The report, the same on every rank. Collective over all ranks."""
    every: list = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    called = reference.called.union(*(found.called for found in every))
    findings = [finding for found in every for finding in found.findings]
    # What the replay finds is free of what went wrong before it, and so explains what the step has.
    findings = [f for f in findings if f.run == "replay"] or findings
    told = {f.site.parameter for f in findings if f.site.pass_ == "backward"} - {None}
    findings = [f for f in findings if f.site.pass_ != "gradients" or f.site.parameter not in told]
    findings.sort(key=lambda f: reference.order(f.site))
    differences = [
        *_missing(every, reference),
        *_misshapen(every),
        *_told(findings, called),
        *_drifted(every),
    ]
    differences.sort(key=lambda each: PASSES.index(each.pass_))
    return Report(subject.title, tuple(_rows(every)), tuple(differences), tuple(_notes(every, reference)))


def _missing(stages: list[StageFindings], reference: Reference) -> list[Difference]:
    held = {name for found in stages for name in found.parameters}
    lost = [name for name, owner in reference.owners.items() if name not in held and owner not in held]
    if not lost:
        return []
    more = f" and {len(lost) - 1} more parameters" if len(lost) > 1 else ""
    sentence = f"{lost[0]}{more}, weights: no rank holds what the reference has"
    return [Difference(shown(lost[0].rpartition(".")[0]), "weights", None, "missing", sentence, float("inf"), 0.0)]


def _misshapen(stages: list[StageFindings]) -> list[Difference]:
    shapes = {site: pair for found in stages for site, pair in found.shapes_of("weights").items()}
    return [
        Difference(
            shown(site.module),
            "weights",
            None,
            "shape",
            f"{shown(site.module)}, weights: in {site.slot}: {list(local)} is no part of {list(whole)}",
            float("inf"),
            0.0,
        )
        for site, (local, whole) in shapes.items()
    ]


def _told(findings: list[Finding], called: frozenset[str]) -> list[Difference]:
    differences = []
    for f in findings:
        module, detail = place(f.site, called)
        microbatch = None if f.site.microbatch == WHOLE_STEP else f.site.microbatch
        where = f"{module}, {f.site.pass_}{microbatch_words(f.site.microbatch)}"
        sentence = f"{where}: {detail + ': ' if detail else ''}{f.words}"
        differences.append(Difference(module, f.site.pass_, microbatch, f.kind, sentence, f.error, f.bound))
    return differences


def _drifted(stages: list[StageFindings]) -> list[Difference]:
    drift = {name: ranks for found in stages for name, ranks in found.drift.items()}
    return [
        Difference(
            shown(name.rpartition(".")[0]),
            "replicas",
            None,
            "replica",
            f"{name}, replicas: behind the step tp rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} "
            "and the first rank that holds the same differ in their bits, and will drift apart",
            0.0,
            0.0,
        )
        for name, ranks in drift.items()
    ]


def _rows(stages: list[StageFindings]) -> Iterator[Row]:
    for run in _RUNS:
        merged: dict[Site, list[Status]] = {}
        for found in stages:
            for site, status in found.statuses.get(run, {}).items():
                merged.setdefault(site, []).append(status)
        for pass_ in PASSES:
            sites = {site: every for site, every in merged.items() if site.pass_ == pass_}
            if not sites:
                continue
            ratio = {site: max(status.ratio for status in every) for site, every in sites.items()}
            worst = max(ratio, key=lambda site: (ratio[site], site))
            different = sum(not all(status.right for status in every) for every in sites.values())
            yield Row(run, pass_, len(sites), different, ratio[worst], shown(worst.module))


def _notes(stages: list[StageFindings], reference: Reference) -> Iterator[str]:
    odd = {site: pair for found in stages for site, pair in found.shapes.items() if site.pass_ != "weights"}
    for site in list(dict.fromkeys(site._replace(microbatch=0) for site in odd))[:8]:
        local, whole = next(pair for each, pair in odd.items() if each._replace(microbatch=0) == site)
        yield f"{shown(site.module)}, {site.pass_} {site.slot}: {list(local)} is no part of {list(whole)}"
    modules = dict.fromkeys(shown(site.module) for site in reference.bounds.vague())
    if modules:
        yield (
            f"{', '.join(list(modules)[:4])}: the reference itself is not the same twice, so that rounding cannot be "
            "told from a mistake; make its randomness a function of a seed (tensor_parallel.Dropout)"
        )
