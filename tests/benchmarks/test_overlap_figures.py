"""The figures of the overlap suite: E, its ceiling, and the time that stands for the bar."""

import pytest

from benchmarks.suites import test_overlap as suite
from tpmp_kernels.bench import Timing


def timings(gemm: float, none: float, ours: float, parts: float) -> dict[str, Timing]:
    seconds = {suite.GEMM: gemm, suite.NONE: none, suite.OURS: ours, suite.PARTS: parts}
    return {name: Timing((each,)) for name, each in seconds.items()}


def test_serial_hides_nothing_and_the_gemm_alone_is_all():
    assert suite.hidden(timings(1.0, 2.0, 2.0, 1.0)) == 0
    assert suite.hidden(timings(1.0, 2.0, 1.0, 1.0)) == 1
    assert suite.hidden(timings(1.0, 2.0, 3.0, 1.0)) == -1, "slower than serial"


@pytest.mark.parametrize("r", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("tax", [0.0, 0.02, 0.2])
def test_the_ideal_pipeline_reaches_the_ceiling(r, tax):
    gemm, chunks = 1.0, suite.CHUNKS
    ideal = timings(gemm, gemm + r, (1 + tax) * gemm + r / chunks, (1 + tax) * gemm)
    assert suite.tax(ideal) == pytest.approx(tax)
    assert suite.hidden(ideal) == pytest.approx(suite.highest(ideal, r))
    assert suite.time_at(suite.hidden(ideal), ideal) == pytest.approx(ideal[suite.OURS].median)


def test_every_ratio_has_a_bar():
    assert {(bar.case, bar.shape) for bar in suite.BARS} == {(suite.CASE, suite.shape(r)) for r in suite.RATIOS}
