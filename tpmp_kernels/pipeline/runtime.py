"""The one loop that executes a schedule. It knows kinds of steps, and nothing about any schedule.

A schedule is lowered, proved free of deadlock and compared between ranks before the first step; then every rank walks
its own list. channels.py carries what crosses stage borders, stage.py computes.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor
from torch.profiler import record_function

from tpmp_kernels.comm.communicator import Communicator
from tpmp_kernels.errors import ScheduleError, StageFailed, TransportError
from tpmp_kernels.pipeline.channels import Channels
from tpmp_kernels.pipeline.lowering import lower
from tpmp_kernels.pipeline.memory import Meter
from tpmp_kernels.pipeline.schedule import Action, Event, Kind, Schedule
from tpmp_kernels.pipeline.stage import Stage
from tpmp_kernels.pipeline.validate import Report, validate


@dataclass(frozen=True)
class StepResult:
    """losses: by microbatch, on the ranks that hold the last stage, or on all. waited: seconds blocked on transfers.

    times: (start, end) of each step of this rank's program, seconds of time.perf_counter, which is one clock for all
    processes of a host; measured.py makes a picture of those of all ranks. live_bytes: behind each step, what was
    allocated in this pass and is held still; empty unless the runtime measures it.
    """

    losses: list[Tensor]
    events: list[Event]
    waited: float
    times: list[tuple[float, float]]
    live_bytes: list[int] = field(default_factory=list)


class Runtime:
    """Executes `schedule` on this rank's `stages` (by stage number); `comm` is the pipeline group, rank = its rank.

    tensor_parallel: the group that shares each of these stages, if there is one; it must run the same schedule.
    shape, dtype, device: of the activation of one microbatch at every stage border, agreed once. losses_everywhere:
    give the losses to every rank of the pipeline. measure_memory: fill StepResult.live_bytes, at some cost in time.
    ScheduleError where the schedule is not executable, ranks disagree about it, or a stage is missing.

    Parts of a joint step run one after the other, each as soon as it can: there is nothing here that one could hide of
    the other.
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
        losses_everywhere: bool = False,
        measure_memory: bool = False,
    ):
        self.lowered = lower(schedule.apart())
        self.report: Report = validate(self.lowered)
        for group in (comm, tensor_parallel):
            if group is not None:
                _compare_digest(schedule, group)
        _check_stages(schedule, stages, comm.rank)
        comm.warm_up((a, b) for a, b in pairwise(schedule.placement) if a != b)
        self.schedule, self.stages, self.comm, self.tensor_parallel = schedule, stages, comm, tensor_parallel
        self.program = self.lowered.programs[comm.rank]
        self.shape, self.dtype, self.device = tuple(shape), dtype, device
        self.losses_everywhere, self.measure_memory = losses_everywhere, measure_memory

    def step(
        self,
        inputs: Sequence[Tensor] | None,
        targets: Sequence[Tensor] | None,
        *,
        loss_scale: float = 1.0,
        step: int | None = None,
        shapes: Sequence[Sequence[int]] | None = None,
    ) -> StepResult:
        """One pass over the schedule. inputs: tokens by microbatch, used by the first stage; targets: by the last.

        Gradients add into the parameters' `.grad`; they are those of loss_scale * (sum of the microbatch losses): with
        1 / (tokens of all microbatches) those of the mean over tokens, whatever their lengths. step: its number, for
        stages that are `numbered`. shapes: of each microbatch's activation, the same on every rank, where microbatches
        differ. StageFailed, on every rank of the pipeline, where a stage raises; TransportError where a rank is lost.
        """
        one_pass = _Pass(self, inputs, targets, loss_scale, step, shapes)
        try:
            return one_pass.run()
        except BaseException:
            for stage in self.stages.values():
                stage.forget()
            raise


class _Pass:
    """One execution of the program."""

    def __init__(self, runtime: Runtime, inputs, targets, loss_scale: float, step: int | None, shapes):
        self.runtime, self.stages, self.program = runtime, runtime.stages, runtime.program
        self.inputs, self.targets, self.loss_scale, self.step = inputs, targets, loss_scale, step
        shape_of = (lambda microbatch: runtime.shape) if shapes is None else shapes.__getitem__
        self.meter = Meter(runtime.measure_memory)
        self.channels = Channels(runtime.comm, shape_of, runtime.dtype, runtime.device, self.meter)
        self.losses: dict[int, Tensor] = {}
        self.computes = {
            Kind.F: self._forward,
            Kind.BW: self._backward,
            Kind.B: self._backward_input,
            Kind.W: self._backward_weight,
        }
        self.transfers = {
            Kind.RECV_POST: self.channels.recv_post,
            Kind.RECV_WAIT: self.channels.recv_wait,
            Kind.SEND_POST: self.channels.send_post,
            Kind.SEND_WAIT: self.channels.send_wait,
        }

    def run(self) -> StepResult:
        times, live_bytes, clock = [], [], time.perf_counter
        with self.meter:
            for each in self.program:
                start = clock()
                if type(each) is Action:
                    self._compute(each)
                else:
                    self.transfers[each.kind](each)
                times.append((start, clock()))
                if self.meter.on:
                    live_bytes.append(self.meter.live_bytes())
        losses = [self.losses[m] for m in sorted(self.losses)]
        if self.runtime.losses_everywhere:
            losses = self._shared(losses)
        return StepResult(losses, self._events(times), self._waited(times), times, live_bytes)

    def _compute(self, action: Action) -> None:
        """With the action's name on whatever goes wrong, here and on the ranks that wait for this one."""
        try:
            with record_function(str(action)):
                self.computes[action.kind](self.stages[action.stage], action)
        except TransportError:
            raise  # it names its culprit, and all ranks have it
        except Exception as error:
            failed = StageFailed(f"{action} raised {type(error).__name__}: {error}")
            for group in (self.runtime.comm, self.runtime.tensor_parallel):
                if group is not None:
                    group.abort(str(failed))
            raise failed from error

    def _forward(self, stage: Stage, action: Action) -> None:
        _, number, m = action
        x = self.inputs[m] if number == 0 else self._received(number - 1, m)
        output = stage.forward(m, x, self.targets[m] if stage.loss is not None else None, self.step)
        if stage.loss is None:
            self.channels.put("F", number, m, output)
        else:
            self.losses[m] = output

    def _received(self, producer: int, microbatch: int) -> Tensor:
        return self.channels.take("F", producer, microbatch).requires_grad_(torch.is_grad_enabled())

    def _backward(self, stage: Stage, action: Action) -> None:
        self._pass_on(action, stage.backward(action.microbatch, self._upstream(stage, action), self.loss_scale))

    def _backward_input(self, stage: Stage, action: Action) -> None:
        self._pass_on(action, stage.backward_input(action.microbatch, self._upstream(stage, action), self.loss_scale))

    def _backward_weight(self, stage: Stage, action: Action) -> None:
        stage.backward_weight(action.microbatch)

    def _upstream(self, stage: Stage, action: Action) -> Tensor | None:
        return None if stage.loss is not None else self.channels.take("B", action.stage + 1, action.microbatch)

    def _pass_on(self, action: Action, grad: Tensor | None) -> None:
        if action.stage > 0:
            self.channels.put("B", action.stage, action.microbatch, grad)

    def _shared(self, losses: list[Tensor]) -> list[Tensor]:
        """Those of the last stage's rank, on every rank."""
        comm, schedule = self.runtime.comm, self.runtime.schedule
        root, count = schedule.placement[-1], schedule.microbatches
        values = torch.zeros(count, dtype=torch.float64, device=self.runtime.device)
        if comm.rank == root:
            values = torch.stack(losses).double()
        return list(comm.broadcast(values, root, tag="losses").unbind())

    def _events(self, times: list[tuple[float, float]]) -> list[Event]:
        steps = zip(self.program, times, strict=True)
        return [Event(each.kind.name, each.stage, each.microbatch, *t) for each, t in steps if type(each) is Action]

    def _waited(self, times: list[tuple[float, float]]) -> float:
        waits = (Kind.RECV_WAIT, Kind.SEND_WAIT)
        return sum(end - start for each, (start, end) in zip(self.program, times, strict=True) if each.kind in waits)


def _check_stages(schedule: Schedule, stages: Mapping[int, Stage], rank: int) -> None:
    """Every stage that the schedule gives this rank is there, and its loss where it is the last."""
    for number, holder in enumerate(schedule.placement):
        if holder != rank:
            continue
        if number not in stages:
            raise ScheduleError(
                f"{schedule.name}: rank {rank} holds stage {number}, but got stages {sorted(stages)}; pass one Stage "
                "for each of its numbers"
            )
        last = number == schedule.stages - 1
        if last != (stages[number].loss is not None):
            raise ScheduleError(
                f"{schedule.name}: stage {number} of {schedule.stages} has {'no' if last else 'a'} loss; give loss= to "
                "the last stage, and to no other"
            )


def _compare_digest(schedule: Schedule, comm: Communicator) -> None:
    mine = int(schedule.digest()[:15], 16)
    both = comm.all_reduce(torch.tensor([mine, -mine]), "max", tag="schedule digest")
    if both[0] != mine or -both[1] != mine:
        raise ScheduleError(
            f"rank {comm.rank} runs schedule {schedule.name} of {schedule.microbatches} microbatches with digest "
            f"{schedule.digest()}, another rank runs a different one; build it from the same arguments on every rank"
        )
