"""The Work that the "tpmp" backend hands to torch.distributed: posted calls of a communicator, and their futures.

A communicator's Work is finished by whoever waits for it. torch also wants futures that finish by themselves (DDP's
reducer waits for one in C++), so the first `get_future` gives a Work to a Finisher, a thread that waits in its place.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from tpmp_kernels.comm.communicator import Work
from tpmp_kernels.errors import TransportError, TransportTimeout


class CompletedWork(dist.Work):
    """The Work of a call that was carried out before it returned; one object serves every such call."""

    def wait(self, timeout: timedelta | None = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def is_success(self) -> bool:
        return True

    def exception(self) -> None:
        return None

    def result(self) -> list[torch.Tensor]:
        return []

    def synchronize(self) -> None:
        return None

    def get_future(self) -> torch.futures.Future:
        future = torch.futures.Future()
        future.set_result(None)
        return future


COMPLETED = CompletedWork()


class PostedWork(dist.Work):
    """One torch.distributed call under way: one or more posted calls, and what is to be done once all have landed."""

    def __init__(
        self,
        posted: Sequence[Work],
        tensors: list[torch.Tensor],
        finisher: Callable[[], "Finisher"],
        landed: Callable[[], None] | None = None,
        source: int | None = None,
    ):
        super().__init__()
        self._posted, self._tensors, self._landed = posted, tensors, landed
        self._finisher, self._source = finisher, source
        self._lock = threading.Lock()  # held by the one thread that waits; another waits for the lock
        self._finished = False
        self._error: Exception | None = None
        self._future: torch.futures.Future | None = None

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Block until it is complete, raising what the call met; True otherwise. A zero timeout is the group's own."""
        if not self._finished:
            self._finish(timeout.total_seconds() if timeout and timeout > timedelta(0) else None)
        if self._error is not None:
            raise self._error
        return True

    def synchronize(self) -> None:
        self.wait()

    def is_completed(self) -> bool:
        if not self._finished and all(work.done() for work in self._posted):
            self._finish(None)
        return self._finished

    def is_success(self) -> bool:
        return self.is_completed() and self._error is None

    def exception(self) -> Exception | None:
        return self._error

    def result(self) -> list[torch.Tensor]:
        return self._tensors

    def source_rank(self) -> int:
        if self._source is None:
            raise ValueError("source_rank: this work is no receive; ask the work of a recv")
        return self._source

    _source_rank = source_rank

    def get_future(self) -> torch.futures.Future:
        """A future of the call's tensors. It fails with the call's error as text in a RuntimeError: torch's futures
        carry no exception of Python's from one language to the other."""
        if self._future is None:
            finished = torch.futures.Future()
            self._future = finished.then(self._value)
            if self.is_completed():
                finished.set_result(None)
            else:
                self._finisher().add(self, finished)
        return self._future

    def finish(self) -> None:
        """Wait as long as the communicator allows and keep the error, if any, for `wait`."""
        if not self._finished:
            self._finish(None)

    def _value(self, _) -> list[torch.Tensor] | None:
        if self._error is not None:
            raise self._error
        return self._tensors or None  # torch cannot tell the type of an empty list

    def _finish(self, seconds: float | None) -> None:
        if not self._lock.acquire(timeout=-1 if seconds is None else seconds):
            raise TransportTimeout(f"wait: still under way after {seconds:g} s (its future is waited for); wait longer")
        try:
            if not self._finished:
                self._land(seconds)
        finally:
            self._lock.release()

    def _land(self, seconds: float | None) -> None:
        try:
            for work in self._posted:
                work.wait(seconds)
            if self._landed is not None:
                self._landed()
        except TransportError as error:
            self._error = error
        self._posted, self._landed = (), None
        self._finished = True


class WorkPart(Work):
    """A torch Work as a part of another: what _start_coalescing collects."""

    def __init__(self, work: dist.Work):
        self._work = work

    def wait(self, timeout: float | None = None) -> None:
        self._work.wait(timedelta(seconds=timeout or 0))

    def done(self) -> bool:
        return self._work.is_completed()


class Finisher:
    """A thread that finishes works in the order in which they were added and then completes their futures."""

    def __init__(self):
        self._works: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="tpmp futures", daemon=True)
        self._thread.start()

    def add(self, work: PostedWork, finished: torch.futures.Future) -> None:
        self._works.put((work, finished))

    def close(self) -> None:
        """End the thread; the communicator is closed before, so that no wait goes on."""
        self._works.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        while (item := self._works.get()) is not None:
            work, finished = item
            work.finish()
            finished.set_result(None)
            del item, work, finished  # the last references must not wait for the next work
