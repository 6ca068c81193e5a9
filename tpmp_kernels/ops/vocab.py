"""What both losses share: their options, the statistics of logits that come in pieces, the loss and the gradient.

    peak = max z    others = sum exp(z - peak) but for the target    total = others + exp(z_target - peak)
    lse  = peak + log(total)    p = exp(z - peak) / total    shortfall = sum(peak - z)
    loss = (1 - a) (lse - z_target) + a (log(total) + shortfall / V) + c lse^2
    d    = g [(1 - a) (p - onehot) + a (p - 1 / V) + 2 c lse p]

a is label_smoothing, c z_loss, V the number of classes, g the upstream gradient of the token. peak and log(total) are
never added before something is subtracted: at logits of 1e4 their fp32 sum would be wrong in the fourth digit, and so
would sum(z); of the shortfall, nothing is ever subtracted. Nor is p - 1 of the target, -others / total: from a p within
1e-8 of 1, fp32 would make 0 of loss and gradient.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tpmp_kernels.ops import backend, checks, groups

REDUCTIONS = ("mean", "sum", "none")
# The fields of Loss as they stand in a schema.
SCHEMA = (
    "int group, SymInt start, SymInt vocab_size, float label_smoothing, float z_loss, float? softcap, "
    "int ignore_index, str reduction"
)
# Elements of a piece of logits whose passes stay in a core's second-level cache: 1 MiB in fp32. Wider rows are cut.
_TILE, _WIDEST = 1 << 18, 2048


@dataclass(frozen=True)
class Loss:
    """All of a loss but its tensors. This rank's columns are the ids from `start` on; from vocab_size on, padding."""

    group: int
    start: int
    vocab_size: int
    label_smoothing: float
    z_loss: float
    softcap: float | None
    ignore_index: int
    reduction: str

    def classes(self, columns: int) -> int:
        """How many of this rank's columns are no padding."""
        return max(0, min(columns, self.vocab_size - self.start))

    def checksum(self, grad_scale: float | None) -> int:
        """Of what must be the same on all ranks."""
        options = (self.label_smoothing, self.z_loss, self.softcap, self.ignore_index, grad_scale)
        return zlib.crc32(repr(options).encode())


def arguments(
    op: str,
    columns: int,
    target: Tensor,
    like: Tensor,
    group: Any,
    vocab_start: int | None,
    vocab_size: int | None,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    ignore_index: int,
    reduction: str,
) -> tuple:
    """The fields of Loss, from the arguments of a public op; `like` is its tensor of features or logits."""
    checks.tensors(op, target=target)
    if target.dtype != torch.int64:
        raise TypeError(f"{op}: target must hold ids as torch.int64, got {target.dtype}; pass target.long()")
    if target.device != like.device:
        raise ValueError(f"{op}: target is on {target.device} but the rest on {like.device}; move one of them")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: unknown reduction {reduction!r}; expected one of {', '.join(REDUCTIONS)}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing must be from 0 to 1, got {label_smoothing}; pass 0.1 for a tenth")
    if not 0.0 <= z_loss < float("inf"):
        raise ValueError(f"{op}: z_loss must be a finite number from 0 on, got {z_loss}; pass 0.0 for none")
    if softcap is not None and not 0.0 < softcap < float("inf"):
        raise ValueError(f"{op}: softcap must be a finite number above 0, got {softcap}; pass None for no cap")
    rank, size = (0, 1) if group is None else (group.rank, group.size)
    if vocab_size is None and size > 1:
        raise ValueError(
            f"{op}: vocab_size is needed on a group of {size} ranks; pass the number of classes, without padding"
        )
    if vocab_start is None and size > 1 and columns >= vocab_size:
        # Most often a weight that was not cut: only rank 0's copy of it would be trained.
        raise ValueError(
            f"{op}: in equal parts, {columns} for each of {size} ranks, rank 0 would hold the whole vocabulary of "
            f"{vocab_size}; pass each rank its own part, vocab_start where the others hold padding, or no group"
        )
    start = rank * columns if vocab_start is None else vocab_start
    vocab_size = columns if vocab_size is None else vocab_size
    if vocab_size < 1:
        raise ValueError(f"{op}: vocab_size must be at least 1, got {vocab_size}; pass the number of classes")
    if size == 1 and (start != 0 or vocab_size > columns):
        raise ValueError(
            f"{op}: without other ranks the columns must be the ids from 0 to {vocab_size - 1}, got {columns} from "
            f"{start} on; pass the whole vocabulary, or the group that holds it"
        )
    handle = groups.handle(group)
    return handle, start, vocab_size, float(label_smoothing), float(z_loss), softcap, ignore_index, reduction


def check_target(op: str, target: Tensor, loss: Loss) -> None:
    """Every id is a class or ignored; not looked at on CUDA, where the answer would take a synchronisation."""
    if target.is_cuda:
        return
    wrong = ((target < 0) | (target >= loss.vocab_size)) & (target != loss.ignore_index)
    if wrong.any():
        place = int(wrong.flatten().nonzero()[0])
        raise ValueError(
            f"{op}: target must hold ids from 0 to {loss.vocab_size - 1} or ignore_index {loss.ignore_index}, got "
            f"{int(target.flatten()[place])} for token {place}; mask it with ignore_index"
        )


# ---- statistics


class Statistics:
    """Peak, others, target's logit and shortfall of each token, [4, T], added up piece by piece of the row.

    A token whose target is elsewhere has 0 for its target's logit, so that these add up over pieces and ranks; the
    shortfall means nothing unless labels are smoothed.
    """

    def __init__(self, target: Tensor, dtype: torch.dtype, loss: Loss):
        self.target, self.dtype, self.loss = target, dtype, loss
        # A row without any column: the lowest number instead of -inf, from which nothing could be subtracted.
        empty = torch.zeros(4, target.numel(), dtype=dtype, device=target.device)
        empty[0] = torch.finfo(dtype).min
        self.pieces, self.widths = [empty], [0]

    def add(self, z: Tensor, first: int) -> None:
        """z [T, C] are the logits of the ids first .. first + C - 1."""
        if backend.choose(z) == "triton":
            from tpmp_kernels.kernels import cross_entropy as kernel

            smooth = self.loss.label_smoothing > 0
            self.take(kernel.statistics(z, self.target, first, self.loss.softcap, shortfall=smooth), z.shape[1])
            return
        for columns, tiles in _tiles(z):
            self.take(self._of(z[:, columns], first + columns.start, tiles), columns.stop - columns.start)

    def add_product(self, x: Tensor, weight: Tensor, first: int) -> None:
        """As `add` of the logits x [T, D] @ weight^T [D, C], which are never stored; for the Triton backend."""
        from tpmp_kernels.kernels import linear_cross_entropy as kernel

        smooth, columns = self.loss.label_smoothing > 0, weight.shape[0]
        self.take(kernel.statistics(x, weight, self.target, first, self.loss.softcap, shortfall=smooth), columns)

    def take(self, found: Tensor, columns: int) -> None:
        """found [4, T] are the statistics of so many columns more."""
        self.pieces.append(found)
        self.widths.append(columns)

    def _of(self, z: Tensor, first: int, tiles: list[slice]) -> Tensor:
        found = torch.zeros(4, z.shape[0], dtype=self.dtype, device=z.device)
        scratch = _scratch(z, tiles, self.dtype)
        place, owned = _place(self.target, first, z.shape[1])
        for rows in tiles:
            work = scratch[: rows.stop - rows.start].copy_(z[rows])
            _cap_(work, self.loss.softcap, slope=False)
            peak = found[0, rows] = work.amax(1).clamp_(min=torch.finfo(self.dtype).min)
            logit = work.gather(1, place[rows]).squeeze(1)
            found[2, rows] = logit.masked_fill(~owned[rows], 0)
            work.sub_(peak.unsqueeze(1))
            if self.loss.label_smoothing > 0:
                found[3, rows] = work.sum(1).neg_()
            work.scatter_(1, place[rows], logit.sub_(peak).masked_fill_(owned[rows], -torch.inf).unsqueeze(1))
            found[1, rows] = work.exp_().sum(1)
        return found

    def local(self) -> Tensor:
        """Of this rank's columns."""
        return _combine(self.pieces, self.widths)

    def whole(self, op: str, columns: int, grad_scale: float | None = None) -> Tensor:
        """Of the columns of all ranks, the same bits on each: adjacent ranks are combined, the odd one moves up."""
        loss = self.loss
        layout = (loss.start, columns, loss.vocab_size, loss.checksum(grad_scale))
        parts, layouts = groups.all_gather(op, self.local(), layout, loss.group)
        widths = [replace(loss, start=start).classes(rows) for start, rows, *_ in layouts]
        while len(parts) > 1:
            pairs = range(0, len(parts), 2)
            parts = [_combine(parts[i : i + 2], widths[i : i + 2]) for i in pairs]
            widths = [sum(widths[i : i + 2]) for i in pairs]
        return parts[0]


def _combine(parts: list[Tensor], widths: list[int]) -> Tensor:
    """The statistics [4, T] of pieces of so many columns -> [4, T]."""
    if len(parts) == 1:
        return parts[0]
    stacked = torch.stack(parts)
    peak = stacked[:, 0].amax(0)
    behind = peak - stacked[:, 0]
    others = (stacked[:, 1] * behind.neg().exp_()).sum(0)
    # The peak of a piece without columns is no number to take a shortfall from.
    filled = [torch.add(part[3], gap, alpha=n) for part, gap, n in zip(parts, behind, widths, strict=True) if n > 0]
    shortfall = torch.stack(filled).sum(0) if filled else torch.zeros_like(peak)
    return torch.stack([peak, others, stacked[:, 2].sum(0), shortfall])


def _tiles(z: Tensor) -> Iterator[tuple[slice, list[slice]]]:
    """Cuts z [T, C] into pieces of columns, each with its row blocks. On an accelerator each is a launch: one tile."""
    rows, columns = z.shape
    tile, widest = (_TILE * torch.get_num_threads(), _WIDEST) if z.device.type == "cpu" else (z.numel(), columns)
    for left in range(0, columns, max(widest, 1)):
        width = min(widest, columns - left)
        height = max(1, tile // width)
        yield slice(left, left + width), [slice(top, min(top + height, rows)) for top in range(0, rows, height)]


def _scratch(z: Tensor, tiles: list[slice], dtype: torch.dtype) -> Tensor:
    height = max((t.stop - t.start for t in tiles), default=0)
    return torch.empty(height, z.shape[1], dtype=dtype, device=z.device)


def _place(target: Tensor, first: int, columns: int) -> tuple[Tensor, Tensor]:
    """(place [T, 1] of the target's column, clamped into 0 .. columns - 1, whether it was there [T])."""
    local = target - first
    place = local.clamp(0, columns - 1)
    return place.unsqueeze(1), place == local


def _cap_(z: Tensor, softcap: float | None, *, slope: bool = True) -> Tensor | None:
    """cap tanh(z / cap) over z; its derivative, where it is wanted and is not 1."""
    if softcap is None:
        return None
    z.div_(softcap).tanh_()
    derivative = z.square().neg_().add_(1) if slope else None
    z.mul_(softcap)
    return derivative


# ---- loss and gradient


def losses(statistics: Tensor, target: Tensor, loss: Loss) -> Tensor:
    """The loss of each token, [T], from the statistics of its whole row; 0 where the target is ignored."""
    peak, others, _, shortfall = statistics
    behind, a = _behind(statistics), loss.label_smoothing
    log_total = (others + (-behind).expm1_()).log1p_()
    each = behind + log_total
    if a > 0:
        each = (1 - a) * each + a * (log_total + shortfall / loss.vocab_size)
    if loss.z_loss > 0:
        each = each + loss.z_loss * (peak + log_total).square()
    return each.masked_fill(target == loss.ignore_index, 0)


def saved(statistics: Tensor) -> Tensor:
    """What backward needs of them, [3, T]: peak, others, total."""
    peak, others, *_ = statistics
    return torch.stack([peak, others, others + _behind(statistics).neg_().exp_()])


def _behind(statistics: Tensor) -> Tensor:
    """peak - z_target, [T]; some number from 0 on where the target is ignored."""
    return (statistics[0] - statistics[2]).clamp_(min=0)


def reduced(each: Tensor, target: Tensor, loss: Loss) -> Tensor:
    """The losses [T] of target [...], reduced: [...] or a scalar. The mean is nan where every token is ignored."""
    if loss.reduction == "none":
        return each.view(target.shape)
    total = each.sum()
    return total if loss.reduction == "sum" else total / (target != loss.ignore_index).sum()


def upstream(dloss: Tensor, target: Tensor, loss: Loss) -> Tensor:
    """The gradient of each token's loss, [T], from that of the reduced loss."""
    valid = target != loss.ignore_index
    g = dloss.reshape(-1)
    if loss.reduction == "mean":
        g = g / valid.sum()
    return torch.where(valid, g, 0)


class Gradient:
    """d of the logits in a piece of the row, for tokens whose loss has the gradient g [T].

    d = scale exp(z - peak) - shift, and target_scale exp(z - peak) - truth - shift of the target.
    """

    def __init__(self, g: Tensor, statistics: Tensor, target: Tensor, loss: Loss):
        """statistics as `saved`."""
        self.peak, others, total = statistics
        self.target, self.loss, a = target, loss, loss.label_smoothing
        lse_term = 2 * loss.z_loss * (self.peak + total.log())
        self.scale, self.target_scale = g * (1 + lse_term) / total, g * (a + lse_term) / total
        self.truth = g * (1 - a) * (others / total)
        self.shift = g * (a / loss.vocab_size) if a > 0 else None

    def put(self, out: Tensor, z: Tensor, first: int) -> None:
        """Into out [T, C], which may be z: d of the logits z of the ids first .. first + C - 1, rounded once."""
        if backend.choose(z) == "triton":
            from tpmp_kernels.kernels import cross_entropy as kernel

            kernel.gradient(
                z, out, self.target, first, self.peak, self.scale, self.target_scale, self.truth, self.shift,
                softcap=self.loss.softcap,
            )  # fmt: skip
            return
        place, owned = _place(self.target, first, z.shape[1])
        true = self._of_target(z.gather(1, place).squeeze(1).to(self.peak.dtype))
        in_place = out.dtype == self.peak.dtype
        for columns, tiles in _tiles(z):
            scratch = None if in_place else _scratch(z[:, columns], tiles, self.peak.dtype)
            for rows in tiles:
                source, tile = z[rows, columns], out[rows, columns]
                work = tile if in_place else scratch[: tile.shape[0]]
                if work.data_ptr() != source.data_ptr():
                    work.copy_(source)
                self._overwrite(work, rows)
                if not in_place:
                    tile.copy_(work)
        (rows,) = owned.nonzero(as_tuple=True)
        out[rows, place[rows, 0]] = true[rows].to(out.dtype)

    def of_product(self, x: Tensor, weight: Tensor, first: int) -> Tensor:
        """d [T, C] in x's dtype of the logits x [T, D] @ weight^T, which are never stored; for the Triton backend."""
        from tpmp_kernels.kernels import linear_cross_entropy as kernel

        return kernel.gradient(
            x, weight, self.target, first, self.peak, self.scale, self.target_scale, self.truth, self.shift,
            softcap=self.loss.softcap,
        )  # fmt: skip

    def _of_target(self, z: Tensor) -> Tensor:
        """d where the column is the token's target, z [T]."""
        slope = _cap_(z, self.loss.softcap)
        d = z.sub_(self.peak).exp_().mul_(self.target_scale).sub_(self.truth)
        if self.shift is not None:
            d.sub_(self.shift)
        return d if slope is None else d.mul_(slope)

    def _overwrite(self, z: Tensor, rows: slice) -> None:
        """d of any other column, over z [rows, C]."""
        slope = _cap_(z, self.loss.softcap)
        z.sub_(self.peak[rows, None]).exp_().mul_(self.scale[rows, None])
        if self.shift is not None:
            z.sub_(self.shift[rows, None])
        if slope is not None:
            z.mul_(slope)
