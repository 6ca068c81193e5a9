"""How many cases a GPU suite takes: the first few in every run, since a machine with a GPU is lent for minutes."""

import os
from collections.abc import Sequence


def chosen(suite: str, few: int, cases: Sequence) -> list:
    """The first `few` cases, or all of them where SUITE in the environment names this suite."""
    return list(cases if os.environ.get("SUITE") == suite else cases[:few])
