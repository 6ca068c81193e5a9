"""What `tpmp schedule --model` reads of a config of `tpmp train`: sizes of the pipeline, and what each layer costs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tpmp_kernels.errors import UsageError
from tpmp_kernels.models.layer_costs import Microbatch, layer_costs
from tpmp_kernels.pipeline.command_model import Model
from tpmp_kernels.pipeline.partition import LayerCost
from tpmp_kernels.training.config import STDLIB, Config, load
from tpmp_kernels.training.config_check import check
from tpmp_kernels.training.plan import microbatch_of


def read_model(path: Path, measured: bool) -> Model:
    """measured: costs are a short profile on this machine in place of FLOP. UsageError for a file that is no
    config; for what `check` refuses, such as microbatches that do not divide its batch, once layers are asked for."""
    config = load(path)
    return Model(
        ranks=config.parallel.pp,
        microbatches=config.parallel.microbatches,
        unit="ms" if measured else "GFLOP",
        origin="measured here, whole layers" if measured else "modelled",
        layers=lambda microbatches: _costs(config, microbatches, measured),
    )


def _costs(config: Config, microbatches: int, measured: bool) -> list[LayerCost]:
    check(_planned(config, microbatches))
    seen = microbatch_of(config, microbatches)
    return _measured(config, seen) if measured else layer_costs(config.model, seen)


def _measured(config: Config, seen: Microbatch) -> list[LayerCost]:
    import torch

    from tpmp_kernels.models.layer_profile import measured_layer_costs

    device = config.training.device
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("training.device: expected a GPU to measure on, found none; use auto, cpu, or no --measured")
    with _threads(config.training.threads):
        device = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
        return measured_layer_costs(config.model, seen, device=device)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _planned(config: Config, microbatches: int) -> Config:
    """Without what a plan does not need: text to train on, and as many ranks as the file says."""
    parallel = replace(config.parallel, pp=1, microbatches=microbatches)
    return replace(config, parallel=parallel, data=replace(config.data, source=STDLIB))
