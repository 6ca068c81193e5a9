"""What the peer programs share: options, local ranks or those of torchrun, a step clock, one line of output."""

import argparse
import atexit
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.peers.gpt import Config

TIMEOUT = timedelta(minutes=5)


def options(description: str, *, layers: int, batch: int) -> argparse.ArgumentParser:
    """The options of every peer; the defaults are the sizes that results are quoted for."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--batch", type=int, default=batch, help="sequences a step")
    parser.add_argument("--layers", type=int, default=layers)
    for name in ("hidden", "heads", "mlp", "vocab", "sequence"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Config, name))
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--optimizer", choices=["adamw", "sgd"], default="adamw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="gloo", help="of torch.distributed: gloo, or tpmp")
    return parser


def config_of(args: argparse.Namespace) -> Config:
    return Config(args.layers, args.hidden, args.heads, args.mlp, args.vocab, args.sequence)


def optimizer_of(parameters: Iterable, args: argparse.Namespace) -> torch.optim.Optimizer:
    """Fused AdamW, which is what is timed; SGD is there because AdamW hides a wrong scale of the gradients."""
    if args.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=args.lr)
    return torch.optim.AdamW(parameters, lr=args.lr, fused=True)


def run_as_program(main: Callable[[], None]) -> None:
    """Ranks fork from a server that has imported torch. Not set in on_ranks: its caller may have a server already."""
    multiprocessing.set_forkserver_preload(["torch.distributed.pipelining", "torch.distributed.tensor.parallel"])
    main()


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def on_ranks(worker: Callable[[argparse.Namespace], dict], args: argparse.Namespace, ranks: int) -> dict | None:
    """Run `worker(args)` on every rank and return what rank 0 returned; under torchrun None on the others.

    Without torchrun the ranks are children of this process; the first that fails ends the others and raises here
    with its traceback.
    """
    if under_torchrun():
        if not dist.is_initialized():  # once: a second group would meet the first one's addresses in the store
            _init(args.backend)
            atexit.register(dist.destroy_process_group)
        torch.set_num_threads(1)
        result = worker(args)
        return result if dist.get_rank() == 0 else None
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_child, (worker, args, ranks, folder), nprocs=ranks, start_method="forkserver")
        with open(f"{folder}/result") as file:
            return json.load(file)


def _init(backend: str, **how) -> None:
    if backend == "tpmp":
        import tpmp_kernels.comm  # noqa: F401  registers it
    dist.init_process_group(backend, timeout=TIMEOUT, **how)


def _child(rank: int, worker, args, ranks: int, folder: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = f"file://{folder}/store"
    _init(args.backend, init_method=store, rank=rank, world_size=ranks)
    torch.set_num_threads(1)
    result = worker(args)
    dist.destroy_process_group()
    if rank == 0:
        with open(f"{folder}/result", "w") as file:
            json.dump(result, file)


def timed_steps(step: Callable[[int], float], args: argparse.Namespace) -> dict:
    """Run `step(i)`, which returns its loss (NaN where the rank has none), and time it until the slowest rank is done.

    The counts are fixed: every rank of a group runs the same number of steps.
    """
    grouped = dist.is_initialized()
    seconds, losses = [], []
    for i in range(args.warmup + args.steps):
        if grouped:
            dist.barrier()
        start = time.perf_counter()
        loss = step(i)
        seconds.append(time.perf_counter() - start)
        losses.append(loss)
    times = torch.tensor(seconds[args.warmup :], dtype=torch.float64)
    losses = torch.tensor(losses, dtype=torch.float64)
    if grouped:
        losses = losses.nan_to_num(nan=-1.0)
        dist.all_reduce(times, op=dist.ReduceOp.MAX)
        dist.all_reduce(losses, op=dist.ReduceOp.MAX)
    low, median, high = torch.quantile(times, torch.tensor([0.2, 0.5, 0.8], dtype=times.dtype)).tolist()
    return {"median": median, "p20": low, "p80": high, "losses": losses.tolist()}


def report(peer: str, variant: str, result: dict, args: argparse.Namespace) -> None:
    """One aligned line to read and one JSON line to parse; a variant that could not run has `note` in its result."""
    if "note" in result:
        print(f"{peer:16}{variant:24}cannot run: {result['note']}")
    else:
        times = "  ".join(f"{name} {result[name]:8.4f} s" for name in ("median", "p20", "p80"))
        print(f"{peer:16}{variant:24}{times}  loss {result['losses'][0]:.4f} -> {result['losses'][-1]:.4f}")
    row = {"peer": peer, "variant": variant, **result, "options": vars(args), "torch": torch.__version__}
    print(json.dumps(row), flush=True)
