"""The protocols of the shared segment, searched through by spin: every interleaving, one crash anywhere, and the
mistakes that each of their rules is there to prevent. The models stand in tests/models/*.pml.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

MODELS = Path(__file__).parents[1] / "models"
MEGABYTES = 2000  # a search that needs more is too large a model, and says so
SECONDS = 600

MISSING = [tool for tool in ("spin", "gcc") if shutil.which(tool) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)} (apt-get install spin gcc)")


def search(model: str, *defines: str, folder: Path) -> tuple[int, str]:
    """States stored, and the error that ended the search early, '' where there is none."""
    for source in MODELS.glob("*.pml"):
        shutil.copy(source, folder)
    options = [f"-D{define}" for define in defines]
    generated = subprocess.run(
        ["spin", "-a", *options, f"{model}.pml"], cwd=folder, capture_output=True, text=True, timeout=60
    )
    # spin exits with 0 and writes a program after a syntax error too.
    assert generated.returncode == 0 and "rror" not in generated.stdout, generated.stdout
    flags = ["-O1", "-w", "-DSAFETY", "-DCOLLAPSE", f"-DMEMLIM={MEGABYTES}", "-o", "pan", "pan.c"]
    subprocess.run(["gcc", *flags], cwd=folder, check=True, timeout=120)
    ran = subprocess.run(["./pan", "-m100000"], cwd=folder, capture_output=True, text=True, timeout=SECONDS)
    found = re.search(r"errors: (\d+)\n\s*([\d.e+]+) states, stored", ran.stdout)
    assert found and "max search depth too small" not in ran.stdout, ran.stdout + ran.stderr
    error = re.search(r"pan:1: (.+) \(at depth", ran.stdout)
    assert bool(error) == (found[1] != "0"), ran.stdout
    assert error or "Search not completed" not in ran.stdout, ran.stdout
    return int(float(found[2])), error[1] if error else ""


# Model, defines, and states that a search of it must have seen: a model that does nothing must not pass.
SMALL = [
    ("rounds", "N=2 COARSE", 50_000),
    ("ring", "N=2 COARSE MESSAGES=2", 10_000),
    ("poison", "N=2 SLICE", 100_000),
]
LARGE = [
    ("rounds", "N=2", 1_000_000),
    ("rounds", "N=2 IN_PLACE", 1_000_000),
    ("rounds", "N=3 COARSE", 5_000_000),
    ("rounds", "N=3 COARSE SPIN COLLECTIVES=5", 1_000_000),
    ("rounds", "N=4 COARSE COLLECTIVES=1", 2_000_000),
    ("rounds", "N=4 COARSE NO_CRASH COLLECTIVES=2", 3_000_000),
    ("ring", "N=2", 3_000_000),
    ("ring", "N=2 SHORT SLICE", 1_000_000),
    ("ring", "N=2 COARSE PUT MESSAGES=2", 1_000_000),
    ("ring", "N=2 COARSE PUT MESSAGES=2 SLOTS=1", 1_000_000),
    ("ring", "N=2 COARSE PUT LANDINGS=2 NO_CRASH", 1_000_000),
    ("ring", "N=3 COARSE MESSAGES=2", 2_000_000),
    ("ring", "N=4 COARSE MESSAGES=1 SLOTS=1", 1_000_000),
    ("poison", "N=3 NO_CRASH", 10_000_000),
    ("poison", "N=4 COARSE SLICE", 5_000_000),
]


@pytest.mark.parametrize(
    ("model", "defines", "least"), SMALL + [pytest.param(*case, marks=pytest.mark.full) for case in LARGE]
)
def test_a_protocol_holds(model, defines, least, tmp_path):
    states, error = search(model, *defines.split(), folder=tmp_path)
    print(f"model={model} {defines} states={states} errors={int(error != '')}")
    assert error == ""
    assert states >= least


ASLEEP = "invalid end state"  # somebody waits for ever
WRONG = "assertion violated"

# What is wrong, how it shows ("": either way), and the smallest group that shows it.
QUICK_MISTAKES = [
    (
        "poison",
        "BUG_CLOSE",
        WRONG,
        "N=2 SLICE",
    ),  # the lease ends before `closed` is set: a leave reads as a death
]
MISTAKES = [
    ("rounds", "BUG_ORDER", WRONG, "N=2"),  # flag before payload
    ("rounds", "BUG_SLOTS", "", "N=2"),  # three slots, not four: overwritten while read, or before it was seen
    ("rounds", "BUG_DEEP", "", "N=2"),  # two rounds of lookahead: the same
    ("rounds", "BUG_NO_ACK", WRONG, "N=2 IN_PLACE"),  # buffers read in place are given back without a last round
    ("rounds", "BUG_RING_FIRST", ASLEEP, "N=2"),  # doorbell before flag
    ("rounds", "BUG_NO_RING", ASLEEP, "N=2"),
    ("rounds", "BUG_WAKE_FIRST", ASLEEP, "N=2"),  # sleepers looked at before the doorbell changes
    ("rounds", "BUG_NO_BUMP", ASLEEP, "N=2"),  # a wake-up that leaves the doorbell as it was
    ("rounds", "BUG_SLEEP", ASLEEP, "N=2"),  # the predicate is not asked again once announced
    ("rounds", "BUG_SEEN_LATE", ASLEEP, "N=2"),  # the doorbell is loaded after that
    ("rounds", "BUG_NO_WATCH", ASLEEP, "N=2"),  # nobody turns a death into poison
    ("rounds", "BUG_NO_ALARM", ASLEEP, "N=2"),  # poison rings nobody
    ("ring", "BUG_EARLY_CREDIT", WRONG, "N=2"),  # credit before the copy
    ("ring", "BUG_ORDER", WRONG, "N=2"),
    ("ring", "BUG_CREDIT", "", "N=2"),  # one piece too many: overwritten, or waited for in vain
    ("ring", "BUG_NO_RING", ASLEEP, "N=2"),
    ("ring", "BUG_NO_CREDIT_RING", ASLEEP, "N=2"),
    ("ring", "BUG_SLEEP", ASLEEP, "N=2"),
    ("ring", "BUG_LANDING", WRONG, "N=2 PUT MESSAGES=2"),  # shown before the last message there was taken
    ("ring", "BUG_SHOWN_FIRST", WRONG, "N=2 PUT MESSAGES=2"),  # the number before the place
    ("ring", "BUG_NO_POST_RING", ASLEEP, "N=2 PUT MESSAGES=2 SLOTS=1"),  # who waits for a receive is not woken
    ("poison", "BUG_TEXT", WRONG, "N=2 SLICE"),  # the word before its text
    ("poison", "BUG_CAS", WRONG, "N=2 SLICE"),  # a plain store: two faults, two verdicts
    ("poison", "BUG_WRITER", WRONG, "N=2 SLICE"),  # caller and keeper of a rank overwrite each other's text
    ("poison", "BUG_DEATH_ORDER", WRONG, "N=2 SLICE"),  # `closed` read before the lease
    ("poison", "BUG_LEFT_ORDER", WRONG, "N=3 NO_CRASH"),  # what the wait depends on read before `closed`
    ("poison", "NO_SLICES", ASLEEP, "N=2"),  # a reporter that dies before it rang, and no 20 ms slice
]


@pytest.mark.parametrize(
    ("model", "mistake", "shows", "defines"),
    QUICK_MISTAKES + [pytest.param(*case, marks=pytest.mark.full) for case in MISTAKES],
)
def test_a_mistake_is_found(model, mistake, shows, defines, tmp_path):
    states, error = search(model, *defines.split(), mistake, folder=tmp_path)
    print(f"model={model} {defines} mistake={mistake} states={states} found={error!r}")
    assert error.startswith(shows) and error != ""


def test_every_mistake_of_the_models_is_tried():
    known = {(path.stem, bug) for path in MODELS.glob("*.pml") for bug in re.findall(r"BUG_\w+", path.read_text())}
    tried = {bug for _, bug, _, _ in QUICK_MISTAKES + MISTAKES}
    assert {bug for _, bug in known} == {bug for bug in tried if bug.startswith("BUG_")}
    for model in ("rounds", "ring", "poison"):
        own = {bug for stem, bug in known if stem == model}
        assert own <= {bug for name, bug, _, _ in QUICK_MISTAKES + MISTAKES if name == model}
