"""Which mistake a difference looks like: the tensors of all ranks, tried against what usual mistakes would make of the
reference. Every test is an equality within the site's bound, so that a name is given only where it explains all ranks.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tpmp_kernels.prover.layouts import Layout
from tpmp_kernels.prover.sites import LOSS, Site, of_parameter

_OFFSETS = (1, -1, 2, -2)


@dataclass(frozen=True)
class Case:
    """locals, layouts: of each tensor-parallel rank, without padding, None where it has none. fetch: the tape's.
    tokens: targets of the microbatch."""

    site: Site
    locals: list[Tensor | None]
    layouts: list[Layout | None]
    whole: Tensor
    bound: float
    microbatches: int
    fetch: Callable[[Site], Tensor | None]
    tokens: int

    @property
    def ranks(self) -> int:
        return len(self.locals)

    def part(self, rank: int, of: Tensor | None = None) -> Tensor:
        """What the rank should hold of the reference, or of another tensor of its shape."""
        return self.layouts[rank].cut(self.whole if of is None else of)

    def close(self, a: Tensor, b: Tensor, times: float = 1.0) -> bool:
        """Equal within what rounding explains, where `times` such tensors were added or multiplied."""
        if a.shape != b.shape or not a.numel():
            return a.shape == b.shape
        off = (a.double() - b.double()).abs()
        return bool((off.masked_fill(a == b, 0.0) <= self.bound * max(1.0, abs(times))).all())

    def wrong(self) -> list[int]:
        return [r for r in range(self.ranks) if not self.close(self.locals[r], self.part(r))]


Test = Callable[["Case", list[int]], tuple[str, str] | None]


def diagnose(case: Case, tests: Sequence[Test]) -> tuple[str, str]:
    """(kind, words) of a difference. tests: those of EVERY that are to be tried."""
    if all(local is None for local in case.locals):
        return "missing", "there is none on any rank, but the reference has one"
    if any(local is None for local in case.locals):
        absent = [r for r, local in enumerate(case.locals) if local is None]
        return "missing", f"there is none on {_ranks(absent, case)}, but the reference has one"
    wrong = case.wrong()
    for test in tests:
        found = test(case, wrong) or (test in (_partial, _scale) and _without_bias(case, test, wrong))
        if found:
            kind, words = found
            only = f" (on {_ranks(wrong, case)} alone)" if 0 < len(wrong) < case.ranks and kind != "partial" else ""
            return kind, words + only
    return _replica(case, wrong) or ("values", _worst(case, wrong))


def _without_bias(case: Case, test: Callable, wrong: list[int]):
    """The test on what a layer adds its bias to."""
    bias = case.fetch(of_parameter("weights", f"{case.site.module}.bias"))
    if not (case.site.pass_ == "forward" and case.site.is_output) or bias is None or bias.dim() != 1:
        return None
    if case.whole.shape[-1:] != bias.shape:
        return None
    added = bias.expand(case.whole.shape)
    for times in range(2, case.ranks + 2):
        if all(case.close(case.locals[r], case.part(r) + (times - 1) * case.part(r, added), times) for r in wrong):
            return "scale", f"the bias is added {times} times: in front of a reduction every rank adds it"
    stripped = [own - case.part(r, added) for r, own in enumerate(case.locals)]
    found = test(replace(case, locals=stripped, whole=case.whole - added), wrong)
    return found and (found[0], f"but for the bias, {found[1]}")


def _nonfinite(case: Case, wrong: list[int]):
    bad = [r for r in wrong if not case.locals[r].isfinite().all() and case.part(r).isfinite().all()]
    return ("nonfinite", "it has infinities or NaNs where the reference has none") if bad else None


def _partial(case: Case, wrong: list[int]):
    """Ranks that should hold the same hold summands of it."""
    blocks: dict[int, list[int]] = {}
    for rank, layout in enumerate(case.layouts):
        blocks.setdefault(layout.block, []).append(rank)
    if all(len(ranks) == 1 for ranks in blocks.values()) or not case.whole.is_floating_point():
        return None
    if all(case.close(case.locals[ranks[0]], case.locals[r], 2) for ranks in blocks.values() for r in ranks):
        return None  # no summands, but the same number too large or too small on each
    sums = {block: sum(case.locals[r].double() for r in ranks) for block, ranks in blocks.items()}
    n = len(blocks[0])
    for factor, how, missing in (
        (1.0, "a partial sum (their sum equals the reference)", "a reduction"),
        (1 / n, "the value of its own part (their mean equals the reference)", "an average"),
    ):
        if all(case.close(sums[b] * factor, case.part(ranks[0]), n) for b, ranks in blocks.items()):
            return "partial", f"each rank holds {how}; {missing} over tp is missing"
    return None


def _stale(case: Case, wrong: list[int]):
    before = case.fetch(case.site._replace(pass_="weights")) if case.site.pass_ == "update" else None
    if before is None:
        return None
    if all(case.close(case.locals[r], case.part(r, before)) for r in wrong):
        return "stale", "it equals the reference's value before the update; nothing updates this copy"
    own = [case.locals[r].double() - case.part(r, before) for r in wrong]
    return _ratio(case, own, [case.part(r) - case.part(r, before) for r in wrong], "the update equals the reference's")


def _scale(case: Case, wrong: list[int]):
    own, parts = [case.locals[r].double() for r in wrong], [case.part(r) for r in wrong]
    return _ratio(case, own, parts, "it equals the reference")


def _ratio(case: Case, own: list[Tensor], parts: list[Tensor], what: str):
    if not case.whole.is_floating_point():
        return None
    a, b = torch.cat([t.flatten() for t in own]), torch.cat([t.flatten() for t in parts]).double()
    square = float(b @ b)
    if not math.isfinite(square) or square == 0:
        return None
    ratio = float(a @ b) / square
    for known, words in _known_ratios(case):
        if case.close(a, known * b, known) and not case.close(b, known * b):
            return "scale", f"{what} {words}"
    # Any scalar is some multiple of another: a number without a name says something of a tensor alone.
    if a.numel() >= 4 and case.close(a, ratio * b, ratio) and not case.close(a, b):
        return "scale", f"{what} times {_number(ratio)}" if ratio else "it is zero"
    return None


def _known_ratios(case: Case) -> Iterable[tuple[float, str]]:
    tp, m = case.ranks, case.microbatches
    if tp > 1:
        yield tp, f"times {tp}, the number of tp ranks: it is reduced twice, or averaged over local tokens and added"
        yield 1 / tp, f"times 1/{tp}, by the number of tp ranks: it is averaged where it should be added"
        yield tp * tp, f"times {tp * tp}, the square of the number of tp ranks: it is reduced three times"
    if m > 1:
        yield 1 / m, f"times 1/{m}, by the number of microbatches: it is scaled by them twice"
        yield m, f"times {m}, the number of microbatches: it is not scaled by them"
        yield (
            1 / m**2,
            f"times 1/{m * m}, by the square of the number of microbatches: it is scaled by them three times",
        )
    yield -1, "with the other sign"
    yield 0, "times 0: it is zero"


def _number(ratio: float) -> str:
    for q in range(1, 65):
        p = round(ratio * q)
        if p and abs(ratio * q - p) < 1e-6 * q:
            return f"{p}/{q}" if q > 1 else str(p)
    return f"{ratio:.6g}"


def _loss(case: Case, wrong: list[int]):
    """Whole logits in a loss that takes shards: each rank's sum of exponentials is added: log(R) too much."""
    if case.site.module != LOSS or case.ranks == 1:
        return None
    for tokens in (1, case.tokens):
        if all(case.close(case.locals[r], case.part(r) + tokens * math.log(case.ranks)) for r in wrong):
            return "scale", (
                f"it is log(tp) = log({case.ranks}) a token too large: whole logits are given to a loss that takes "
                "shards of the vocabulary, and so the sum of exponentials is reduced twice"
            )
    return None


def _shard(case: Case, wrong: list[int]):
    return _permuted(case, wrong) or _offset(case, wrong) or _transposed(case, wrong) or _regrouped(case, wrong)


def _permuted(case: Case, wrong: list[int]):
    layout = case.layouts[0]
    if layout.dim is None:
        return None
    parts = {each.block: case.part(r) for r, each in enumerate(case.layouts)}
    held = [next((b for b, p in parts.items() if case.close(case.locals[r], p)), None) for r in range(case.ranks)]
    if None in held:
        return None
    return "shard", "; ".join(
        f"tp rank {r} holds part {held[r]} of the reference in place of {b}"
        for r, b in ((r, case.layouts[r].block) for r in wrong)
    )


def _offset(case: Case, wrong: list[int]):
    layout = case.layouts[0]
    if layout.dim is None:
        return None
    whole = case.whole.reshape(layout.shape)
    for by in _OFFSETS:
        if layout.size > 2 * abs(by) and all(_shifted(case, r, whole, by) for r in wrong):
            return "shard", f"each rank's part begins {_off(by)} along dimension {layout.dim} of the reference"
    return None


def _shifted(case: Case, rank: int, whole: Tensor, by: int) -> bool:
    """Whether the rank's part is that which begins `by` further on, as far as there is one."""
    layout = case.layouts[rank]
    start = layout.start + by
    first, last = max(0, -start), min(layout.size, whole.shape[layout.dim] - start)
    own = case.locals[rank].narrow(layout.dim, first, last - first)
    return case.close(own, whole.narrow(layout.dim, start + first, last - first))


def _transposed(case: Case, wrong: list[int]):
    whole = case.whole
    for i in range(whole.dim()):
        for j in range(i + 1, whole.dim()):
            turned = whole.transpose(i, j)
            if turned.shape == whole.shape and all(case.close(case.locals[r], case.part(r, turned)) for r in wrong):
                return "shard", f"it is the reference with dimensions {i} and {j} transposed"
            for dim in (i, j):
                pieces = [p.transpose(i, j) for p in whole.chunk(case.ranks, dim=dim)]
                if len(pieces) == case.ranks > 1 and all(case.close(case.locals[r], pieces[r]) for r in wrong):
                    return "shard", (
                        f"each rank holds its part along dimension {dim} transposed, in place of its part along "
                        f"dimension {j if dim == i else i}"
                    )
    return None


def _regrouped(case: Case, wrong: list[int]):
    """Parts of all ranks put together in another order, or cut along another dimension than they are joined."""
    n = case.ranks
    for r in wrong:
        own, part = case.locals[r], case.part(r)
        if own.shape != part.shape or n == 1:
            return None
        for dim in range(own.dim()):
            if own.shape[dim] % n or own.shape[dim] == n:
                continue
            mine, theirs = own.chunk(n, dim), part.chunk(n, dim)
            order = [next((i for i, p in enumerate(theirs) if case.close(m, p)), None) for m in mine]
            if None not in order and order != list(range(n)):
                return "shard", f"its {n} parts along dimension {dim} are those of the reference in the order {order}"
            for groups in ((n, -1), (-1, n)):
                turned = part.unflatten(dim, groups).transpose(dim, dim + 1).flatten(dim, dim + 1)
                if case.close(own, turned):
                    return "shard", (
                        f"along dimension {dim} the reference is dealt out to {groups[0] if groups[0] > 0 else n} "
                        "ranks one by one in place of in blocks, or the other way round"
                    )
    return None


def _token_offset(case: Case, wrong: list[int]):
    """An embedding that looks up the neighbours of its tokens."""
    site = case.site
    tokens = case.fetch(site._replace(slot="in.0")) if site.pass_ == "forward" and site.is_output else None
    weight = case.fetch(of_parameter("weights", f"{site.module}.weight"))
    if tokens is None or weight is None or tokens.is_floating_point() or weight.dim() != 2:
        return None
    if case.whole.shape != (*tokens.shape, weight.shape[1]):
        return None
    for by in _OFFSETS:
        moved = weight[(tokens + by).clamp(0, len(weight) - 1)]
        # At the ends of the shards some tokens are nobody's, or two ranks': those rows are something else.
        if all(_rows_alike(case, case.locals[r], case.part(r, moved)) > 0.5 for r in wrong):
            return "shard", f"most tokens get the row that is {_off(by)}: each rank's ids begin {_off(-by)}"
    return None


def _rows_alike(case: Case, own: Tensor, other: Tensor) -> float:
    rows = (own.double() - other).abs().flatten(0, -2).amax(-1) <= case.bound
    return float(rows.double().mean())


def _microbatch(case: Case, wrong: list[int]):
    site = case.site
    for other in range(case.microbatches if site.microbatch >= 0 else 0):
        theirs = case.fetch(site._replace(microbatch=other))
        if other == site.microbatch or theirs is None or theirs.shape != case.whole.shape:
            continue
        if all(case.close(case.locals[r], case.part(r, theirs)) for r in wrong):
            return "microbatch", f"it is the reference's of microbatch {other}"
    return _accumulated(case, wrong) if site.pass_ == "gradients" else None


def _accumulated(case: Case, wrong: list[int]):
    """A step's gradient that has those of some microbatches alone."""
    each = [case.fetch(case.site._replace(pass_="backward", microbatch=m)) for m in range(case.microbatches)]
    if case.microbatches == 1 or any(grad is None for grad in each):
        return None
    tries = [(grad, "it is the gradient of microbatch {} alone: others are overwritten, not added") for grad in each]
    tries += [(case.whole - grad, "the gradient of microbatch {} is missing in it") for grad in each]
    tries += [(case.whole + grad, "the gradient of microbatch {} is in it twice") for grad in each]
    for number, (made, words) in enumerate(tries):
        if all(case.close(case.locals[r], case.part(r, made)) for r in wrong):
            return "microbatch", words.format(number % case.microbatches)
    return None


def _rng(case: Case, wrong: list[int]):
    """Equal wherever neither is zero, while each is zero where the other is not (an activation would do one alone)."""
    for r in wrong:
        own, part = case.locals[r].double(), case.part(r).double()
        if own.numel() < 8 or own.shape != part.shape:
            return None
        both, dropped, kept = (own != 0) & (part != 0), (own == 0) & (part != 0), (own != 0) & (part == 0)
        if not (both.any() and case.close(own[both], part[both])):
            return None
        if min(int(dropped.sum()), int(kept.sum())) * 50 < own.numel():
            return None
    return "rng", (
        "it equals the reference up to a mask: the mask of a dropout is not this rank's part of the whole's (see "
        "tensor_parallel.Dropout)"
    )


def _replica(case: Case, wrong: list[int]):
    right = [r for r in range(case.ranks) if r not in wrong]
    same = [(a, b) for a in right for b in wrong if case.layouts[a].block == case.layouts[b].block]
    if not same:
        return None
    return "replica", f"{_ranks(wrong, case)} should hold the same as {_ranks(right, case)}; {_worst(case, wrong)}"


def _worst(case: Case, wrong: list[int]) -> str:
    off = {r: (case.locals[r].double() - case.part(r).double()).abs() for r in wrong}
    if not off:
        return f"it differs by more than {case.bound:.1e}"
    rank = max(off, key=lambda r: float(off[r].max()))
    at = [int(i) for i in torch.unravel_index(off[rank].argmax(), off[rank].shape)]
    share = float((off[rank] > case.bound).double().mean())
    own, want = float(case.locals[rank][tuple(at)]), float(case.part(rank)[tuple(at)])
    return (
        f"{100 * share:.3g} % of the elements on tp rank {rank} differ by more than rounding ({case.bound:.1e}), most "
        f"at {at}: {own:.6g}, the reference has {want:.6g}"
    )


def _off(by: int) -> str:
    return f"{abs(by)} too {'far' if by > 0 else 'early'}"


def _ranks(ranks: list[int], case: Case) -> str:
    if len(ranks) == case.ranks:
        return "all tp ranks" if case.ranks > 1 else "this rank"
    return f"tp rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


SUMMANDS = (_partial,)
EVERY = (_nonfinite, _partial, _stale, _loss, _scale, _shard, _token_offset, _microbatch, _rng)
