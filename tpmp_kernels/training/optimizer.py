"""AdamW on wide main gradients, with clipping by the exact global norm.

fp32 and fp64 parameters are their own main parameters and `.grad` is the main gradient. A bf16 or fp16 parameter has an
fp32 main parameter, and its gradients are added in fp32 as backward makes them, never in the parameter's own dtype.
The update itself is torch.optim.AdamW's.
"""

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

from tpmp_kernels.tensor_parallel import placement_of, replicas_of
from tpmp_kernels.training.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """Of step 0, 1, ...: a linear warm-up, then constant."""
    return config.lr * min(1.0, (step + 1) / max(1, config.warmup_steps))


class Optimizer:
    """Over the parameters that this rank holds. So that each is counted once in the global norm, counts_replicas says
    whether this rank (one of the tensor-parallel group) counts replicated ones, and counted_elsewhere names those that
    another stage counts."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        config: OptimizerConfig,
        *,
        counts_replicas: bool,
        counted_elsewhere: Collection[str] = (),
    ):
        self.config, self.counts_replicas, self.counted_elsewhere = config, counts_replicas, counted_elsewhere
        self.parameters = dict(parameters)
        self.main = {name: _main_parameter(p) for name, p in self.parameters.items()}
        decayed = [p for p in self.main.values() if p.dim() > 1]
        rest = [p for p in self.main.values() if p.dim() <= 1]
        self.adamw = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
        )
        for main in self.main.values():  # made now, not at the first step, so that a checkpoint can be read into it
            self.adamw.state[main] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(main),
                "exp_avg_sq": torch.zeros_like(main),
            }

    def square_norms(self) -> dict[str, Tensor]:
        """Of each gradient that this rank counts, by name, the square of its norm, fp64. Those of all ranks add up to
        that of the global gradient."""
        return {
            name: main.grad.double().square().sum() / replicas_of(self.parameters[name])
            for name, main in self.main.items()
            if name not in self.counted_elsewhere
            and (placement_of(self.parameters[name]).is_shard() or self.counts_replicas)
        }

    def step(self, step: int, norm: float) -> None:
        """Clip the gradients by the global `norm`, update, and clear the gradients."""
        scale = min(1.0, self.config.clip_norm / (norm + 1e-6))  # 1e-6 as torch.nn.utils.clip_grad_norm_
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate(self.config, step)
        if scale < 1.0:
            for main in self.main.values():
                main.grad.mul_(scale)
        self.adamw.step()
        self.adamw.zero_grad()
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Round main parameters into the model's where those are narrower."""
        for name, parameter in self.parameters.items():
            if self.main[name] is not parameter:
                parameter.copy_(self.main[name])

    def tensors(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, tensor, the model's parameter it belongs to) of what a checkpoint holds besides the model."""
        for name, main in self.main.items():
            parameter, state = self.parameters[name], self.adamw.state[main]
            if main is not parameter:
                yield f"optimizer.main.{name}", main, parameter
            yield f"optimizer.exp_avg.{name}", state["exp_avg"], parameter
            yield f"optimizer.exp_avg_sq.{name}", state["exp_avg_sq"], parameter

    def set_step(self, steps: int) -> None:
        """Tell AdamW's bias correction how many steps lie behind."""
        for state in self.adamw.state.values():
            state["step"].fill_(steps)


def _main_parameter(parameter: nn.Parameter) -> Tensor:
    if parameter.dtype in (torch.float32, torch.float64):
        return parameter
    main = parameter.detach().float().requires_grad_()

    def accumulate(p: Tensor) -> None:
        main.grad = p.grad.float() if main.grad is None else main.grad.add_(p.grad)
        p.grad = None

    parameter.register_post_accumulate_grad_hook(accumulate)
    return main
