"""Threads of a communicator that wait in gloo on the caller's behalf: for posted collectives, and for `done()`.

gloo carries a message out by itself, but a collective of several rounds needs somebody to begin the next one; and it
says that a message is through only to who waits for it. Both threads begin with the first use. What breaks off their
waits is here, too.
"""

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from tpmp_kernels.comm.out_of_band.board import Board
from tpmp_kernels.comm.out_of_band.communicator import Interrupted, LibraryError
from tpmp_kernels.comm.process_group.messages import REFUSALS, Messages, Pending

FOREVER = float("1e9")  # seconds: whoever waits for the task has the deadline
_NEVER = (1 << 31) - 1  # the tag of a message that nobody sends
_SLICE = 0.05  # seconds between two looks at the failure of the group


class Task:
    """A step on a helper thread, and its outcome for whoever waits."""

    def __init__(self, board: Board, step: Callable[[], None]):
        self._board, self._step = board, step
        self._error: Exception | None = None
        self._over = threading.Event()

    def run(self) -> None:
        try:
            self._step()
        except (LibraryError, Interrupted) as error:
            self._error = error
        self._step = None  # its tensors
        self._over.set()

    def finish(self, deadline: float) -> None:
        while not self._over.wait(max(0.0, min(_SLICE, deadline - time.monotonic()))):
            if self._board.failure is not None:
                raise Interrupted
            if time.monotonic() >= deadline:
                raise LibraryError("timed out")
        if self._error is not None:
            raise self._error

    def ready(self) -> bool:
        return self._over.is_set()


class Helpers:
    """The helper threads of one communicator: one for all posted collectives, in order, and one for each `polled`."""

    def __init__(self, board: Board):
        self._board = board
        self._queue: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._posts = False

    def post(self, step: Callable[[], None]) -> Task:
        task = Task(self._board, step)
        if not self._posts:
            self._posts = True
            self._start(_drain, self._queue)
        self._queue.put(task)
        return task

    def polled(self, step: Callable[[], None]) -> Task:
        task = Task(self._board, step)
        self._start(task.run)
        return task

    def close(self, interrupt: Callable[[], None]) -> None:
        """End the threads: those still inside gloo by interrupting it, with the group's failure set."""
        self._queue.put(None)
        deadline = time.monotonic() + 2
        for thread in self._threads:
            while thread.is_alive() and time.monotonic() < deadline and thread is not threading.current_thread():
                if self._board.blocked:
                    interrupt()
                thread.join(_SLICE)

    def _start(self, target: Callable, *args) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=target, args=args, name="tpmp-helper", daemon=True)
        self._threads.append(thread)
        thread.start()


def _drain(tasks: "queue.SimpleQueue[Task | None]") -> None:
    while (task := tasks.get()) is not None:
        task.run()
        del task  # or its tensors would live until the next one


class Message:
    """A message of gloo, which tells that it is through only to who waits: `ready` lets a helper do so."""

    def __init__(self, messages: Messages, helpers: Helpers, pending: Pending):
        self._messages, self._helpers, self._pending, self._task = messages, helpers, pending, None

    def finish(self, deadline: float) -> None:
        if self._task is not None:
            self._task.finish(deadline)
        else:
            self._messages.finish([self._pending], deadline)

    def ready(self) -> bool:
        if self._task is None:
            messages, pending = self._messages, self._pending
            self._task = self._helpers.polled(lambda: messages.finish([pending], FOREVER))
        return self._task.ready()


class Interrupt:
    """Breaks off the waits of all threads in the backends of a group, for good."""

    def __init__(self, group: dist.ProcessGroup, backends: dict[str, str]):
        self._group, self._gloo = group, "gloo" in backends.values()
        self._others = any(backend != "gloo" for backend in backends.values())
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        self._peers = [peer for peer in range(size) if peer != rank]

    def __call__(self) -> None:
        if self._gloo:
            for peer in self._peers:
                self._time_out(peer)
        if self._others:
            self._others = False
            with suppress(*REFUSALS, AttributeError):
                self._group.abort()

    def _time_out(self, peer: int) -> None:
        """A wait that times out closes all connections of gloo, and ends every other wait with them. It cannot begin
        where the connection to the peer is closed already, as one to a dead rank is, while others are open."""
        with suppress(*REFUSALS):
            never = dist.irecv(torch.empty(1), group=self._group, group_src=peer, tag=_NEVER)
            never.wait(timedelta(milliseconds=1))
