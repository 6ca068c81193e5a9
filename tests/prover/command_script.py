"""`tpmp verify` of a decoder whose row-parallel layers forget their reduction: python command_script.py [options]."""

import sys

from tpmp_kernels.__main__ import guarded
from tpmp_kernels.prover import rank
from tpmp_kernels.prover.options import parse
from tpmp_kernels.training.launch import launch


def verify_broken(config) -> None:
    from tpmp_kernels.tensor_parallel import linear

    linear.reduce_output = lambda y, comm, sequence_parallel, *, tag: y
    rank.verify_config(config)


if __name__ == "__main__":
    config = parse(sys.argv[1:])
    sys.exit(guarded("tpmp verify", lambda: launch(verify_broken, (config,), ranks=config.ranks, preload=rank.PRELOAD)))
