"""What a pass over a schedule holds: the bytes that were allocated in it and are not free yet, behind each step.

Meter counts them while a pass runs; predict_bytes says them before, from what each stage alone holds of a microbatch:

held = [held_bytes(stage, x, target) for each stage]    a short profile of the real stages
predict_bytes(runtime.lowered, held, message=bytes of an activation at a stage border)
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tpmp_kernels.pipeline.lowering import Lowered
from tpmp_kernels.pipeline.schedule import Kind
from tpmp_kernels.pipeline.stage import Stage


class Meter(TorchDispatchMode):
    """While it is entered it sees every tensor that an operation makes, in forward and backward, and counts storages.

    What was there before, parameters and their gradients among it, is not counted. Off, it costs nothing.
    """

    def __init__(self, on: bool):
        super().__init__()
        self.on = on
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}  # by address of the weak reference's target

    def __enter__(self):
        return super().__enter__() if self.on else self

    def __exit__(self, *error):
        return super().__exit__(*error) if self.on else None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        result = function(*args, **kwargs)
        for tensor in _tensors(result):
            if tensor.untyped_storage()._cdata not in given:
                self.note(tensor)
        return result

    def note(self, tensor: Tensor) -> None:
        """Count a tensor that no operation of torch has made."""
        if self.on:
            storage = tensor.untyped_storage()
            self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()

    def live_bytes(self) -> int:
        self._storages = {key: each for key, each in self._storages.items() if not each[0].expired()}
        return sum(size for _, size in self._storages.values())


class Held(NamedTuple):
    """Bytes that a stage holds of one microbatch: from F to B, and from B to W where these are apart."""

    activation: int
    waiting: int


def held_bytes(stage: Stage, x: Tensor, target: Tensor | None = None, *, step: int | None = None) -> Held:
    """Of one microbatch, in a short profile of the real stage.

    x, target, step: as in a step; an x that requires grad stands for a received one, which counts. Two passes, of
    which the first allocates what the parameters keep for good. Adds to gradients.
    """
    for _ in range(2):
        with Meter(True) as meter:
            output = stage.forward(0, x.detach().clone().requires_grad_() if x.requires_grad else x, target, step)
            grad = torch.ones_like(output) if stage.loss is None else None
            del output
            activation = meter.live_bytes() - (0 if grad is None else grad.nbytes)
            stage.backward_input(0, grad, 1.0)
            del grad
            waiting = meter.live_bytes()
            stage.backward_weight(0)
    return Held(activation, waiting)


def predict_bytes(lowered: Lowered, held: Sequence[Held], *, message: int) -> list[list[int]]:
    """[rank][step]: bytes held behind each step of `lowered.programs[rank]`, as StepResult.live_bytes counts them.

    held: by stage. message: bytes of an activation at a stage border. Beside what the stages hold there are the values
    at the borders: a received one from the post of its receive, a made one until its transfer has ended, or until the
    next stage takes it where that is on the same rank.
    """
    last = lowered.schedule.stages - 1

    def change(kind: Kind, stage: int) -> int:
        activation, waiting = held[stage]
        below, above = message * (stage > 0), message * (stage < last)
        if kind is Kind.F:  # an input that was received is part of the activation from here
            return (activation if lowered.schedule.backward else 0) - below + above
        if kind is Kind.W:
            return -waiting
        return (waiting if kind is Kind.B else 0) - activation - above + below

    constant = dict.fromkeys((Kind.RECV_WAIT, Kind.SEND_POST, Kind.GROUP, Kind.PAIR), 0)
    constant |= {Kind.RECV_POST: message, Kind.SEND_WAIT: -message}
    levels = []
    for program in lowered.programs:
        level, row = 0, []
        for step in program:
            level += constant[step.kind] if step.kind in constant else change(step.kind, step.stage)
            row.append(level)
        levels.append(row)
    return levels


def _tensors(values: object) -> Iterable[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
