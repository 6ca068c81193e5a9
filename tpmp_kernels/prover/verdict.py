"""The report: what the stages found, as differences in order of execution, rows and notes."""

from collections.abc import Iterator

import torch.distributed as dist

from tpmp_kernels.prover.findings import Finding, StageFindings, Status
from tpmp_kernels.prover.reference import Reference
from tpmp_kernels.prover.report import Difference, Report, Row, microbatch_words
from tpmp_kernels.prover.sites import PASSES, WHOLE_STEP, Site, place, shown
from tpmp_kernels.prover.subject import Subject

_RUNS = ("step", "replay")


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
            f"{shown(site.module)}, weights: in {site.slot[1:]}: {list(local)} is no part of {list(whole)}",
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
    drift = {name: ranks for found in stages for name, ranks in found.drift.items() if ranks}
    return [
        Difference(
            shown(name.rpartition(".")[0]),
            "replicas",
            None,
            "replica",
            f"{name}, replicas: behind the step rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} "
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
    drift = {name: ranks for found in stages for name, ranks in found.drift.items()}
    if drift:
        yield Row("step", "replicas", len(drift), sum(map(bool, drift.values())), 0.0, "bits")


def _notes(stages: list[StageFindings], reference: Reference) -> Iterator[str]:
    odd = {site: pair for found in stages for site, pair in found.shapes.items() if site.pass_ != "weights"}
    for site in list(dict.fromkeys(site._replace(microbatch=0) for site in odd))[:8]:
        local, whole = next(pair for each, pair in odd.items() if each._replace(microbatch=0) == site)
        yield f"{shown(site.module)}, {site.pass_} {site.slot}: {list(local)} is no part of {list(whole)}"
    for name in sorted({name for found in stages for name in found.unclear}):
        yield f"{shown(name)}: several stages call it, so that it is not clear which call is which; give each its own"
    modules = dict.fromkeys(shown(site.module) for site in reference.bounds.vague())
    if modules:
        yield (
            f"{', '.join(list(modules)[:4])}: the reference itself is not the same twice, so that rounding cannot be "
            "told from a mistake; make its randomness a function of a seed (tensor_parallel.Dropout)"
        )
