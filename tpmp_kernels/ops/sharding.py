"""How DTensor may cut an op: one line for each op, in the letters of an einsum.

    sharding=cut("*k, nk, n, *n -> *n", "*n")      # linear: a leading dimension of x, or the rows of the weight

To cut a letter is to give every tensor that has it Shard(that dimension) and every other input Replicate; an output
without the letter is then a sum over ranks, Partial. That is right for a letter over which the op is separate (rows)
or a plain sum (k of a product with nothing behind it); the op's line names those letters. DTensor combines the cases
over the dimensions of a mesh, and redistributes what fits none.

Importing torch.distributed.tensor takes a second, so the rules are handed over when an op first meets a DTensor.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

Rule = Callable[..., list[tuple[list, list]]]

# By op: a rule, or the reason why the op takes no DTensor.
RULES: dict[Any, Rule] = {}
REFUSED: dict[Any, str] = {}
_handed_over: set[Any] = set()


def add(op: Any, rule: Rule | str) -> None:
    """Keep an op's rule until DTensor is there; a string is the reason why the op takes no DTensor."""
    (REFUSED if isinstance(rule, str) else RULES)[op] = rule


def cut(equation: str, letters: str | Callable[..., str]) -> Rule:
    """A rule from "inputs -> outputs", one term for each argument of the schema up to its last tensor.

    A term names dimensions by letters, `*` standing for all leading ones; `-` is a tensor that stays whole, `_` an
    argument that is none. `letters` are those that may be cut; where that depends on the arguments, a function of
    them. An argument that is None is left out.
    """
    inputs, outputs = ([term.strip() for term in side.split(",")] for side in equation.split("->"))

    def rule(*args):
        from torch.distributed.tensor import Partial, Replicate

        terms = [*inputs, *["_"] * (len(args) - len(inputs))]
        given = [(arg, term) for arg, term in zip(args, terms, strict=True) if arg is not None]
        starred = [arg.ndim - len(term[1:]) for arg, term in given if term[0] == "*"]
        leading = [str(d) for d in range(starred[0])] if starred else []
        allowed = letters if isinstance(letters, str) else letters(*args)
        cases = [None, *(each for letter in allowed for each in (leading if letter == "*" else letter))]
        return [
            (
                [_placement(term, leading, case, Partial()) for term in outputs],
                [
                    None if term == "_" or arg is None else _placement(term, leading, case, Replicate())
                    for arg, term in zip(args, terms, strict=True)
                ],
            )
            for case in cases
        ]

    return rule


def _placement(term: str, leading: list[str], letter: str | None, missing: Any) -> Any:
    from torch.distributed.tensor import Replicate, Shard

    dimensions = [*leading, *term[1:]] if term[0] == "*" else [*term]
    if letter is None or term == "-":
        return Replicate()
    return Shard(dimensions.index(letter)) if letter in dimensions else missing


def meet(op: str, tensors: dict[str, Tensor | None]) -> None:
    """Called by an op that was given some subclass of Tensor: if it is DTensor, all must be, and the rules go out."""
    if "torch.distributed.tensor" not in sys.modules:
        return
    from torch.distributed.tensor import DTensor

    kinds = {isinstance(tensor, DTensor): name for name, tensor in tensors.items() if tensor is not None}
    if True not in kinds:
        return
    if False in kinds:
        raise TypeError(
            f"{op}: {kinds[True]} is a DTensor but {kinds[False]} is a plain Tensor; distribute all of them on one "
            "mesh, or none"
        )
    _hand_over()


def flattenable(x: Tensor) -> Tensor:
    """x; for a DTensor whole in the leading dimensions that are cut unevenly, which DTensor cannot flatten."""
    if "torch.distributed.tensor" not in sys.modules:
        return x
    from torch.distributed.tensor import DTensor, Replicate

    if not isinstance(x, DTensor):
        return x
    uneven = [
        p.is_shard() and p.dim < x.ndim - 1 and x.shape[p.dim] % x.device_mesh.size(i) != 0
        for i, p in enumerate(x.placements)
    ]
    whole = [Replicate() if is_uneven else p for p, is_uneven in zip(x.placements, uneven, strict=True)]
    return x.redistribute(placements=whole) if any(uneven) else x


@torch.compiler.assume_constant_result
def _hand_over() -> None:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.experimental import register_sharding

    propagator = DTensor._op_dispatcher.sharding_propagator
    for op in RULES.keys() - _handed_over:
        register_sharding(op)(RULES[op])
        # register_sharding's cache of decisions does not look at flags: linear_dz without a bias gradient would decide
        # for linear_dz with one. 0: every argument counts.
        propagator.op_to_schema_info[op] = replace(propagator.op_to_schema_info[op], static_argnum=0)
    for op in REFUSED.keys() - _handed_over:
        torch.library.register_torch_dispatch(op, DTensor, _refuse)
    _handed_over.update(RULES, REFUSED)


def _refuse(mode: Any, op: Any, types: tuple, args: tuple, kwargs: dict) -> None:
    name = op.name().split("::")[1]
    raise TypeError(f"{name}: expected no DTensor, since {REFUSED[op]}; pass local tensors, x.to_local()")
