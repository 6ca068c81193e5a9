"""The direction of dependency: a room imports rooms below it, never above; parsed from the sources, nothing is run."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "tpmp_kernels"

# Room -> level. A module may import rooms of its own level only where it is the same room.
LEVELS = {
    "errors": 0, "env": 0, "reference": 0, "testing": 0,
    "kernels": 1,
    "ops": 2,
    "comm": 3,
    "tensor_parallel": 4, "pipeline": 4,
    "models": 5,
    "checkpoint": 6,
    "training": 7, "bench": 7, "patching": 7,
    "prover": 8,
    "__main__": 9,
}  # fmt: skip

STANDARD_LIBRARY_ONLY = [
    "pipeline/__init__.py", "pipeline/schedule.py", "pipeline/schedules", "pipeline/costs.py",
    "pipeline/messages.py", "pipeline/lowering.py", "pipeline/rendezvous.py", "pipeline/validate.py",
    "pipeline/files.py", "pipeline/simulate.py", "pipeline/simulation.py", "pipeline/options.py", "pipeline/summary.py",
    "pipeline/command.py", "pipeline/command_model.py", "pipeline/measured.py", "pipeline/partition.py",
    "pipeline/partition_pins.py", "pipeline/partition_search.py",
    *(f"pipeline/draw/{name}.py" for name in ("__init__", "layout", "palette", "panel", "pictures", "scale", "sheet")),
    *(f"pipeline/draw/{name}.py" for name in ("svg", "table", "terminal", "trace")),
    "errors.py", "env.py", "__init__.py", "kernels/tiles.py", "kernels/dispatch.py", "comm/overlap/plan.py",
]  # fmt: skip


def sources() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Absolute names that a file imports, wherever in the file, relative ones resolved; TYPE_CHECKING blocks too."""
    package = [*path.relative_to(ROOT.parent).parent.parts]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            names |= {prefix, *(f"{prefix}.{alias.name}" for alias in node.names)}
    return names


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def rooms_used(path: Path) -> set[str]:
    parts = (name.split(".") for name in imports(path) if name.startswith("tpmp_kernels."))
    return {p[1] for p in parts if p[1] in LEVELS}


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downward(path):
    room = room_of(path)
    if room == "__init__":
        assert rooms_used(path) <= {"env"}
        return
    assert room in LEVELS, f"{room} has no level: give it one in {Path(__file__).name}"
    upward = {r for r in rooms_used(path) - {room} if LEVELS[r] >= LEVELS[room]}
    assert not upward, f"{path.relative_to(ROOT)} imports {sorted(upward)}, which do not lie below {room}"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_only_comm_imports_the_extension(path):
    text = path.read_text()
    if "tpmp_kernels._C" in text or any(name.endswith("._C") for name in imports(path)):
        assert room_of(path) in ("comm", "__init__"), f"{path.relative_to(ROOT)} names tpmp_kernels._C"


@pytest.mark.parametrize("place", STANDARD_LIBRARY_ONLY)
def test_standard_library_only(place):
    path = ROOT / place
    for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
        outside = {name.split(".")[0] for name in imports(file)} - set(sys.stdlib_module_names) - {"tpmp_kernels", ""}
        assert not outside, f"{file.relative_to(ROOT)} imports {sorted(outside)}"


def test_schedule_tools_load_without_torch():
    import subprocess

    code = "import sys, tpmp_kernels.pipeline.command; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# What a GPU machine has; nothing can be installed there.
GPU_MACHINE = {
    "torch", "triton", "numpy", "pytest", "tpmp_kernels", "tests", "benchmarks",
    "bounds", "neighbour_bounds", "loss_bounds", "loss_oracle", "loss_shards", "problems",
}  # fmt: skip


@pytest.mark.parametrize(
    "path", sorted(p for room in ("tests", "benchmarks") for p in (ROOT.parent / room).rglob("*.py"))
)
def test_gpu_tests_import_what_a_gpu_machine_has(path):
    """`make gpu-check` collects *_gpu.py alone, so a gpu test anywhere else would never run."""
    text = path.read_text()
    if path.name.endswith("_gpu.py") or path.name == "conftest.py":
        found = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)
        assert found <= GPU_MACHINE, f"{path} imports {sorted(found - GPU_MACHINE)}"
    elif path != Path(__file__):
        assert "mark.gpu" not in text, f"{path} has a gpu test: move it to a file called *_gpu.py"
