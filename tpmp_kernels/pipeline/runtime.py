"""The one loop that executes a schedule. It knows kinds of actions, and nothing about any schedule.

A schedule is lowered, proved free of deadlock and compared between ranks before the first step; then every rank walks
its own list. A value that crosses a stage border is named by (payload, producing stage, microbatch): "F" is the
activation that a stage's forward made, "B" the gradient that a stage's backward made for its input.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tpmp_kernels.comm.communicator import Communicator, Work
from tpmp_kernels.errors import ScheduleError
from tpmp_kernels.pipeline.lowering import lower
from tpmp_kernels.pipeline.schedule import Action, Event, Kind, Schedule, Transfer
from tpmp_kernels.pipeline.stage import Stage
from tpmp_kernels.pipeline.validate import validate

Value = tuple[str, int, int]


@dataclass(frozen=True)
class StepResult:
    """losses: by microbatch, on the ranks that hold the last stage. events: what this rank did, times in seconds of
    time.perf_counter. waited: seconds blocked on stage transfers."""

    losses: list[Tensor]
    events: list[Event]
    waited: float


class Runtime:
    """Executes `schedule` on this rank's `stages` (by stage number); `comm` is the pipeline group, rank = its rank.

    tensor_parallel: the group that shares each of these stages, if there is one; it must run the same schedule.
    shape, dtype, device: of the activation of one microbatch at every stage border, agreed once. ScheduleError where
    the schedule is not executable or ranks disagree about it.
    """

    def __init__(
        self,
        schedule: Schedule,
        stages: Mapping[int, Stage],
        comm: Communicator,
        *,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        tensor_parallel: Communicator | None = None,
    ):
        lowered = lower(schedule)
        validate(lowered)
        for group in (comm, tensor_parallel):
            if group is not None:
                _compare_digest(schedule, group)
        self.schedule, self.stages, self.comm = schedule, stages, comm
        _check_executable(schedule)
        self._program = lowered.programs[comm.rank]
        self._empty = lambda: torch.empty(shape, dtype=dtype, device=device)
        self._verbs = {
            Kind.F: self._forward,
            Kind.BW: self._backward,
            Kind.RECV_POST: self._recv_post,
            Kind.RECV_WAIT: self._recv_wait,
            Kind.SEND_POST: self._send_post,
            Kind.SEND_WAIT: self._send_wait,
        }

    def step(
        self,
        inputs: Sequence[Tensor] | None,
        targets: Sequence[Tensor] | None,
        *,
        loss_scale: float = 1.0,
        step: int | None = None,
    ) -> StepResult:
        """One pass over the schedule. inputs: tokens by microbatch, used by the first stage; targets: by the last.
        step: its number, for stages that are `numbered`.

        Gradients add into the parameters' `.grad`; they are those of loss_scale * (sum of the microbatch losses).
        """
        self._inputs, self._targets, self._loss_scale, self._step = inputs, targets, loss_scale, step
        self._values: dict[Value, Tensor] = {}
        self._works: dict[tuple[str, Value], Work] = {}
        self._losses: dict[int, Tensor] = {}
        self._events: list[Event] = []
        self._waited = 0.0
        for each in self._program:
            self._verbs[each.kind](each)
        losses = [self._losses[m] for m in sorted(self._losses)]
        return StepResult(losses, self._events, self._waited)

    def _forward(self, action: Action) -> None:
        stage, m = self.stages[action.stage], action.microbatch
        start = time.perf_counter()
        x = self._inputs[m] if action.stage == 0 else self._values.pop(("F", action.stage - 1, m))
        output = stage.forward(m, x, self._targets[m] if stage.loss is not None else None, self._step)
        if stage.loss is None:
            self._values["F", action.stage, m] = output
        else:
            self._losses[m] = output
        self._record(action, start)

    def _backward(self, action: Action) -> None:
        stage, m = self.stages[action.stage], action.microbatch
        start = time.perf_counter()
        grad = None if stage.loss is not None else self._values.pop(("B", action.stage + 1, m))
        grad = stage.backward(m, grad, self._loss_scale)
        if action.stage > 0:
            self._values["B", action.stage, m] = grad
        self._record(action, start)

    def _recv_post(self, transfer: Transfer) -> None:
        value = _value(transfer)
        self._values[value] = buffer = self._empty()
        self._works["recv", value] = self.comm.irecv(buffer, transfer.peer, tag=_tag(value))

    def _recv_wait(self, transfer: Transfer) -> None:
        self._wait("recv", _value(transfer))

    def _send_post(self, transfer: Transfer) -> None:
        value = _value(transfer)
        # The work keeps the tensor alive until it is sent; nothing here needs it any more.
        tensor = self._values.pop(value).contiguous()
        self._works["send", value] = self.comm.isend(tensor, transfer.peer, tag=_tag(value))

    def _send_wait(self, transfer: Transfer) -> None:
        self._wait("send", _value(transfer))

    def _wait(self, direction: str, value: Value) -> None:
        start = time.perf_counter()
        self._works.pop((direction, value)).wait()
        self._waited += time.perf_counter() - start

    def _record(self, action: Action, start: float) -> None:
        self._events.append(Event(action.kind.name, action.stage, action.microbatch, start, time.perf_counter()))


def _check_executable(schedule: Schedule) -> None:
    kinds = {action.kind for actions in schedule.actions for action in actions} - {Kind.F, Kind.BW}
    if kinds:
        raise ScheduleError(
            f"the runtime computes F and BW, but schedule {schedule.name} has {', '.join(sorted(kinds))}; "
            "choose one without, such as 1f1b"
        )


def _value(transfer: Transfer) -> Value:
    return transfer.payload, transfer.stage, transfer.microbatch


def _tag(value: Value) -> str:
    """What both ends call a transfer, for example "F0.3": ends that disagree get an error that says so."""
    payload, stage, microbatch = value
    return f"{payload}{stage}.{microbatch}"


def _compare_digest(schedule: Schedule, comm: Communicator) -> None:
    mine = int(schedule.digest()[:15], 16)
    both = comm.all_reduce(torch.tensor([mine, -mine]), "max", tag="schedule digest")
    if both[0] != mine or -both[1] != mine:
        raise ScheduleError(
            f"rank {comm.rank} runs schedule {schedule.name} of {schedule.microbatches} microbatches with digest "
            f"{schedule.digest()}, another rank runs a different one; build it from the same arguments on every rank"
        )
