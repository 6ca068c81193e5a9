"""Plans: which style each module gets, from a table of patterns, and the styles that Hugging Face names.

    {"layers.*.attn.q": ColwiseParallel(), "layers.*.attn.out": "rowwise"}

A pattern is a dotted name in which each part is a glob: "layers.*.mlp" is the mlp of every layer and nothing deeper. A
model's `tp_plan` of transformers (4.5x and 5.x, its base_model_tp_plan and base_model_sp_plan) is such a table.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from torch import nn
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from tpmp_kernels.tensor_parallel.prepare import PrepareModuleInput, PrepareModuleInputOutput, PrepareModuleOutput
from tpmp_kernels.tensor_parallel.styles import (
    ColwiseParallel,
    ReplicateParallel,
    RowwiseParallel,
    SequenceParallel,
    Style,
)

Plan = Mapping[str, Style | str] | Iterable[tuple[str, Style | str]]

_WHOLE, _SEQUENCE = Replicate(), Shard(1)
_GATHERED = {"input_layouts": _SEQUENCE, "desired_input_layouts": _WHOLE}

# Several names of one thing are those of different versions; "local_" said that parameters are no DTensors, which ours
# never are.
_HUGGING_FACE = {
    "colwise": ColwiseParallel,
    "local_colwise": ColwiseParallel,
    "colwise_rep": lambda: ColwiseParallel(output_layouts=_WHOLE),
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=_WHOLE),
    "colwise_allgather": lambda: ColwiseParallel(output_layouts=_WHOLE),
    "colwise_loss_parallel": lambda: ColwiseParallel(input_layouts=_SEQUENCE, use_local_output=False),
    "rowwise": RowwiseParallel,
    "local_rowwise": RowwiseParallel,
    "rowwise_allreduce": RowwiseParallel,
    "rowwise_rep": lambda: RowwiseParallel(input_layouts=_WHOLE),
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=_WHOLE),
    "rowwise_reduce_scatter": lambda: RowwiseParallel(output_layouts=_SEQUENCE),
    "embedding_rowwise": lambda: RowwiseParallel(input_layouts=_WHOLE),
    "vocab_allreduce": lambda: RowwiseParallel(input_layouts=_WHOLE),
    "vocab_reduce_scatter": lambda: RowwiseParallel(input_layouts=_WHOLE, output_layouts=_SEQUENCE),
    "sequence_parallel": lambda: SequenceParallel(use_local_output=True),
    "activation": lambda: SequenceParallel(use_local_output=True),
    "activation_seq_dim_2": lambda: SequenceParallel(sequence_dim=2, use_local_output=True),
    "module_allgather": lambda: PrepareModuleInput(**_GATHERED, use_local_output=True),
    "module_allgather_hidden_states": lambda: PrepareModuleInput(
        input_kwarg_layouts={"hidden_states": _SEQUENCE},
        desired_input_kwarg_layouts={"hidden_states": _WHOLE},
        use_local_output=True,
    ),
    "module_allgather_split": lambda: PrepareModuleInputOutput(
        **_GATHERED, use_local_input=True, output_layouts=_WHOLE, desired_output_layouts=_SEQUENCE
    ),
    "replicate": ReplicateParallel,
    "replicated_with_grad_allreduce": lambda: ReplicateParallel(partial_gradients=True),
    "gather": lambda: PrepareModuleOutput(output_layouts=Partial(), desired_output_layouts=_WHOLE),
    "all_reduce": lambda: PrepareModuleOutput(output_layouts=Partial(), desired_output_layouts=_WHOLE),
}

_EXPERTS = "mixtures of experts are not sharded here"
_PACKED = "a weight that packs several along the cut axis is no plain shard; unpack it into one module each"
_REFUSED = {
    "packed_colwise": _PACKED,
    "packed_rowwise": _PACKED,
    "local_packed_rowwise": _PACKED,
    "embedding_colwise": "what it means differs between versions of transformers; pass ColwiseParallel or "
    '"embedding_rowwise"',
    "mla_kv_a_proj": "it depends on the rotary part of a latent projection; pass ReplicateParallel for it",
    "local": _EXPERTS,
    "grouped_gemm": _EXPERTS,
    "ep_router": _EXPERTS,
    "moe_tp_experts": _EXPERTS,
    "moe_identity_expert": _EXPERTS,
    "moe_experts_allreduce": _EXPERTS,
    "megamoe_router": _EXPERTS,
    "megamoe_experts": _EXPERTS,
}


def style_of(style: Style | str, pattern: str) -> Style:
    """The style, or the one that Hugging Face calls so. ValueError for a name that is unknown or not to be honoured,
    TypeError for what is no style of ours."""
    if isinstance(style, Style):
        return style
    if isinstance(style, ParallelStyle):
        raise TypeError(
            f"plan: {pattern!r} is given torch's {type(style).__name__}; import that name from "
            "tpmp_kernels.tensor_parallel, or use torch's parallelize_module"
        )
    if not isinstance(style, str):
        raise TypeError(f"plan: {pattern!r} is given {style!r}; pass a style or the name of one")
    if style in _REFUSED:
        raise ValueError(f"plan: {pattern!r} asks for {style!r}: {_REFUSED[style]}")
    if style not in _HUGGING_FACE:
        raise ValueError(f"plan: {pattern!r} asks for {style!r}; known are {', '.join(_HUGGING_FACE)}")
    return _HUGGING_FACE[style]()


def resolve(module: nn.Module, plan: Plan) -> list[tuple[str, nn.Module, Style]]:
    """(name, submodule, style) of all that the plan names, in the order of the model.

    ValueError for a pattern that matches nothing, and for a submodule that is matched by two different styles.
    """
    rows = [(pattern, style_of(style, pattern)) for pattern, style in _rows(plan)]
    names = list(module.named_modules(remove_duplicate=False))
    found: dict[int, tuple[str, nn.Module, str, Style]] = {}
    for pattern, style in rows:
        matched = [(name, each) for name, each in names if _matches(name, pattern)]
        if not matched:
            raise ValueError(f"plan: {pattern!r} matches no module; {_nearest(pattern, [name for name, _ in names])}")
        for name, each in matched:
            _, _, other_pattern, other = found.setdefault(id(each), (name, each, pattern, style))
            if other != style:
                raise ValueError(
                    f"plan: {name} is matched by {other_pattern!r} with {other} and by {pattern!r} with {style}; "
                    "leave one of them out"
                )
    order = {id(each): i for i, (_, each) in reversed(list(enumerate(names)))}
    ordered = sorted(found.values(), key=lambda row: order[id(row[1])])
    return [(name or type(each).__name__, each, style) for name, each, _, style in ordered]


def _rows(plan: Plan) -> Iterable[tuple[str, Style | str]]:
    return plan.items() if isinstance(plan, Mapping) else plan


def _matches(name: str, pattern: str) -> bool:
    if not name:
        return not pattern
    parts, globs = name.split("."), pattern.split(".")
    return len(parts) == len(globs) and all(map(fnmatchcase, parts, globs))


def _nearest(pattern: str, names: list[str]) -> str:
    generic = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names if name)
    near = difflib.get_close_matches(pattern, generic, n=3, cutoff=0.3) or list(generic)[:3]
    return f"nearest are {', '.join(near)}" if near else "the module has no submodules"
