"""No process outlives its launcher, not even after kill -9 of it: what the fork server and every rank set up first.

    launcher -> fork server -> ranks          (the kernel signals a child when its parent dies: PR_SET_PDEATHSIG)

A rank's parent is the fork server, so the fork server must end with the launcher, and then the kernel kills the ranks.
The launcher therefore preloads this module into its fork server, where importing it has that effect. Anywhere else
importing it has none.
"""

import ctypes
import os
import shutil
import signal
import sys
from pathlib import Path
from types import FrameType, TracebackType

# Set by the launcher for its fork server alone: "PID FOLDER", with the folder that holds the fork server's socket.
VARIABLE = "TPMP_LAUNCHER"
_PR_SET_PDEATHSIG = 1


def die_with_parent(signum: int) -> None:
    """Have the kernel send `signum` to this process when its parent dies. Linux only, nothing elsewhere."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signum, 0, 0, 0)


def launcher_is_gone(launcher: int) -> bool:
    """Whether the process `launcher` is neither the parent nor the grandparent of this one, on Linux.

    Asked after `die_with_parent`, which a parent that died before it does not trigger.
    """
    if sys.platform != "linux" or os.getppid() == launcher:
        return False
    try:
        stat = Path(f"/proc/{os.getppid()}/stat").read_text()
    except OSError:
        return True
    return int(stat.rpartition(")")[2].split()[1]) != launcher


def _guard_fork_server(folder: str) -> None:
    server = os.getpid()

    def end(signum: int, frame: FrameType | None) -> None:
        if os.getpid() == server:  # a rank that was just forked still has this handler
            shutil.rmtree(folder, ignore_errors=True)  # the launcher could not remove it
        os._exit(128 + signum)

    def report_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        # A launcher that ends while a rank starts takes away what the rank is just reading. Other errors are real.
        if not issubclass(kind, (FileNotFoundError, EOFError)):
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = report_error
    signal.signal(signal.SIGTERM, end)
    die_with_parent(signal.SIGTERM)


_launcher, _, _folder = os.environ.get(VARIABLE, "").partition(" ")
if _launcher == str(os.getppid()):
    _guard_fork_server(_folder)
