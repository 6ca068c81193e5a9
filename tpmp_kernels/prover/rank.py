"""What every rank of `tpmp verify` calls. Light to import: the launcher names it before torch is there."""

from tpmp_kernels.training.config import Config

PRELOAD = ["tpmp_kernels.prover.demo", "tpmp_kernels.prover.prove"]


def verify_config(config: Config) -> None:
    """Prove the training step of a config and print the report; ProofFailed on rank 0 where it differs."""
    from tpmp_kernels.errors import ProofFailed
    from tpmp_kernels.prover.demo import Demo
    from tpmp_kernels.prover.prove import prove
    from tpmp_kernels.training.launch import rank_environment

    subject = Demo(config)
    with rank_environment(device="cpu", threads=config.training.threads, timeout=subject.timeout) as here:
        if here.rank == 0:
            print(subject.title, flush=True)
        report = prove(subject)
        if here.rank == 0:
            print(report.table(), flush=True)
    if here.rank == 0 and not report.equal:
        raise ProofFailed(report.first.sentence)
