"""What every rank of `tpmp train` calls. Light to import: the launcher names it while the fork server imports torch."""

from pathlib import Path

from tpmp_kernels.training.config import Config

PRELOAD = ["tpmp_kernels.training.loop"]


def train(config: Config, resume: Path | None) -> None:
    from tpmp_kernels.training import loop

    loop.run(config, resume)
