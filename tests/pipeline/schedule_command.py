"""`tpmp schedule` called as the shell calls it, each test in a folder of its own."""

import pytest

from tpmp_kernels import __main__ as tpmp


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")


def shown(capsys, *argv: str) -> str:
    assert tpmp.main(["schedule", *argv]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def refused(capsys, *argv: str) -> str:
    """The sentence without its prefix."""
    assert tpmp.main(["schedule", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("tpmp schedule: ") and err.count("\n") == 1 and len(err) < 400, err
    return err.removeprefix("tpmp schedule: ").rstrip("\n")
