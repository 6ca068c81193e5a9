"""torch's own tests of torch.distributed, run for a backend in one set of processes.

    python torch_cases.py tpmp DIRECTORY SIZE RANK        # writes DIRECTORY/RANK.json: {test: outcome}

torch's harness starts new processes for every case, which takes half an hour here. This one makes the default group
anew for each case instead, on the same processes. torch skips what it does not know a backend for: its module is
imported as for gloo and then told the other name, so that each case for gloo is one for "tpmp".
"""

import json
import os
import sys
import unittest
from datetime import timedelta
from pathlib import Path

SECONDS = 20  # of the groups: a case that hangs fails


def main(backend: str, directory: str, size: str, rank: str) -> None:
    os.environ.update(BACKEND="gloo", WORLD_SIZE=size, RANK=rank, TEMP_DIR=directory)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", GLOO_SOCKET_IFNAME="lo")
    import torch
    import torch.distributed as dist
    from torch.testing._internal.common_utils import set_rng_seed
    from torch.testing._internal.distributed import distributed_test

    import tpmp_kernels.comm  # noqa: F401

    torch.set_num_threads(1)
    store = dist.FileStore(f"{directory}/store", int(size))

    class Cases(distributed_test.TestDistBackend, distributed_test.DistributedTest._DistTestBase):
        def _barrier(self, timeout=None, wait_for=None):
            """In place of torch's, which polls files ten times a second."""
            meet(store, int(size))

    outcomes = {}
    names = [name for name in dir(Cases) if name.startswith("test_")]
    for name in names if len(sys.argv) < 6 else sys.argv[5].split(","):
        print(name, flush=True)
        # These ask for the name of a backend of CPU tensors in their body; the default group is `backend` all the same.
        distributed_test.BACKEND = "gloo" if name.startswith("test_accumulate_gradients_no_sync") else backend
        set_rng_seed(1)
        dist.init_process_group(backend, store=dist.PrefixStore(name, store), rank=int(rank), world_size=int(size),
                                timeout=timedelta(seconds=SECONDS))  # fmt: skip
        meet(store, int(size))  # a rank that skips would else close what others still connect to
        case = Cases(name)
        case.rank, case.file_name = int(rank), f"{directory}/{name}"
        outcomes[name] = outcome(case, name)
        if dist.is_initialized():
            dist.destroy_process_group()
        meet(store, int(size))
    Path(directory, f"{rank}.json").write_text(json.dumps(outcomes))


def outcome(case: unittest.TestCase, name: str) -> str:
    """ "ok", "skipped: why" or "failed: why"."""
    try:
        getattr(case, name)()
        case.doCleanups()
    except unittest.SkipTest as why:
        return f"skipped: {why}"
    except SystemExit as why:  # torch's way to skip in a process of its own
        return f"skipped: exit code {why.code}"
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}"
    return "ok"


def meet(store, size: int) -> None:
    meet.count = getattr(meet, "count", 0) + 1
    key = f"meeting {meet.count}"
    if store.add(key, 1) == size:
        store.set(f"{key} done", "1")
    store.wait([f"{key} done"], timedelta(seconds=3 * SECONDS))


if __name__ == "__main__":
    main(*sys.argv[1:5])
