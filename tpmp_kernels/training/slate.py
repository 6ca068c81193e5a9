"""What a rank leaves for its launcher: how far it came, and why it failed. An anonymous file, so nothing stays behind.

Not a pipe: a rank must never block on it, and what it wrote must outlive the rank. Layout: progress in the first
_REPORT bytes, then the report, JSON from `fail` or the plain text of a crash from faulthandler.
"""

import contextlib
import faulthandler
import json
import os
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass
from multiprocessing import reduction

from tpmp_kernels.errors import ProofFailed, TransportError, UsageError

_REPORT = 128


@dataclass(frozen=True)
class Report:
    """Why a rank ended. kind: usage | proof | error | transport | crash; time: monotonic seconds of this host."""

    kind: str
    sentence: str
    traceback: str
    pid: int = 0
    time: float = float("inf")

    @property
    def order(self) -> tuple[bool, float]:
        """The smallest is the culprit: an error of communication is nearly always the echo of another rank's end."""
        return self.kind == "transport", self.time


class Slate:
    """One rank's file. Made by the launcher, pickled to the rank as a file descriptor."""

    def __init__(self, fd: int | None = None):
        self._file = tempfile.TemporaryFile(buffering=0) if fd is None else os.fdopen(fd, "r+b", buffering=0)  # noqa: SIM115
        self._file.seek(_REPORT)

    def __reduce__(self):
        return _received, (reduction.DupFd(self._file.fileno()),)

    def progress(self, text: str) -> None:
        os.pwrite(self._file.fileno(), text.encode()[:_REPORT].ljust(_REPORT, b"\0"), 0)

    def catch_crashes(self) -> None:
        """Send the stack of a segmentation fault or abort here instead of to the console."""
        faulthandler.enable(self._file, all_threads=False)

    def fail(self, error: BaseException) -> Report:
        report = describe(error)
        self._file.write(json.dumps(asdict(report)).encode())
        return report

    def read(self) -> tuple[str, Report | None]:
        """(progress, report), each empty where the rank left none."""
        data = os.pread(self._file.fileno(), os.fstat(self._file.fileno()).st_size, 0)
        progress, text = data[:_REPORT].rstrip(b"\0").decode(errors="replace"), data[_REPORT:].decode(errors="replace")
        if not text:
            return progress, None
        with contextlib.suppress(ValueError):
            return progress, Report(**json.loads(text))
        return progress, Report("crash", "", text.partition("\nExtension modules")[0])


def describe(error: BaseException) -> Report:
    kinds = {UsageError: "usage", ProofFailed: "proof", TransportError: "transport"}
    kind = next((kind for cls, kind in kinds.items() if isinstance(error, cls)), "error")
    first_line = next(iter(str(error).splitlines()), "")
    sentence = first_line if kind in ("usage", "proof") else f"{type(error).__name__}: {first_line}".removesuffix(": ")
    return Report(kind, sentence, "".join(traceback.format_exception(error)), os.getpid(), time.monotonic())


def _received(duplicate) -> Slate:
    return Slate(duplicate.detach())
