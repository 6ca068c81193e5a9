"""What a config makes of the pipeline: its schedule, and which layers make which stage. Imports no torch."""

from collections.abc import Sequence

from tpmp_kernels.models.layer_costs import Microbatch, layer_costs
from tpmp_kernels.pipeline.partition import Partition, partition
from tpmp_kernels.pipeline.schedule import Schedule
from tpmp_kernels.pipeline.schedules import SCHEDULES, build
from tpmp_kernels.training.config import Config


def schedule_of(config: Config) -> Schedule:
    """ValueError for what the schedule cannot have."""
    parallel = config.parallel
    chunks = parallel.chunks if SCHEDULES[parallel.schedule].chunks is None else None
    return build(parallel.schedule, ranks=parallel.pp, microbatches=parallel.microbatches, chunks=chunks)


def microbatch_of(config: Config, microbatches: int | None = None) -> Microbatch:
    """What one rank sees of a microbatch."""
    return Microbatch(
        batch=config.training.batch // (microbatches or config.parallel.microbatches),
        sequence=config.data.sequence,
        tp=config.parallel.tp,
        sequence_parallel=config.parallel.sequence_parallel,
        dtype=config.training.dtype,
    )


def partition_of(config: Config, placement: Sequence[int]) -> Partition:
    """The same on every rank: by modelled costs, with `parallel.begin`. ValueError where there are fewer layers,
    embedding and head included, than stages, or names that are none."""
    begin = [name.strip() for name in config.parallel.begin.split(",") if name.strip()]
    layers = layer_costs(config.model, microbatch_of(config))
    return partition(layers, ranks=config.parallel.pp, placement=placement, overrides=begin)
