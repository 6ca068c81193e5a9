"""Modules for stages out of a whole model: a sequence of layers, or a Hugging Face decoder by the paths of its modules.

    parts_of_sequence(nn.Sequential(...), [range(0, 3), range(3, 6)])
    parts_of_decoder(LlamaForCausalLM(config), [range(0, 3), range(3, 6)])

Our own decoder needs neither: models/decoder.py makes a part without the whole. Layers stay the same objects, so that a
part trains the model's own parameters, and keep their names: the state_dicts of all parts make up that of the model.
"""

import copy
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


def parts_of_sequence(layers: nn.Sequential | Sequence[nn.Module], cuts: Sequence[range]) -> list[nn.Module]:
    """A Sequential for each of `cuts`, which are whole and in order, such as [part.layers for part in a Partition].
    ValueError where they leave a layer out or have one twice."""
    layers = list(layers)
    _check_cuts(cuts, len(layers))
    return [_numbered(nn.Sequential(), layers, cut) for cut in cuts]


def parts_of_decoder(
    model: nn.Module,
    cuts: Sequence[range],
    *,
    layers: str = "model.layers",
    first: Sequence[str] = ("model.embed_tokens",),
    last: Sequence[str] = ("model.norm", "lm_head"),
) -> list[nn.Module]:
    """For each of `cuts` of the list of layers at path `layers`: the model with these layers alone.

    first, last: paths of what the first and the last part have and the others have not. A part takes token ids, or what
    the part before returned, and returns hidden states, the last one logits. The model must take `inputs_embeds` and
    add nothing to them in front of its layers: positions are rotary. ValueError for paths that are none, and for cuts
    as in parts_of_sequence.
    """
    names = dict(model.named_modules(remove_duplicate=False))
    for path in (layers, *first, *last):
        if path not in names:
            raise ValueError(f"parts_of_decoder: {type(model).__name__} has no module {path!r}; pass the path of it")
    _check_cuts(cuts, len(names[layers]))
    parts = []
    for number, cut in enumerate(cuts):
        kept = {layers: _numbered(nn.ModuleList(), names[layers], cut)}
        kept |= {path: nn.Identity() for path in first if number > 0}
        kept |= {path: nn.Identity() for path in last if number < len(cuts) - 1}
        parts.append(_Part(_with(model, kept), takes_ids=number == 0))
    return parts


class _Part(nn.Module):
    """Calls `model`, whose parts are its own: not below a name, so that theirs are those of the whole model."""

    def __init__(self, model: nn.Module, *, takes_ids: bool):
        super().__init__()
        self._modules, self._parameters, self._buffers = model._modules, model._parameters, model._buffers
        self.takes_ids = takes_ids
        object.__setattr__(self, "_model", model)  # not as a module of this one

    def train(self, mode: bool = True) -> "_Part":
        self._model.training = mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        given = {"input_ids" if self.takes_ids else "inputs_embeds": x}
        return self._model(**given, use_cache=False).logits


def _numbered(into: nn.Module, layers: Sequence[nn.Module], cut: range) -> nn.Module:
    """With these layers in it, under their numbers in the whole."""
    for number in cut:
        into.add_module(str(number), layers[number])
    return into


def _with(module: nn.Module, replaced: dict[str, nn.Module]) -> nn.Module:
    """The module with others at some paths; what is not on the way to them is shared with it."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    for name in {path.partition(".")[0] for path in replaced}:
        below = {path.partition(".")[2]: other for path, other in replaced.items() if path.partition(".")[0] == name}
        twin._modules[name] = below[""] if "" in below else _with(module._modules[name], below)
    return twin


def _check_cuts(cuts: Sequence[range], count: int) -> None:
    ends = [range(0, 0), *cuts, range(count, count)]
    for before, after in pairwise(ends):
        if before.stop != after.start or before.step != 1:
            raise ValueError(
                f"parts: cuts {list(cuts)} are not all of {count} layers, each once and in order; such as "
                f"[range(0, {count // 2}), range({count // 2}, {count})]"
            )
