"""Starts the ranks of a run, or uses those that torchrun started, and says in one sentence why a run ended early.

    launch(function, args, ranks=4)       # function(*args) runs on every rank; returns when all have returned

    launcher: raises UsageError, ProofFailed, RankFailed or Interrupted, once every rank is gone
    rank:     with rank_environment() as here: ...

Local ranks run under torchrun's own agent (elastic_launch). They come from a fork server that imports torch once, while
the launcher imports it too, so that four ranks start in the time of one. What the agent reports as the first failure is
often the echo (a survivor that lost its peer and exited sooner): hence a rank that fails says why on its slate and
lingers, and whoever is first to be gone is the culprit.
"""

import contextlib
import dataclasses
import importlib
import logging
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from tpmp_kernels.errors import ProofFailed, UsageError
from tpmp_kernels.training import lifeline
from tpmp_kernels.training.interrupt import Interrupted, signals_end_ranks
from tpmp_kernels.training.slate import Report, Slate

# Several times the agent's poll, so that it finds a killed rank gone while those who miss it are still there.
_MONITOR_INTERVAL = 0.1
_LINGER = {"transport": 1.0, "error": 0.5}
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID")


class RankFailed(RuntimeError):
    """A rank raised, crashed or was killed. The message is one sentence; `traceback` is the rank's, or empty."""

    def __init__(self, message: str, traceback: str = ""):
        super().__init__(message)
        self.traceback = traceback


def given_rank() -> int | None:
    """This process's rank where torchrun started it, else None."""
    return int(os.environ["RANK"]) if all(name in os.environ for name in _TORCHRUN) else None


def launch(function: Callable, args: Sequence[Any] = (), *, ranks: int, preload: Sequence[str] = ()) -> None:
    """Run `function(*args)` on `ranks` ranks and return when every one has returned.

    function: of a module's top level; args: picklable; preload: modules for the fork server to import once for all.
    Under torchrun this process is a rank already, so the function is just called. Otherwise the calling process is the
    launcher, in its main thread.

    Raises UsageError and ProofFailed as a rank raised them (and UsageError where torchrun started another number of
    ranks), RankFailed for any other end of a rank, Interrupted (a KeyboardInterrupt) for SIGINT, SIGTERM, SIGHUP and
    SIGQUIT. By then no rank is left.
    """
    if given_rank() is None:
        _launch_local(function, tuple(args), ranks, preload)
        return
    world = int(os.environ["WORLD_SIZE"])
    if world != ranks:
        raise UsageError(
            f"expected {ranks} ranks (parallel.tp x parallel.pp), got {world} from torchrun; "
            f"start {ranks} with torchrun, or change parallel.tp or parallel.pp"
        )
    function(*args)


def _launch_local(function: Callable, args: tuple, ranks: int, preload: Sequence[str]) -> None:
    before = set(multiprocessing.active_children())
    slates = [Slate() for _ in range(ranks)]
    try:
        with signals_end_ranks(before) as received:
            _start_fork_server([*preload, function.__module__])
            _silence_agent()
            agent = importlib.import_module("torch.distributed.launcher.api")
            if received:
                raise Interrupted(received[0])
            try:
                agent.elastic_launch(_agent_config(agent, ranks), _rank)(os.getpid(), slates, function, args)
            except agent.ChildFailedError as error:
                if received:
                    raise Interrupted(received[0]) from None
                raise _verdict(error.failures, [slate.read()[1] for slate in slates]) from None
    except Interrupted as interrupted:
        interrupted.progress = slates[0].read()[0] or interrupted.progress
        raise
    finally:
        # Interrupted while they were being started, the agent does not know its ranks yet.
        for process in set(multiprocessing.active_children()) - before:
            process.kill()
            process.join()


def _start_fork_server(preload: list[str]) -> None:
    """Start it now, so that it imports torch while this process does."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else survivors of a killed rank warn about its socket
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
    with _environment("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning"):
        # After kill -9 of the launcher the tracker removes the semaphores; it need not announce it.
        multiprocessing.resource_tracker.ensure_running()
    modules = [lifeline.__name__, "torch.distributed", *(name for name in preload if name != "__main__")]
    multiprocessing.get_context("forkserver").set_forkserver_preload(modules)
    # Born with SIGINT blocked, as are the ranks then, so that Ctrl-C on the terminal reaches the launcher alone. Here a
    # signal that comes meanwhile is delivered afterwards.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with (
            _environment(lifeline.VARIABLE, f"{os.getpid()} {multiprocessing.util.get_temp_dir()}"),
            _environment("PYTHONWARNINGS", "ignore:the compiled extension:UserWarning"),  # said by this process
        ):
            multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    previous = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if previous is None:
            del os.environ[name]
        else:
            os.environ[name] = previous


def _silence_agent() -> None:
    """The agent logs every kill at length; the one sentence is ours to say."""
    for name in ("torch.distributed.elastic", "torch.distributed.launcher", "torch.multiprocessing"):
        logger = logging.getLogger(name)
        logger.addHandler(logging.NullHandler())
        logger.propagate = False


def _agent_config(agent, ranks: int):
    return agent.LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=f"tpmp-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",  # else it looks the host's own name up, which can take seconds
        max_restarts=0,
        monitor_interval=_MONITOR_INTERVAL,
        start_method="forkserver",
        logs_specs=_no_log_files(agent),
        # Ours stand: the agent's would pass SIGINT on to ranks that ignore it, and then wait 30 s for them.
        signals_to_handle="",
    )


def _no_log_files(agent):
    """Ranks write to the console: no folder, which would stay behind, and no thread that follows a file.

    The agent starts such threads even for a log folder of os.devnull, and one that an interrupt kept it from stopping
    holds the launcher at its exit for ever.
    """

    class NoLogFiles(agent.DefaultLogsSpecs):
        def reify(self, envs):
            return dataclasses.replace(super().reify(envs), tee_stdouts={}, tee_stderrs={})

    return NoLogFiles(log_dir=os.devnull)


def _verdict(failures: dict[int, Any], reports: list[Report | None]) -> Exception:
    """The exception that names the culprit: a rank that went without a word, else the first to fail on its own account.

    Survivors are gone without a word too, by the SIGTERM that ends them.
    """
    ours = -signal.SIGTERM
    silent = [rank for rank, each in failures.items() if each.exitcode != ours and not _told(reports[rank])]
    told = [rank for rank, report in enumerate(reports) if _told(report)]
    if silent or not told:
        rank = min(silent or failures, key=lambda each: failures[each].timestamp)
        return _gone(rank, failures[rank], reports[rank])
    rank = min(told, key=lambda each: reports[each].order)
    report = reports[rank]
    if report.kind == "usage":
        return UsageError(report.sentence)
    if report.kind == "proof":
        return ProofFailed(report.sentence)
    return RankFailed(f"rank {rank} (pid {report.pid}) failed with {report.sentence}", report.traceback)


def _told(report: Report | None) -> bool:
    return report is not None and report.kind != "crash"


def _gone(rank: int, failure, crash: Report | None) -> RankFailed:
    """The sentence for a rank that ended without a word."""
    if failure.exitcode < 0:
        how = f"was killed by {failure.signal_name()}"
    else:
        how = f"ended with exit code {failure.exitcode}"
    if failure.exitcode == -signal.SIGKILL:
        how += " (the kernel sends it when memory runs out)"
    sentence = f"rank {rank} (pid {failure.pid}) {how}; the other ranks were stopped"
    return RankFailed(sentence, crash.traceback if crash else "")


# --- in the rank

_slate: Slate | None = None  # this process's own, where our launcher started it


def _rank(launcher: int, slates: list[Slate], function: Callable, args: tuple) -> None:
    global _slate
    lifeline.die_with_parent(signal.SIGKILL)
    if lifeline.launcher_is_gone(launcher):
        os._exit(1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a rank that outlives SIGTERM costs the agent's 30 s
    sys.excepthook = sys.__excepthook__
    _slate = slates[int(os.environ["LOCAL_RANK"])]
    _slate.catch_crashes()
    try:
        function(*args)
    except Exception as error:
        report = _slate.fail(error)
        sys.stdout.flush()
        time.sleep(_LINGER.get(report.kind, 0.0))  # the launcher's SIGTERM ends it sooner
        os._exit(1)  # no teardown that could wait for a peer


def progress(text: str) -> None:
    """Tell the launcher how far this rank came, such as "at step 12": the words after "interrupted" on Ctrl-C."""
    if _slate:
        _slate.progress(text)


@dataclass(frozen=True)
class RankEnvironment:
    """Who this rank is. device: "cpu" or "cuda" (the current CUDA device is set)."""

    rank: int
    local_rank: int
    world_size: int
    device: str


@contextlib.contextmanager
def rank_environment(*, device: str = "auto", threads: int = 1, timeout: float = 60.0) -> Iterator[RankEnvironment]:
    """torch.distributed initialised over every rank (gloo, with nccl for CUDA tensors), destroyed at the end.

    device: auto | cpu | cuda, auto takes CUDA where every local rank has a GPU; threads: CPU threads of this rank;
    timeout: seconds of any collective. UsageError for "cuda" with fewer GPUs than local ranks.
    """
    import torch
    import torch.distributed as dist

    torch.set_num_threads(threads)
    local_rank, local_ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if device == "cuda" and gpus < local_ranks:
        raise UsageError(
            f"training.device: expected a GPU for each of {local_ranks} ranks, found {gpus}; use fewer ranks or cpu"
        )
    device = "cuda" if gpus >= local_ranks else "cpu"
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=timedelta(seconds=timeout))
    yield RankEnvironment(dist.get_rank(), local_rank, dist.get_world_size(), device)
    # Not after an exception: it can wait for peers that are gone, and the process ends anyway.
    dist.destroy_process_group()
