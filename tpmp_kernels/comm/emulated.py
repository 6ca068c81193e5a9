"""The emulated link: a communicator that delivers late by sleeping, to measure on one host what exists between hosts.

    link = EmulatedLink(comm, latency=1e-3, bandwidth=1e9)     # on every rank; seconds, bytes a second
    work = link.all_reduce(x, async_op=True)                   # computing now hides the modelled time
    work.wait()

The bytes move through the wrapped communicator, as fast as it can; a call is complete once they are in place *and* the
modelled time is over. The model: each rank has one link, with an outgoing and an incoming lane.

- A collective takes both lanes of all ranks. It begins when the last rank has posted it and the lanes are free, lasts
  latency + (the most bytes that one rank moves) / bandwidth, and ends at the same moment everywhere, for roots and
  senders too. Bytes are those of the best algorithm, as nccl-tests counts them: see `bytes_moved`.
- A message takes the sender's outgoing lane for bytes / bandwidth and, latency later, the receiver's incoming lane for
  as long: it arrives latency + bytes / bandwidth after it was sent, where lanes are free. Messages of one pair arrive
  in order. The sender is free as soon as the wrapped transport has taken the message from it.
- What finds a lane taken waits for its turn. Only a collective that some rank has not posted yet takes no lane: a
  message may pass it, and does not put it off.

A stamp follows each call through the wrapped communicator: when its time began, on the clock that the processes of a
host share. Nothing is held back at the sender. Whoever waits sleeps, so that the emulated time costs no core. Errors,
abort and close are those of the wrapped communicator; what strikes while a rank sleeps is raised by that rank's next
call. Rows measured over such a link name `transport`, which says that it is emulated.
"""

import contextlib
import threading
import time
from bisect import insort
from collections import defaultdict, deque
from collections.abc import Callable, Iterator

import torch

from tpmp_kernels.comm.arguments import Collective
from tpmp_kernels.comm.communicator import Communicator, Work
from tpmp_kernels.errors import TransportError, TransportTimeout

_STAMP = "{} (emulated link)"  # the tag of a stamp, from that of its call
_REMEMBERED = 64  # intervals of a lane: more than a rank has calls in flight


class EmulatedLink(Communicator):
    """The calls of `comm`, late by `latency` seconds and by their bytes at `bandwidth` (bytes a second; inf: at once).

    Takes `comm` over: use and close the link in its place. Every rank wraps its own with the same figures; ranks are on
    one host, tensors on the CPU. A group of one rank has no link, and no delay.
    """

    def __init__(self, comm: Communicator, *, latency: float, bandwidth: float):
        super().__init__(comm.rank, comm.size, name=comm.name, timeout=comm.timeout)
        if not 0 <= latency < 1e9:  # also False for nan
            raise ValueError(f"emulated link: latency is {latency!r}; pass a number of seconds, from 0 to below 1e9")
        if not bandwidth > 0:
            raise ValueError(f"emulated link: bandwidth is {bandwidth!r}; pass bytes a second, above 0, or inf")
        self.latency = latency
        self.bandwidth = bandwidth
        self.transport = f"{comm.transport} over an emulated link"
        self._comm = comm
        self._lock = threading.Lock()  # of what follows: a Work may be waited for on another thread
        self._outgoing = 0.0  # when the outgoing lane is free
        self._incoming = _Lane()
        self._collectives = _Stream()
        self._messages: dict[int, _Stream] = defaultdict(_Stream)  # by sender
        self._failure: TransportTimeout | None = None

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, {1e6 * self.latency:g} us, {self.bandwidth / 1e9:g} GB/s>"

    @property
    def overlaps(self) -> bool:
        """The modelled time costs no core."""
        return True

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self._comm.empty(*shape, dtype=dtype)

    def abort(self, reason: str) -> None:
        self._comm.abort(reason)

    def last_ops(self) -> list[str]:
        """Those of the wrapped communicator, stamps among them: a call's stamp has its tag and "(emulated link)"."""
        return self._comm.last_ops()

    def close(self) -> None:
        self._comm.close()

    def _check_tensor(self, call: str, tensor: torch.Tensor) -> None:
        self._comm._check_tensor(call, tensor)

    def _run(self, call: Collective) -> None:
        self._post(call, None).finish(self.timeout)

    def _post(self, call: Collective, landed: Callable[[], None] | None) -> "_Late":
        with self._ordered():
            ready = max(time.monotonic(), self._outgoing, self._incoming.free)
            carried = self._comm._post(call, landed)
            stamp = torch.tensor([ready, bytes_moved(call, self.rank, self.size)], dtype=torch.float64)
            tag = _STAMP.format(call.tag)
            stamped = self._after(carried, lambda: self._comm.all_reduce(stamp, "max", tag=tag, async_op=True))
            work = _Late(self, call.kind, carried, stamped)
            return self._collectives.append(work, lambda last: self._end_of_collective(last, *stamp.tolist()))

    def _end_of_collective(self, last: float, ready: float, nbytes: float) -> float:
        """Takes both lanes from when the last one ended and the last rank was ready; returns the end."""
        begin = max(last, ready)
        end = begin + (self.latency + nbytes / self.bandwidth if self.size > 1 else 0.0)
        self._outgoing = max(self._outgoing, end)
        self._incoming.occupy(begin, end)
        return end

    def _isend(self, tensor: torch.Tensor, dst: int, tag: str) -> "_Late":
        with self._ordered():
            begin = max(time.monotonic(), self._outgoing)
            self._outgoing = begin + _nbytes(tensor) / self.bandwidth
            carried = self._comm._isend(tensor, dst, tag)
            stamp = torch.tensor([begin], dtype=torch.float64)
            stamped = self._after(carried, lambda: self._comm.isend(stamp, dst, tag=_STAMP.format(tag)))
        work = _Late(self, f"send to rank {dst}", carried, stamped)
        work.due = 0.0  # the tensor may be changed as soon as the bytes are out of it
        return work

    def _irecv(self, tensor: torch.Tensor, src: int, tag: str, landed: Callable[[], None] | None) -> "_Late":
        with self._ordered():
            carried = self._comm._irecv(tensor, src, tag, landed)
            stamp = torch.empty(1, dtype=torch.float64)
            stamped = self._after(carried, lambda: self._comm.irecv(stamp, src, tag=_STAMP.format(tag)))
            work = _Late(self, f"recv from rank {src}", carried, stamped)
            seconds = _nbytes(tensor) / self.bandwidth
            return self._messages[src].append(
                work, lambda last: self._incoming.take(max(last, stamp.item() + self.latency), seconds)
            )

    @contextlib.contextmanager
    def _ordered(self) -> Iterator[None]:
        """Around the posting of a call, once the lanes are taken by all that is known to have begun before it."""
        self.refuse_after_failure()
        with self._lock:
            while self._collectives.waiting and self._collectives.waiting[0].stamped.done():
                self._collectives.settle_first(self.timeout)
            yield

    def _after(self, carried: Work, post_stamp: Callable[[], Work]) -> Work:
        """The stamp of a call. Where the call failed already, it is the one to say so."""
        try:
            return post_stamp()
        except TransportError:
            carried.wait(self.timeout)
            raise

    # ---- what a Work asks for

    def settle(self, work: "_Late", deadline: float) -> None:
        """Find out when `work` is due, waiting for its stamp outside of the lock: others may post meanwhile."""
        work.stamped.wait(_remaining(deadline))
        with self._lock:
            while work.due is None:
                work.stream.settle_first(_remaining(deadline))

    def sleep_until(self, due: float, deadline: float, what: str, timeout: float) -> None:
        """Sleep out the modelled time; past the deadline it is a TransportTimeout, for all later calls too."""
        while (now := time.monotonic()) < min(due, deadline):
            time.sleep(min(due, deadline) - now)
        if due > deadline:
            self._failure = TransportTimeout(
                f"communicator {self.name!r}: {what} is still on the emulated link | rank {self.rank} | waited "
                f"{timeout:g} s, {due - deadline:.3g} s too short | do: pass a longer timeout, or emulate a faster link"
            )
            self.abort(str(self._failure))
            raise self._failure

    def refuse_after_failure(self) -> None:
        if self._failure is not None:
            raise TransportTimeout(str(self._failure))


class _Late(Work):
    """A call in flight: `carried` by the wrapped communicator, then `stamped`, and complete not before `due`."""

    def __init__(self, link: EmulatedLink, what: str, carried: Work, stamped: Work):
        self.link, self.what, self.carried, self.stamped = link, what, carried, stamped
        self.stream: _Stream | None = None
        self.find_due: Callable[[float], float] | None = None  # see _Stream.append
        self.due: float | None = None  # on the clock of the host, once it is known
        self._finished = False

    def wait(self, timeout: float | None = None) -> None:
        with self.link._timed():
            self.finish(self.link.timeout if timeout is None else timeout)

    def finish(self, timeout: float) -> None:
        """wait, without counting its time."""
        if self._finished:
            return
        self.link.refuse_after_failure()
        deadline = time.monotonic() + timeout
        self.carried.wait(_remaining(deadline))
        self.link.settle(self, deadline)
        self.link.sleep_until(self.due, deadline, self.what, timeout)
        self._finished = True

    def done(self) -> bool:
        if self._finished:
            return True
        if not (self.carried.done() and self.stamped.done()):
            return False
        try:
            self.link.settle(self, time.monotonic() + self.link.timeout)
        except TransportError:
            return True  # which wait raises
        return time.monotonic() >= self.due


class _Stream:
    """Calls that are complete in the order in which they were posted: the collectives, or the messages of one rank."""

    def __init__(self):
        self.waiting: deque[_Late] = deque()  # those whose stamp has not been read yet
        self._last = 0.0  # when the last one before them is complete

    def append(self, work: _Late, due: Callable[[float], float]) -> _Late:
        """`due(last)` is when the work is complete, the one before it being complete at `last`."""
        work.stream, work.find_due = self, due
        self.waiting.append(work)
        return work

    def settle_first(self, timeout: float) -> None:
        first = self.waiting[0]
        first.stamped.wait(timeout)
        self.waiting.popleft()
        first.due = self._last = first.find_due(self._last)


class _Lane:
    """One direction of a rank's link: the intervals, on the clock of the host, in which it is taken."""

    def __init__(self):
        self._taken: list[tuple[float, float]] = []  # by their beginnings

    @property
    def free(self) -> float:
        """When the last of them ends."""
        return max((end for _, end in self._taken), default=0.0)

    def take(self, earliest: float, seconds: float) -> float:
        """Take the lane for `seconds`, in the first gap from `earliest` on; returns when that ends."""
        begin = earliest
        for start, end in self._taken:
            if begin + seconds <= start:
                break
            begin = max(begin, end)
        self.occupy(begin, begin + seconds)
        return begin + seconds

    def occupy(self, begin: float, end: float) -> None:
        insort(self._taken, (begin, end))
        del self._taken[:-_REMEMBERED]


def bytes_moved(call: Collective, rank: int, size: int) -> float:
    """Bytes that cross this rank's link in one direction, in the best algorithm: the bus bytes of nccl-tests."""
    if call.tensor is None:
        return 0.0
    nbytes = call.numel * call.tensor.element_size()
    if call.kind == "all_reduce":
        return 2 * (size - 1) / size * nbytes
    if call.kind in ("broadcast", "reduce"):
        return float(nbytes if size > 1 else 0)
    if call.input_splits:  # one's own part stays
        splits = (call.input_splits, call.output_splits)
        return float(max(sum(each) - each[rank] for each in splits) * call.tensor.element_size())
    return float((size - 1) * nbytes)


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _remaining(deadline: float) -> float:
    """Seconds until the deadline, for a wait that takes no less than a moment."""
    return max(deadline - time.monotonic(), 1e-6)
