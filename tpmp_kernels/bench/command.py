"""`tpmp bench comm`: transports measured on a user's own machine, in one table.

    tpmp bench comm --ranks 4 --sizes 4KiB,16MiB

The ranks are those of a RankPool; whatever ends the command ends them. What was measured by then is shown.
"""

import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable

from tpmp_kernels.bench.comm_options import parse
from tpmp_kernels.bench.provenance import Provenance, provenance
from tpmp_kernels.bench.rows import Row
from tpmp_kernels.bench.table import table
from tpmp_kernels.errors import UsageError

_SUITES = ("comm",)


def run(argv: list[str], progress: Callable[[str], None] = lambda text: None) -> None:
    """Measure and print. `progress` is told how far it is, and may raise to end it while no rank is at work.

    Raises UsageError for bad input, AssertionError where a rank failed.
    """
    options = _options(argv)
    where = provenance(threads=1)
    _print(f"{options.ranks} ranks on {where.device}, torch {where.versions['torch']}, {where.date[:10]}")
    rows: list[Row] = []
    try:
        _measure(options, where, rows, progress)
    finally:
        if rows:
            _print(table(rows))


def _options(argv: list[str]) -> Namespace:
    suite = argv[0] if argv else "nothing"
    if suite in ("-h", "--help"):
        argv = ["comm", "--help"]
    elif suite not in _SUITES:
        got = repr(suite) if argv else suite
        raise UsageError(f"expected what to measure ({', '.join(_SUITES)}), got {got}; such as tpmp bench comm --quick")
    return parse(argv[1:])


def _measure(options: Namespace, where: Provenance, rows: list[Row], progress: Callable[[str], None]) -> None:
    """Append the rows of each case to `rows` as they come."""
    _start_fork_server()
    from tpmp_kernels.bench import comm  # torch, while the server imports it too

    _await_fork_server()
    cases = [(call, nbytes) for call in options.calls for nbytes in options.sizes]
    pool = comm.RankPool(options.ranks)
    try:
        for done, (call, nbytes) in enumerate(cases):
            progress(f"after {done} of {len(cases)} measurements")
            _show(f"{done + 1} of {len(cases)}: {call}, {comm.show_size(nbytes)}")
            rows += comm.measure(pool, call, nbytes, where, quick=options.quick)
        progress("after the last measurement")
    finally:
        _show("")
        pool.close()


def _start_fork_server() -> None:
    """Now, with SIGINT blocked, as it stays in the ranks then: Ctrl-C on a terminal reaches this process alone."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["tpmp_kernels.bench.comm"])
    multiprocessing.resource_tracker.ensure_running()  # which ends with SIGINT unblocked
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _await_fork_server() -> None:
    """Until it has imported its modules. A rank starts in milliseconds then, and a signal finds none half started."""
    process = multiprocessing.get_context("forkserver").Process(target=int)
    process.start()
    process.join()


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `tpmp bench comm | head` has seen enough, and nothing is left to be flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show(text: str) -> None:
    """One line on a terminal that each next one replaces."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
