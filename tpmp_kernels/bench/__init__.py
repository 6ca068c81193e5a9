"""Timing and result rows, behind `tpmp bench` and benchmarks/.

    timings = interleave({"eager": eager, "tpmp": ours}, rounds=20, iterations=10)
    rows = rows_of(timings, provenance(threads=1), suite="kernels", case="linear+gelu", shape="512x3072x768",
                   dtype="bf16", baseline="eager")
    write_rows(Path("benchmarks/results"), rows)

A claim here is a ratio to a baseline measured in the same run. A row keeps where it was measured, and losing rows are
kept. comm.py measures transports and command.py is `tpmp bench`; compare/ is `tpmp compare`.
"""

from tpmp_kernels.bench.bars import Bar, verdict
from tpmp_kernels.bench.provenance import Provenance, commit, device_slug, provenance, versions
from tpmp_kernels.bench.rows import OURS, Row, read_rows, rows_of, rows_path, write_rows
from tpmp_kernels.bench.table import (
    COLUMNS,
    aligned,
    cells,
    columns,
    show_mebibytes,
    show_percent,
    show_rate,
    show_seconds,
    table,
)
from tpmp_kernels.bench.timing import Timing, interleave, rotating, slowest, turns
from tpmp_kernels.bench.work import bus_bytes, gemm_flop

__all__ = [
    "COLUMNS",
    "OURS",
    "Bar",
    "Provenance",
    "Row",
    "Timing",
    "aligned",
    "bus_bytes",
    "cells",
    "columns",
    "commit",
    "device_slug",
    "gemm_flop",
    "interleave",
    "provenance",
    "read_rows",
    "rotating",
    "rows_of",
    "rows_path",
    "show_mebibytes",
    "show_percent",
    "show_rate",
    "show_seconds",
    "slowest",
    "table",
    "turns",
    "verdict",
    "versions",
    "write_rows",
]
