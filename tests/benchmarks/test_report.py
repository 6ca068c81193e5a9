"""The README's tables are those of the rows: rewritten between markers, compared by --check, losses marked and kept."""

import pytest

from benchmarks import report
from tpmp_kernels.bench import Provenance, Timing, rows_of, write_rows

WHERE = Provenance("cpu-test-2core", 1, "0123456789", "2026-01-02T03:04:05Z", {"torch": "2.13.0"})
README = "# Title\n\n<!-- rows:kernels -->\nold\n<!-- /rows -->\n\nmiddle\n\n<!-- rows:comm -->\n<!-- /rows -->\nend\n"


def rows(ours: float, where: Provenance = WHERE, **changes):
    timings = {
        "eager": Timing((2.0,)),
        "torch.compile": Timing((1.0,)),
        "GEMM": Timing((0.25,)),
        "tpmp linear": Timing((ours,)),
    }
    names = {"suite": "kernels", "case": "gelu", "shape": "4x4", "dtype": "fp32"}
    return rows_of(timings, where, baseline="eager", ceiling="GEMM", **(names | changes))


@pytest.fixture
def project(tmp_path):
    """A README and a results folder, and `run(*options)` on them."""
    readme, results = tmp_path / "README.md", tmp_path / "results"
    readme.write_text(README)
    results.mkdir()

    def run(*options: str) -> int:
        return report.main([*options, "--readme", str(readme), "--results", str(results)])

    return readme, results, run


def test_tables_stand_between_their_markers_and_nothing_else_moves(project):
    readme, results, run = project
    write_rows(results, rows(ours=0.5))
    assert run() == 0
    text = readme.read_text()
    assert text.startswith("# Title\n\n<!-- rows:kernels -->\nMeasured on `cpu-test-2core` by `make bench`")
    assert text.endswith("\n<!-- /rows -->\nend\n") and "\n\nmiddle\n\n" in text and "old" not in text
    assert "commit 0123456789, torch 2.13.0, 1 thread, 2026-01-02" in text
    ours = next(line for line in text.splitlines() if "tpmp linear" in line)
    assert [cell.strip() for cell in ours.split("|")[5:11]] == [
        "500 ms",
        "500 ms - 500 ms",
        "4.00x",
        "50 % of GEMM",
        "-",
        "2.00x of torch.compile",
    ]
    assert run("--check") == 0 and run() == 0 and readme.read_text() == text


def test_marker_without_rows_says_so(project):
    readme, results, run = project
    write_rows(results, rows(ours=0.5))
    run()
    assert "No rows of `comm` are committed yet: `make bench`" in readme.read_text()


@pytest.mark.parametrize("ours, verdict", [(1.25, "**LOSS** to torch.compile (0.80x)"), (1.001, "1.00x of")])
def test_row_that_a_rival_beats_is_marked_and_kept(ours, verdict):
    # faster than the baseline, and still a loss: the fastest rival counts; the ceiling is no rival
    assert verdict in report.section("kernels", rows(ours))


def test_rows_of_another_run_are_no_rivals():
    later = Provenance("cpu-test-2core", 1, "fedcba9876", "2026-02-03T00:00:00Z", {"torch": "2.13.0"})
    mixed = [row for row in rows(ours=1.25) if row.contender != "torch.compile"]
    mixed += [row for row in rows(ours=1.25, where=later) if row.contender == "torch.compile"]
    text = report.section("kernels", mixed)
    assert "LOSS" not in text and "1.60x of eager" in text and "commit fedcba9876" in text


def test_check_fails_in_one_sentence_and_changes_nothing(project, capsys):
    readme, results, run = project
    write_rows(results, rows(ours=0.5))
    run()
    before = readme.read_text()
    write_rows(results, rows(ours=0.4))
    assert run("--check") == 1
    message = capsys.readouterr().err
    assert message == "report: README.md and the rows disagree on kernels; run `make report`\n"
    assert readme.read_text() == before
    readme.write_text(before.replace("4.00x", "9.00x"))
    write_rows(results, rows(ours=0.5))
    assert run("--check") == 1


def test_suite_of_one_device(project):
    other = Provenance("nvidia-h200", 1, "0123456789", "2026-01-02T03:04:05Z", {"torch": "2.11.0"})
    both = rows(ours=0.5) + rows(ours=0.25, where=other)
    one = report.section("kernels@nvidia-h200", both)
    assert one.startswith("Measured on `nvidia-h200` by `make gpu-check`") and "cpu-test" not in one
    assert report.section("kernels", both).count("Measured on") == 2
    assert "make gpu-check" in report.section("loss@nvidia-h200", both)


@pytest.mark.parametrize(
    "text",
    [
        "<!-- rows:a -->\nno end",
        "<!-- /rows -->\n",
        "<!-- rows:a -->\n<!-- rows:b -->\n<!-- /rows -->\n",
    ],
)
def test_markers_that_do_not_pair_up_are_refused(project, capsys, text):
    readme, _, run = project
    readme.write_text(text)
    assert run() == 2 and "markers do not pair up" in capsys.readouterr().err
    assert readme.read_text() == text
