"""Two ranks for one measurement: fresh processes, so that no contender finds memory that another has left."""

from collections.abc import Callable

from tpmp_kernels.testing import RankPool


def in_processes_of_their_own(function: Callable, *args) -> list:
    """function(*args) on both ranks; what each returned."""
    pool = RankPool(2)
    try:
        return pool.run(function, *args, timeout=900)
    finally:
        pool.close()
