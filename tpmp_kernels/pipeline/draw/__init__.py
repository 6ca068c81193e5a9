"""Pictures of a pipeline: one row for each rank, one box for each compute, time to the right.

pictures.py   what is drawn: timeline_svg of a measured step, schedule_sheet of simulated ones to compare
table.py      the table by which schedules are compared, here and in the terminal
layout.py     where everything stands: from panels of rows to a Sheet
sheet.py      the Sheet: rectangles, lines and texts in pixels
svg.py        a Sheet as SVG
png.py        a Sheet as PNG; alone in needing matplotlib
terminal.py   the picture in characters
trace.py      the events as a trace for Perfetto or chrome://tracing
palette.py    colours and words of each kind, shared by all of these
scale.py      round steps and short numbers, likewise
"""

from tpmp_kernels.pipeline.draw.pictures import schedule_sheet, timeline_svg
from tpmp_kernels.pipeline.draw.png import to_png
from tpmp_kernels.pipeline.draw.svg import to_svg
from tpmp_kernels.pipeline.draw.terminal import text_picture
from tpmp_kernels.pipeline.draw.trace import chrome_trace, events_trace

__all__ = ["chrome_trace", "events_trace", "schedule_sheet", "text_picture", "timeline_svg", "to_png", "to_svg"]
