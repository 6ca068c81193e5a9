"""`tpmp verify`: prove the training step of a config on ranks that this process starts, or that torchrun has."""

from tpmp_kernels.prover import rank
from tpmp_kernels.prover.options import parse
from tpmp_kernels.training.launch import launch


def run(argv: list[str]) -> None:
    """Prove and print. Raises UsageError for bad input, ProofFailed where the steps differ, and what `launch` does."""
    config = parse(argv)
    launch(rank.verify_config, (config,), ranks=config.ranks, preload=rank.PRELOAD)
