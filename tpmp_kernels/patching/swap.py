"""patch: what is replaced in a model, and why not the rest; Patched: the list of it, and the way back."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import MethodType

from torch import nn

from tpmp_kernels.patching import head, mlp, norm, rope
from tpmp_kernels.patching.proof import Swap

_OPS = {"linear_cross_entropy": head, "mlp": mlp, "norm": norm, "rope": rope}


@dataclass(frozen=True)
class Site:
    """A module that was found: its path in the model, its class, the op asked for, and what became of it.

    `how` is the op that now computes its forward, such as "ops.gated_mlp", or why it was left alone.
    """

    module: str
    kind: str
    op: str
    how: str


class Patched:
    """What `patch` did: `replaced` and `skipped` are Sites. As a context it is undone when that is left."""

    def __init__(self, model: str, replaced: tuple[Site, ...], skipped: tuple[Site, ...]):
        self.model, self.replaced, self.skipped = model, replaced, skipped
        self._bound: list[tuple[nn.Module, Callable]] = []

    def undo(self) -> None:
        """Give every module its class's forward again; a second time nothing. RuntimeError, and nothing is done, where
        somebody has replaced a forward after us: theirs may call ours."""
        for module, forward in self._bound:
            if _bound_to(module) is not forward:
                raise RuntimeError(
                    f"undo: the forward of a {type(module).__name__} is expected to be the one that patch bound, got "
                    "another that was put over it; take that off first"
                )
        for module, _ in self._bound:
            del module.forward
        self._bound.clear()

    def __enter__(self) -> "Patched":
        return self

    def __exit__(self, *error) -> None:
        self.undo()

    def __repr__(self) -> str:
        sites = [*self.replaced, *self.skipped]
        rows = [("module", "class", "op", "computed by"), *((s.module, s.kind, s.op, s.how) for s in sites)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
        state = "replaced" if self._bound else "undone"
        counts = f"{self.model}: {len(self.replaced)} modules {state}, {len(self.skipped)} left alone"
        return "\n".join([counts, *lines])


def patch(model: nn.Module, ops: Iterable[str] | None = None) -> Patched:
    """Compute parts of this one model by our ops, from now until `undo()` or the end of a `with`.

    ops: any of "mlp", "norm", "rope", "linear_cross_entropy"; None is all that match. Only forwards of module instances
    are set: classes, parameters, state_dict and hooks are as before, and a deep copy is patched like the original. With
    "linear_cross_entropy", a forward with labels returns no logits. docs/patching.md says what matches, and the limits.

    Raises TypeError where the model is no module; ValueError, before anything is touched, for a name that is no op,
    one that matches nothing, and a module that is patched already: ops of different modules may be added one by one.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: model must be a torch.nn.Module, got {type(model).__name__}; pass the loaded model")
    names, kind = _names(ops), type(model).__name__
    swaps: list[tuple[nn.Module, Site, Swap]] = []
    skipped: list[Site] = []
    for path, module in model.named_modules():
        for op in names:
            found = _find(op, path, module, model)
            if found is not None:
                refused = isinstance(found, str)
                site = Site(path or "(model)", type(module).__name__, op, found if refused else f"ops.{found.by}")
                skipped.append(site) if refused else swaps.append((module, site, found))
    _check_matched(kind, names, ops is None, [site for _, site, _ in swaps], skipped)
    return _bind(kind, swaps, skipped)


def _names(ops: Iterable[str] | None) -> list[str]:
    names = [*_OPS] if ops is None else [ops] if isinstance(ops, str) else [*dict.fromkeys(ops)]
    for name in names or [None]:
        if name not in _OPS:
            got = repr(name) if names else "none"
            raise ValueError(
                f"patch: expected ops out of {', '.join(_OPS)}, got {got}; leave ops out for all that match"
            )
    return names


def _find(op: str, path: str, module: nn.Module, model: nn.Module) -> Swap | str | None:
    found = _OPS[op].find(module, model)
    # A pickled model comes back with its classes' forwards, bound.
    if found is None or "forward" not in vars(module) or _bound_to(module) is type(module).forward:
        return found
    if hasattr(_bound_to(module), "patched_with"):
        raise ValueError(
            f"patch: {path or 'the model'} is expected to have its class's forward, got one that patch bound for "
            f"{op!r}; undo that first, or leave the op out of ops"
        )
    return "its forward is already one of the instance's own, put there by somebody else"


def _check_matched(kind: str, names: list[str], every: bool, replaced: list[Site], skipped: list[Site]) -> None:
    matched = {site.op for site in replaced}
    lacking = [name for name in names if name not in matched]
    if not lacking or (every and matched):
        return
    expected = "; ".join(f"{name!r} looks for {_OPS[name].EXPECTS}" for name in lacking)
    refused = [f"{s.module} (a {s.kind}): {s.how}" for s in skipped if s.op in lacking]
    got = f"{len(refused)} left alone, such as {refused[0]}" if refused else "none"
    remedy = "pass another model" if every else "leave it out of ops"
    raise ValueError(f"patch: nothing in {kind} matches: {expected}; got {got}; {remedy}")


def _bind(kind: str, swaps: list[tuple[nn.Module, Site, Swap]], skipped: list[Site]) -> Patched:
    patched = Patched(kind, tuple(site for _, site, _ in swaps), tuple(skipped))
    for module, site, swap in swaps:
        swap.forward.patched_with = site.op
        module.forward = MethodType(swap.forward, module)
        patched._bound.append((module, swap.forward))
    return patched


def _bound_to(module: nn.Module) -> Callable | None:
    return getattr(vars(module).get("forward"), "__func__", None)
