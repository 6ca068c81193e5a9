"""The judge of the proof: what it calls equal, and what it must not."""

import math

from tpmp_kernels.training.proof import judge


def test_the_largest_relative_difference_of_the_judged_steps_decides():
    verdict = judge([1.0, 2.0 + 2e-6, 9.0], [1.0, 2.0, 3.0], dtype="fp32", steps=2, tolerance=2e-6)
    assert math.isclose(verdict.difference, 1e-6, rel_tol=1e-6) and verdict.equal
    assert verdict.whole == 2.0  # printed, not judged
    assert "over all 3 steps 2.0e+00 (not judged" in str(verdict)


def test_a_difference_above_the_tolerance_is_a_difference():
    verdict = judge([1.0, 2.0], [1.0, 2.1], dtype="fp64", steps=2, tolerance=1e-9)
    assert not verdict.equal and "DIFFERENT" in str(verdict)


def test_nan_is_never_equal():
    assert not judge([1.0, math.nan], [1.0, 1.0], dtype="fp64", steps=2, tolerance=1e-9).equal
    assert not judge([1.0, 1.0], [1.0, math.nan], dtype="fp64", steps=2, tolerance=1e-9).equal
