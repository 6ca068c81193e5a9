"""Rewrite the README's tables from committed rows: `python -m benchmarks.report`, or `--check` to only compare.

A table stands between `<!-- rows:NAME -->` and `<!-- /rows -->`, where NAME is a suite, or suite@device for one device
alone. Every row of the suite is in it: one of ours that a rival beats is marked and stays. Exit code 0 where README and
rows agree or were made to, 1 with one sentence where --check finds a difference, 2 where the input is malformed.
"""

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from tpmp_kernels.bench import Row, cells, columns, read_rows

ROOT = Path(__file__).resolve().parents[1]
_BLOCK = re.compile(r"(<!-- rows:(?P<name>[^\s>]+) -->\n)(?P<body>.*?)(<!-- /rows -->)", re.DOTALL)
_MARKER = re.compile(r"<!-- rows:|<!-- /rows -->")
TIE = 0.995  # rounds to 1.00x


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where the README differs")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args(argv)
    try:
        text = args.readme.read_text()
        fresh, stale = render(text, load(args.results))
    except (ValueError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    if args.check and stale:
        print(
            f"report: {args.readme.name} and the rows disagree on {', '.join(stale)}; run `make report`",
            file=sys.stderr,
        )
        return 1
    if fresh != text:
        args.readme.write_text(fresh)
    return 0


def load(results: Path) -> list[Row]:
    return [row for path in sorted(results.glob("*/*.json")) for row in read_rows(path)]


def render(text: str, rows: list[Row]) -> tuple[str, list[str]]:
    """The text with every table made anew, and the names of the tables that changed."""
    stale: list[str] = []

    def replace(match: re.Match) -> str:
        body = section(match["name"], rows)
        if body != match["body"]:
            stale.append(match["name"])
        return match[1] + body + match[4]

    blocks = list(_BLOCK.finditer(text))
    if len(_MARKER.findall(text)) != 2 * len(blocks):
        raise ValueError(
            "markers do not pair up; write each table as a line `<!-- rows:NAME -->` and a line `<!-- /rows -->`"
        )
    return _BLOCK.sub(replace, text), stale


def section(name: str, rows: Iterable[Row]) -> str:
    """What stands between the markers of `name`: one table for each device, or the plain statement that none is."""
    suite, _, device = name.partition("@")
    found = [row for row in rows if row.suite == suite and device in ("", row.device)]
    if not found:
        command = "make bench" if device in ("", "cpu") or device.startswith("cpu-") else "make gpu-check"
        return f"No rows of `{name}` are committed yet: `{command}`, then `make report`, fill this table.\n"
    devices = sorted({row.device for row in found})
    return "\n".join(device_table([row for row in found if row.device == each]) for each in devices)


def device_table(rows: list[Row]) -> str:
    """Where, when and with which command the rows were measured, then the rows as a Markdown table."""
    ordered = sorted(rows, key=lambda row: (row.case, row.dtype, row.work or 0, row.shape, row.median or 1e9))
    shown = columns(ordered)
    header = (*shown, "verdict")
    lines = [header, ("---",) * len(header)]
    lines += [(*cells(row, shown), verdict(row, rows)) for row in ordered]
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{measured(ordered)}\n\n{body}\n"


def measured(rows: list[Row]) -> str:
    device = rows[0].device
    runs = sorted(
        {
            f"commit {row.commit}, torch {row.versions['torch']}, {row.threads} thread{'s' * (row.threads > 1)}, "
            f"{row.date[:10]}"
            for row in rows
        }
    )
    command = "make bench" if device.startswith("cpu-") else "make gpu-check"
    return f"Measured on `{device}` by `{command}` ({'; '.join(runs)}); ratio is speed relative to the baseline."


def verdict(row: Row, rows: Iterable[Row]) -> str:
    """For a row of ours: against the fastest rival of the same run. The ceiling is a bound and no rival."""
    if not row.ours or row.median is None:
        return "baseline" if row.contender == row.baseline else ""
    rivals = [
        other
        for other in rows
        if other.cell == row.cell and other.date == row.date and other.median is not None
        if not other.ours and other.contender != row.ceiling_name
    ]
    if not rivals:
        return ""
    best = min(rivals, key=lambda other: other.median)
    speed = best.median / row.median
    return f"**LOSS** to {best.contender} ({speed:.2f}x)" if speed < TIE else f"{speed:.2f}x of {best.contender}"


if __name__ == "__main__":
    sys.exit(main())
