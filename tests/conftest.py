"""Fixtures shared by every test: pools of ranks, one for each world size, alive for the whole session."""

import pytest
import torch

from tpmp_kernels.testing import RankPool


def pytest_pycollect_makeitem(collector, name, obj):
    """A test that is left out is not even expanded: the full grids are ten thousand items."""
    marks = {mark.name for mark in getattr(obj, "pytestmark", ())}
    if any(f"not {mark}" in collector.config.option.markexpr for mark in marks & {"full", "gpu"}):
        return []


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def ranks():
    """`ranks(4).run(function, *args)` runs a module-level function on four processes."""
    pools: dict[int, RankPool] = {}

    def pool(size: int) -> RankPool:
        return pools.setdefault(size, RankPool(size))

    yield pool
    for each in pools.values():
        each.close()
