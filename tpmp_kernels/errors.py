"""Every exception that this package raises on purpose. Messages say expected, got and remedy in one sentence."""


class UsageError(ValueError):
    """The user asked for something that cannot be: a bad config, a missing file, an impossible layout. Exit code 2."""


class TransportError(RuntimeError):
    """Communication between ranks failed. The communicator refuses further work; make a new one.

    `culprit` is the group rank that caused it (the same on every rank), or None where nobody can be named.
    """

    def __init__(self, message: str, culprit: int | None = None):
        super().__init__(message)
        self.culprit = culprit


class PeerDied(TransportError):
    """A rank of the group is gone: killed, crashed, or exited without closing its communicator."""


class PeerFailed(TransportError):
    """A rank of the group reported an exception of its own; the message carries its text."""


class CollectiveMismatch(TransportError):
    """Two ranks called different things: another kind, dtype, count, reduce op, peer or tag."""


class TransportTimeout(TransportError):
    """The deadline passed while every peer was alive; the message lists the last operations of every rank."""


class ScheduleError(ValueError):
    """A pipeline schedule is not executable: it deadlocks, loses or repeats work, or consumes the wrong data."""


class StageFailed(RuntimeError):
    """An exception within a pipeline stage; the message says stage, kind and microbatch, here and on every rank."""


class ProofFailed(RuntimeError):
    """A parallel run differs from the unfused reference by more than rounding. Exit code 1."""


class WrongResult(Exception):
    """Something of ours that was compared is further from the truth than it may be."""
