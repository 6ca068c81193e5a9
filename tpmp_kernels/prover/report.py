"""What a proof says: every comparison summed up in rows, the first difference, and a table of both."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tpmp_kernels.prover.sites import PASSES, WHOLE_STEP

KINDS = {
    "partial": "each rank holds a partial sum: a reduction is missing",
    "scale": "the reference times a number: reduced twice, averaged over local tokens, scaled twice",
    "shard": "another part of the reference: shards permuted, transposed, or off by one",
    "replica": "ranks that should hold the same do not",
    "rng": "the reference up to the mask of a dropout",
    "stale": "the reference before the update",
    "microbatch": "the reference of other microbatches",
    "missing": "there is none",
    "shape": "neither whole nor a shard of it",
    "nonfinite": "infinite or not a number where the reference is finite",
    "values": "none of these",
}


@dataclass(frozen=True)
class Difference:
    """module, in execution order the first that differs; "model" is the root, "loss" the loss, "optimizer" what is
    global to it. pass_: weights, forward, backward, gradients (of the step), update or replicas. microbatch: None
    where it is no one's. kind: one of KINDS. error: the largest; bound: the largest that rounding explains."""

    module: str
    pass_: str
    microbatch: int | None
    kind: str
    sentence: str
    error: float
    bound: float

    def __str__(self) -> str:
        return self.sentence


@dataclass(frozen=True)
class Row:
    """A pass of a run: "step", the parallel step as it is, or "replay", each module on the reference's tensors.

    checks: tensors compared on all ranks; worst: the largest error in units of its bound, and the module with it.
    """

    run: str
    pass_: str
    checks: int
    different: int
    worst: float
    where: str


@dataclass(frozen=True)
class Report:
    """differences: in order of execution; notes: what was not compared."""

    title: str
    rows: tuple[Row, ...]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        return not self.differences

    @property
    def first(self) -> Difference | None:
        return self.differences[0] if self.differences else None

    def __bool__(self) -> bool:
        return self.equal

    def __str__(self) -> str:
        return f"{self.title}\n{self.table()}"

    def table(self) -> str:
        """All but the title."""
        lines = ["", *_table(self.rows), *(f"not compared: {note}" for note in self.notes), ""]
        if self.equal:
            lines += ["equal: every difference is rounding"]
        else:
            lines += [f"DIFFERENT, first: {self.first.sentence}"]
            alike = _alike(self.differences)
            lines += [f"  {line}" for line in alike[:_SHOWN]]
            if len(alike) > _SHOWN:
                lines += [f"  and {len(alike) - _SHOWN} more"]
        return "\n".join(lines)


_SHOWN = 12


def _alike(differences: Sequence[Difference]) -> list[str]:
    """The sentences but for the first, those that differ in their numbers alone as one for several microbatches."""
    groups: dict[tuple[str, str, str], list[Difference]] = {}
    for each in differences:
        words = re.sub(r"[-+.\de]+", "", each.sentence.partition(": ")[2])
        groups.setdefault((each.module, each.pass_, words), []).append(each)
    lines = []
    for number, group in enumerate(groups.values()):
        module, pass_, words = group[0].module, group[0].pass_, group[0].sentence.partition(": ")[2]
        found = [each.microbatch for each in group]
        if number == 0 and len(found) > 1 and found[0] is not None:
            lines.append(f"and the same in microbatches {', '.join(map(str, found[1:]))}")
        if number > 0:
            which = f", microbatch{'es' * (len(found) > 1)} {', '.join(map(str, found))}"
            lines.append(f"then: {module}, {pass_}{'' if found[0] is None else which}: {words}")
    return lines


def microbatch_words(microbatch: int) -> str:
    return "" if microbatch == WHOLE_STEP else f", microbatch {microbatch}"


def _table(rows: Sequence[Row]) -> list[str]:
    order = {"step": 0, "replay": 1}
    lines = [("run", "pass", "compared", "different", "largest error / bound", "of")]
    for row in sorted(rows, key=lambda row: (order[row.run], PASSES.index(row.pass_))):
        lines.append((row.run, row.pass_, str(row.checks), str(row.different or "-"), f"{row.worst:.2g}", row.where))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
