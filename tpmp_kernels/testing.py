"""Ranks for tests: processes forked from one preloaded server, one pool for each world size, many cases in each pool.

    pool = RankPool(2)
    results = pool.run(function, *args)     # function runs on every rank, torch.distributed (gloo) is initialised

The fork server imports torch once and computes nothing, so that a pool starts in a fraction of a second and no
OpenMP thread is forked. A pool that saw a failure is thrown away and made anew at the next call.
"""

import multiprocessing as mp
import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

_CONTEXT = mp.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "tpmp_kernels.testing"])


@dataclass(frozen=True)
class Outcome:
    """What one rank did: returned `value`, raised `error` (with its traceback as text), or died of `exitcode`."""

    value: Any = None
    error: BaseException | None = None
    traceback: str = ""
    exitcode: int | None = None
    seconds: float = 0.0


class RankPool:
    def __init__(self, size: int):
        self.size = size
        self._workers: list[tuple[mp.Process, Any]] = []

    def run(self, function: Callable, *args, timeout: float = 60.0) -> list[Any]:
        """Run `function(*args)` on every rank and return the values by rank; any failure raises AssertionError."""
        outcomes = self.outcomes(function, *args, timeout=timeout)
        bad = [f"rank {r}: {o.traceback or f'exit code {o.exitcode}'}" for r, o in enumerate(outcomes) if not _ok(o)]
        if bad:
            raise AssertionError("\n".join([f"{function.__name__} failed on {len(bad)} of {self.size} ranks", *bad]))
        return [o.value for o in outcomes]

    def outcomes(self, function: Callable, *args, timeout: float = 60.0) -> list[Outcome]:
        """The same without judging, for tests of failures. Ranks still running at the timeout are killed."""
        if not self._workers:
            self._start()
        for _, pipe in self._workers:
            pipe.send((function, args))
        deadline = time.monotonic() + timeout
        outcomes = [self._collect(process, pipe, deadline) for process, pipe in self._workers]
        if not all(map(_ok, outcomes)):
            self.close()
        return outcomes

    def close(self) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()
        self._workers = []

    def pids(self) -> list[int]:
        return [process.pid for process, _ in self._workers]

    def _start(self) -> None:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank in range(self.size):
            ours, theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=_serve, args=(theirs, rank, self.size, store.port), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        self._store = store  # serves the ranks for as long as the pool lives

    @staticmethod
    def _collect(process, pipe, deadline: float) -> Outcome:
        try:
            if pipe.poll(max(0.0, deadline - time.monotonic())):
                return pipe.recv()
        except (EOFError, ConnectionResetError):
            process.join(5)
            return Outcome(exitcode=process.exitcode)
        process.kill()
        process.join()
        return Outcome(exitcode=process.exitcode, traceback="still running at the timeout, killed")


def _ok(outcome: Outcome) -> bool:
    return outcome.error is None and outcome.exitcode is None


def _serve(pipe, rank: int, size: int, port: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        start = time.monotonic()
        try:
            outcome = Outcome(value=function(*args), seconds=time.monotonic() - start)
        except Exception as error:
            outcome = Outcome(error=error, traceback=traceback.format_exc(), seconds=time.monotonic() - start)
        pipe.send(outcome)
