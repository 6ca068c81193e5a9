"""Whether the process of a rank still lives, for ranks that share a host and its process numbers with this one."""

import os


def identity() -> list:
    """Host and process-number space, process number and start of this process; a peer passes it to `gone`."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            host = file.read().strip()
        return [f"{host} {os.readlink('/proc/self/ns/pid')}", os.getpid(), _state(os.getpid())[1]]
    except OSError:  # no /proc: nobody can look
        return ["", os.getpid(), ""]


def comparable(mine: list, other: list | None) -> bool:
    """Whether the process of `other` can be looked at from here."""
    return other is not None and bool(mine[0]) and mine[0] == other[0]


def gone(other: list) -> bool:
    """Whether that process has ended; another process may have got its number since."""
    _, pid, start = other
    try:
        state, started = _state(pid)
    except (FileNotFoundError, ProcessLookupError):
        return True
    except OSError:
        return False
    return state in "ZX" or started != start


def _state(pid: int) -> tuple[str, str]:
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()  # the name before it may hold blanks
    return fields[0], fields[19]
