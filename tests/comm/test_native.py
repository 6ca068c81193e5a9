"""The transport without Python: tests/csrc built with failpoints, and under the sanitizers. Its program prints a line
of numbers for each group of runs; what they must be stands here.
"""

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tpmp_kernels.comm._ext import C

ROOT = Path(__file__).parents[2]
POINTS = [  # failpoints of the core, all of them: twelve
    *("collective.before_publish", "collective.after_publish", "collective.after_wait", "collective.after_read"),
    *("transfer.before_publish", "transfer.after_publish", "transfer.before_credit", "transfer.after_credit"),
    *("work.posted", "close.before", "poison.before", "heap.reserve"),
]
ALL_KILLS = (10 * 3 + 2) * (2 + 3 + 4)  # points, hits (of close and abort one), victims in worlds of 2, 3 and 4
BUILDS = {
    "plain": ["-DTPMP_FAILPOINTS", "-DTPMP_NO_AVX2"],  # the others reduce with it, where the machine has it
    "thread": ["-fsanitize=thread"],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-DTPMP_FAILPOINTS"],
}

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or shutil.which("g++") is None, reason="needs g++ on Linux (apt-get install g++)"
)


@pytest.fixture(scope="session")
def native(tmp_path_factory):
    """`native("thread", "threads", seed, count)` runs that build in that mode: its lines, as dicts."""
    built = {}

    def run(build: str, *arguments, wrapper=(), timeout=300) -> list[dict]:
        if build not in built:
            built[build] = compiled(BUILDS[build], tmp_path_factory.mktemp(build))
        ran = subprocess.run(
            [*wrapper, built[build], *map(str, arguments)], capture_output=True, text=True, timeout=timeout
        )
        print(ran.stdout, ran.stderr[-20_000:], sep="")
        assert ran.returncode == 0, f"{ran.returncode}: {ran.stderr[-20_000:]}"
        assert "Sanitizer" not in ran.stderr, ran.stderr[-20_000:]
        return [dict(word.split("=") for word in line.split()) for line in ran.stdout.splitlines()]

    return run


def compiled(flags: list[str], folder: Path) -> Path:
    """The core and the tests as one unit each: their headers are most of the work."""
    command = ["g++", "-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-pthread", *flags]
    command += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/csrc'}", '-DTPMP_ABI="test"']

    def compile_unit(name: str, sources: Path) -> str:
        unit = folder / f"{name}.cpp"
        unit.write_text("".join(f'#include "{source}"\n' for source in sorted(sources.glob("*.cpp"))))
        done = subprocess.run([*command, "-c", unit, "-o", f"{unit}.o"], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and not done.stderr, done.stderr
        return f"{unit}.o"

    with ThreadPoolExecutor() as pool:
        units = list(pool.map(compile_unit, ["core", "tests"], [ROOT / "csrc/shm", ROOT / "tests/csrc"]))
    subprocess.run([*command, *units, "-o", folder / "native"], check=True, timeout=120)
    return folder / "native"


def number(line: dict, *names: str) -> list[float]:
    return [float(line[name]) for name in names]


def by_group(lines: list[dict]) -> dict:
    assert len({line["group"] for line in lines}) == len(lines)
    return {line["group"]: line for line in lines}


def seed() -> int:
    return int(os.environ.get("TPMP_SEED", "1"))


# ---- results


def check_threads(lines: list[dict], batches: int):
    assert [line["world"] for line in lines] == ["2", "3", "4"]
    for line in lines:
        calls, transfers, failures = number(line, "calls", "transfers", "failures")
        assert calls > batches * int(line["world"]) and transfers > 0 and failures == 0, line


@pytest.mark.full
def test_random_calls_of_threads_are_right(native):
    check_threads(native("plain", "threads", seed(), 10), 10)


@pytest.mark.full
@pytest.mark.parametrize("build", ["thread", "address"])
def test_the_sanitizers_have_nothing_to_say(native, build):
    # ThreadSanitizer of gcc 12 does not know mappings as random as those of newer kernels.
    wrapper = ("setarch", "-R") if build == "thread" and shutil.which("setarch") else ()
    check_threads(native(build, "threads", seed(), 400, wrapper=wrapper, timeout=900), 400)


# ---- deaths


def check_all_agree(line: dict, runs: int):
    """Every planned fault took place, and every survivor of each reported it, with the same right culprit."""
    assert number(line, "runs", "struck", "hung", "told", "same", "right", "said") == [runs, runs, 0, *[runs] * 4], line


def test_every_survivor_of_a_kill_names_the_dead_within_100_ms(native):
    (line,) = native("plain", "deaths", seed(), 160)
    check_all_agree(line, 160)
    assert float(line["p99_ms"]) <= 100


@pytest.mark.full
@pytest.mark.parametrize("build", ["plain", "address"])
def test_every_failpoint_kills_every_rank(native, build):
    (line,) = native(build, "deaths", seed(), ALL_KILLS)
    check_all_agree(line, ALL_KILLS)
    assert float(line["p99_ms"]) <= 100


def check_faults(lines: list[dict]):
    groups = by_group(lines)
    assert set(groups) == {"exit", "stop", "late", "throw", "bad_alloc", "errno", "cascade"}
    check_all_agree(groups["exit"], 12)
    check_all_agree(groups["late"], 6)  # stopped or paused, and woken in time: no error, right results
    for name in ("throw", "bad_alloc", "errno"):
        check_all_agree(groups[name], 18)
    check_all_agree(groups["stop"], 6)
    assert number(groups["cascade"], "runs", "struck", "same", "right") == [18] * 4
    assert float(groups["cascade"]["second"]) > 0


def test_faults_other_than_a_kill_reach_all(native):
    check_faults(native("plain", "faults"))


@pytest.mark.full
def test_faults_under_the_address_sanitizer(native):
    check_faults(native("address", "faults"))


# ---- what is left


def check_jobs(line: dict, count: int):
    runs, met, working, processes, sockets, files, descriptors = number(
        line, "runs", "met", "working", "processes", "sockets", "files", "descriptors"
    )
    assert runs == count and met > count / 4 and working > count / 10, line  # killed early and late
    assert [processes, sockets, files, descriptors] == [0, 0, 0, 0], line
    # Other programs use shared memory too: a tenth of what the jobs had reserved would show a leak.
    assert float(line["shmem_mib"]) < float(line["reserved_mib"]) / 10 + 8, line


def test_killed_jobs_leave_nothing(native):
    (line,) = native("plain", "jobs", seed(), 30)
    check_jobs(line, 30)


@pytest.mark.full
def test_a_thousand_killed_jobs_leave_nothing(native):
    (line,) = native("plain", "jobs", seed(), 1000)
    check_jobs(line, 1000)


# ---- the failpoints themselves


@pytest.mark.parametrize(("rank", "flipped"), [("0", ["0", "512", "512"]), ("1", ["0", "0", "0"])])
def test_a_failpoint_strikes_one_rank_once_at_the_hit_asked_for(native, monkeypatch, rank, flipped):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("TPMP_FAILPOINT", "0:here:2:flip=9")
    (line,) = native("plain", "pass_by")
    assert [line["first"], line["second"], line["third"]] == flipped


@pytest.mark.skipif(C is None, reason="needs the compiled extension")
def test_a_release_build_has_no_failpoint():
    binary = Path(C.__file__).read_bytes()
    assert b"tpmp-keeper" in binary  # strings of the core are found where there are any
    assert not [point for point in POINTS if point.encode() in binary] and b"TPMP_FAILPOINT" not in binary


def test_every_failpoint_of_the_core_is_known_here():
    named = set()
    for source in (ROOT / "csrc/shm").glob("*.cpp"):
        named |= {part.split('"')[1] for part in source.read_text().split("TPMP_FAILPOINT(")[1:]}
    assert named == set(POINTS)
    killed = (ROOT / "tests/csrc/deaths.cpp").read_text()  # each of them on every rank
    assert not [point for point in POINTS if f'"{point}"' not in killed]
