"""Every op on random shapes, strides and dtypes: results within their bound, and all no worse than twice torch."""

import pytest
from case import check
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import PROBLEMS
from properties import FAMILIES, Draw

each_family = pytest.mark.parametrize("name", FAMILIES)


def examine(name: str, count: int) -> None:
    @settings(
        max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.composite(lambda draw: FAMILIES[name](Draw(draw)))())
    def property_of(case):
        check(case)

    property_of()


@each_family
def test_random_calls(name):
    examine(name, 10)


@pytest.mark.full
@each_family
def test_random_calls_full(name):
    examine(name, 400)


def test_every_op_has_a_family():
    assert FAMILIES.keys() >= {problem.op for problem in PROBLEMS}
