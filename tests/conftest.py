"""Fixtures shared by every test: pools of ranks, one for each world size, alive for the whole session."""

import pytest

from tpmp_kernels.testing import RankPool


@pytest.fixture(scope="session")
def ranks():
    """`ranks(4).run(function, *args)` runs a module-level function on four processes."""
    pools: dict[int, RankPool] = {}

    def pool(size: int) -> RankPool:
        return pools.setdefault(size, RankPool(size))

    yield pool
    for each in pools.values():
        each.close()
