"""What the launcher's tests start: `python launch_script.py SCENARIO [VICTIM]` runs a scenario on four ranks.

`python launch_script.py many SCENARIO:VICTIM ...` runs several one after the other and prints each outcome as JSON.
"""

import json
import os
import signal
import sys
import time

from tpmp_kernels.__main__ import guarded
from tpmp_kernels.errors import PeerFailed, ProofFailed, UsageError
from tpmp_kernels.training.launch import RankFailed, launch, progress, rank_environment


def rank_main(scenario: str, victim: int) -> None:
    import torch.distributed as dist  # not at the top: the launcher imports this file too, and starts sooner without

    with rank_environment(threads=1) as here:
        dist.barrier()
        sys.stderr.write(f"up {here.rank} {os.getpid()}\n")
        RANK_SCENARIOS[scenario](here.rank, victim)


def reduce_forever(rank: int, victim: int) -> None:
    """Survivors of a kill get gloo's error at once, long before the agent looks at its processes."""
    import torch
    import torch.distributed as dist

    step = 0
    while True:
        progress(f"at step {step}")
        dist.all_reduce(torch.ones(8))
        step += 1


def killed(rank: int, victim: int) -> None:
    if rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    reduce_forever(rank, victim)


def crashed(rank: int, victim: int) -> None:
    if rank == victim:
        os.kill(os.getpid(), signal.SIGSEGV)
    reduce_forever(rank, victim)


def raised(rank: int, victim: int) -> None:
    if rank == victim:
        raise LookupError("the very cause\nand more of it")
    raise PeerFailed(f"rank {victim} failed")  # an echo, said before or after its cause


def misused(rank: int, victim: int) -> None:
    if rank == victim:
        raise UsageError("expected this, got that; do so")
    reduce_forever(rank, victim)


def unproved(rank: int, victim: int) -> None:
    if rank == victim:
        raise ProofFailed("the losses differ by 1")
    reduce_forever(rank, victim)


def left(rank: int, victim: int) -> None:
    if rank == victim:
        os._exit(3)
    reduce_forever(rank, victim)


RANK_SCENARIOS = {
    "fine": lambda rank, victim: None,
    **{f.__name__: f for f in (reduce_forever, killed, crashed, raised, misused, unproved, left)},
}


def outcome(scenario: str, victim: int) -> dict:
    start = time.monotonic()
    try:
        launch(rank_main, (scenario, victim), ranks=4)
        told = {"error": "", "sentence": "", "traceback": ""}
    except (RankFailed, UsageError, ProofFailed) as error:
        told = {"error": type(error).__name__, "sentence": str(error), "traceback": getattr(error, "traceback", "")}
    return {**told, "scenario": scenario, "victim": victim, "seconds": time.monotonic() - start}


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is born ignoring it
    if sys.argv[1] == "many":
        for name, number in (argument.split(":") for argument in sys.argv[2:]):
            print(json.dumps(outcome(name, int(number))), flush=True)
        sys.exit(0)
    arguments = (sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    sys.exit(guarded("script", lambda: launch(rank_main, arguments, ranks=4)))
