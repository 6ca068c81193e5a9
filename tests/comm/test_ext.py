"""The compiled extension: stale or missing builds are named, and its sources keep the transport's rules."""

import importlib
import re
import sys
import types
from pathlib import Path

import pytest

import tpmp_kernels
from tpmp_kernels.comm import _ext
from tpmp_kernels.errors import TransportError

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in (".cpp", ".hpp"))
# The wait for a bell, and the loop of NCCL's watch. What asks NCCL again and again (nccl/lane.hpp) has a deadline.
WAITS = {"shm/wait.hpp": 1, "nccl/watch.cpp": 1}


def _code(path: Path) -> str:
    """The file without comments and strings."""
    return re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', "", path.read_text(), flags=re.DOTALL)


def _unbounded_loops(code: str) -> list[str]:
    return re.findall(r"\bwhile\s*\(|\bfor\s*\([^;()]*;\s*;|\bgoto\b", code)


@pytest.fixture(autouse=True)
def extension_is_optional(monkeypatch):
    monkeypatch.delenv("TPMP_EXT", raising=False)  # which CI sets


def test_a_stale_extension_is_named_and_not_used(monkeypatch):
    monkeypatch.setitem(sys.modules, "tpmp_kernels._C", types.SimpleNamespace(ABI="tpmp-0"))
    with pytest.warns(UserWarning, match=r"stale: expected ABI 'tpmp-\d+', got 'tpmp-0'; run `pip install"):
        assert _ext.load() is None
    monkeypatch.setenv("TPMP_EXT", "require")
    with pytest.raises(ImportError, match="stale"):
        _ext.load()


def test_an_extension_that_does_not_load_is_named(monkeypatch):
    def broken(name):
        raise ImportError("undefined symbol: _Znwm")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.warns(UserWarning, match="cannot be loaded .*undefined symbol"):
        assert _ext.load() is None


def test_a_missing_extension_warns_once_at_import_and_is_an_error_where_required(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=r"tpmp_kernels._C is missing.*install a C\+\+17 compiler"):
        tpmp_kernels._warn_without_extension()
    monkeypatch.setenv("TPMP_EXT", "require")
    with pytest.raises(ImportError, match="TPMP_EXT=require"):
        tpmp_kernels._warn_without_extension()
    monkeypatch.setitem(sys.modules, "tpmp_kernels._C", None)  # import raises ModuleNotFoundError
    assert _ext.load() is None


def test_waiting_happens_in_one_place():
    assert len(SOURCES) > 8
    loops = {str(path.relative_to(CSRC)): len(_unbounded_loops(_code(path))) for path in SOURCES}
    assert {name: count for name, count in loops.items() if count != WAITS.get(name, 0)} == {}
    assert _unbounded_loops("while (x)") and _unbounded_loops("for (int i = 0;; ++i)") and _unbounded_loops("for (;;)")


@pytest.mark.parametrize(
    "word", ["volatile", "atomic_thread_fence", "printf\\(", "std::c(out|err)", "torch/", "sleep_for"]
)
def test_sources_keep_the_rules_of_the_transport(word):
    pattern = re.compile(rf"\b(?<!sn){word}")
    # The pause of the spin; and that between two questions to NCCL.
    allowed = {"asm volatile", "for (; !done(); std::this_thread::sleep_for"}
    for path in SOURCES:
        lines = [line for line in _code(path).splitlines() if pattern.search(line)]
        assert all(any(a in line for a in allowed) for line in lines), (path.name, lines)


def test_shm_sizes_keep_64_ranks_below_a_gibibyte():
    if _ext.C is None:
        pytest.skip("needs the compiled extension")
    before = _shared_bytes()
    server = _ext.C.SegmentServer(64)
    grown = _shared_bytes() - before
    assert 2**20 < grown < 2**30 and server.address != server.nonce
    with pytest.raises(TransportError, match="2 to 64 ranks"):
        _ext.C.SegmentServer(65)


def _shared_bytes() -> int:
    with open("/proc/self/maps") as maps:
        spans = [line.split()[0].split("-") for line in maps if "memfd:tpmp" in line]
    return sum(int(end, 16) - int(start, 16) for start, end in spans)
