"""Programs for ranks that are processes of their own, make their default group themselves and end as Python ends.

    launcher = Launcher()
    launcher.run("whole", 2, tmp_path)      # [(exit status, output), ...] by rank

The launcher is one process that has imported torch and forks a rank for each call; multiprocessing would end its
children with os._exit, past everything that can go wrong at the end of an interpreter.
"""

import os
import subprocess
import sys
from pathlib import Path

SPELLINGS = ("tpmp", "cpu:tpmp", "cpu:tpmp,cuda:nccl")


class Launcher:
    def __init__(self):
        command = [sys.executable, "-W", "error::UserWarning", __file__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, name: str, size: int, path: Path, **environment: str) -> list[tuple[int, str]]:
        path.mkdir(exist_ok=True)
        print(name, size, path, *(f"{key}={value}" for key, value in environment.items()), sep="\t",
              file=self._process.stdin, flush=True)  # fmt: skip
        statuses = [int(text) for text in self._process.stdout.readline().split()]
        return [(status, (path / f"output{rank}").read_text()) for rank, status in enumerate(statuses)]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(30)


def launch() -> None:
    """Fork the ranks of each line of the input and answer with their exit statuses, until the input ends."""
    for line in sys.stdin:
        name, size, path, *environment = line.rstrip("\n").split("\t")
        ranks = []
        for rank in range(int(size)):
            ranks.append(os.fork())
            if ranks[-1] == 0:
                os.environ.update(pair.split("=", 1) for pair in environment)
                return run_rank(name, path, int(size), rank)
        print(*(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks), flush=True)


def run_rank(name: str, path: str, size: int, rank: int) -> None:
    import signal

    signal.alarm(60)
    file = os.open(f"{path}/output{rank}", os.O_CREAT | os.O_WRONLY, 0o600)
    for stream in (1, 2):
        os.dup2(file, stream)
    globals()[name](dist.FileStore(f"{path}/store", size), size, rank)


def whole(store, size: int, rank: int) -> None:
    for name in SPELLINGS:
        if name == SPELLINGS[-1]:
            dist.set_debug_level(dist.DebugLevel.DETAIL)  # torch puts a checking wrapper around what it can
        dist.init_process_group(name, store=store, rank=rank, world_size=size)
        assert dist.get_backend() == name
        x = torch.full((2,), 1.0 + rank)
        dist.all_reduce(x)
        dist.barrier()
        mesh = init_device_mesh("cpu", (size, 1), mesh_dim_names=("a", "b"))
        y = DTensor.from_local(torch.full((2,), 1.0 + rank), mesh["a"], [Partial()]).full_tensor()
        assert y.tolist() == [3.0, 3.0] and mesh.get_group("a").name() == mesh.get_group("b").name() == "tpmp"
        print(name, rank, x.tolist())
        dist.destroy_process_group()


def leaves_without_destroying(store, size: int, rank: int) -> None:
    dist.init_process_group("tpmp", store=store, rank=rank, world_size=size)
    other = dist.new_group()
    unheard = functional.all_reduce(torch.ones(3), "sum", dist.group.WORLD)
    futures = [
        dist.irecv(torch.ones(3), (rank + 1) % size, group=other).get_future(),
        dist.all_reduce(torch.ones(3), group=other, async_op=True).get_future(),
    ]
    model = torch.nn.Linear(3, 3)
    if os.environ.get("DDP"):  # it imports dynamo, which takes longer than all the rest
        model = torch.nn.parallel.DistributedDataParallel(model)
    model(torch.ones(2, 3)).sum().backward()
    sys.modules["kept"] = [unheard, futures, model, other]
    dist.barrier()  # who posts after another has left is refused
    print("done")


def shares_no_memory(store, size: int, rank: int) -> None:
    def refuse(*args, **kwargs):
        raise meeting.CannotShare("rank 1: it is elsewhere")

    connect, meeting.connect_store = meeting.connect_store, refuse
    runs_on_gloo(store, size, rank)
    os.environ["TPMP_TRANSPORT"] = "shm"
    try:
        dist.init_process_group("tpmp", store=store, rank=rank, world_size=size)
    except UsageError as error:
        assert "shm is impossible: rank 1" in str(error)
    assert not dist.is_initialized()
    os.environ["TPMP_TRANSPORT"], meeting.connect_store = "process_group", connect
    runs_on_gloo(dist.PrefixStore("asked", store), size, rank)


def runs_on_gloo(store, size: int, rank: int) -> None:
    dist.init_process_group("tpmp", store=store, rank=rank, world_size=size)
    assert dist.get_backend() == "tpmp" and type(dist.group.WORLD) is dist.ProcessGroup
    x = torch.full((2,), 1.0 + rank)
    dist.all_reduce(x, op=dist.ReduceOp.AVG)
    y = [torch.zeros(2), torch.zeros(2)]
    dist.all_gather(y, x)
    assert x.tolist() == y[1].tolist() == [1.5, 1.5]
    dist.destroy_process_group()


if __name__ == "__main__":
    import torch
    import torch.distributed as dist
    from torch.distributed import _functional_collectives as functional
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial

    from tpmp_kernels.comm import meeting
    from tpmp_kernels.errors import UsageError

    torch.set_num_threads(1)
    launch()
