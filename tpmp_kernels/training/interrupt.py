"""Ctrl-C and requests to end, for the launcher: they end its ranks, whose agent then finds them gone and returns.

The handler does not raise: an exception out of nowhere gets lost (in a destructor; in an import that an extension makes
and swallows), or cuts the agent short while it stops the ranks. All three happened within a hundred tries.
"""

import contextlib
import multiprocessing
import signal
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_REPEAT = 0.2  # seconds between two attempts
_PATIENCE = 5  # attempts by SIGTERM; a rank that is stopped (SIGSTOP, a debugger) takes SIGKILL alone
_LAST_RESORT = 25  # attempts without a rank to end, before it raises after all: something hangs


class Interrupted(KeyboardInterrupt):
    """The launcher got `signum` (Ctrl-C or a request to end) and stopped the ranks."""

    def __init__(self, signum: int):
        super().__init__()
        self.signum = signum
        self.progress = "before the first step"

    def __str__(self) -> str:
        how = "interrupted" if self.signum == signal.SIGINT else f"ended by {signal.Signals(self.signum).name}"
        return f"{how} {self.progress}; every rank was stopped"


@contextlib.contextmanager
def signals_end_ranks(others: set[BaseProcess]) -> Iterator[list[int]]:
    """Within the block, a signal ends every child of multiprocessing but `others`, those started later too.

    Yields the list of signals received: whoever starts the ranks asks it before and after. Signals that this process
    ignores, as under nohup, stay ignored. The main thread alone can enter.
    """
    received: list[int] = []
    attempts = 0

    def end_ranks(signum: int, frame: FrameType | None) -> None:
        nonlocal attempts
        if signum != signal.SIGALRM:
            received.append(signum)
            signal.setitimer(signal.ITIMER_REAL, _REPEAT, _REPEAT)
        attempts += 1
        ranks = set(multiprocessing.active_children()) - others
        for rank in ranks:
            if attempts > _PATIENCE:
                rank.kill()
            else:
                rank.terminate()
        if not ranks and attempts > _LAST_RESORT:
            raise Interrupted(received[0])

    handlers = {each: signal.getsignal(each) for each in _SIGNALS}
    previous = {each: old for each, old in handlers.items() if old not in (signal.SIG_IGN, None)}
    previous[signal.SIGALRM] = signal.getsignal(signal.SIGALRM)
    for each in previous:
        signal.signal(each, end_ranks)
    try:
        yield received
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for each, handler in previous.items():
            signal.signal(each, handler)
