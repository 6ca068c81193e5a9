"""`tpmp schedule`: schedules proved, timed and drawn; in the terminal, as a picture, as a trace or as JSON.

    tpmp schedule 1f1b --pp 4 --microbatches 8
    tpmp schedule order.csv --compare zb-v,dualpipe-v --costs F=100,B=120,W=80 --draw out.svg
    tpmp schedule 1f1b --model examples/demo.toml

options.py reads the command line, and command_model.py has what belongs to --model; files are written only once
everything is proved.
"""

import io
import json
import os
import re
import shutil
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace

from tpmp_kernels.errors import ScheduleError, UsageError
from tpmp_kernels.pipeline import command_model, files, summary
from tpmp_kernels.pipeline.command_model import Model, Reader
from tpmp_kernels.pipeline.costs import Costs
from tpmp_kernels.pipeline.draw import chrome_trace, schedule_sheet, text_picture, to_png, to_svg
from tpmp_kernels.pipeline.lowering import lower
from tpmp_kernels.pipeline.options import nearest, parse
from tpmp_kernels.pipeline.partition import LayerCost
from tpmp_kernels.pipeline.schedule import Kind, Schedule
from tpmp_kernels.pipeline.schedules import SCHEDULES, build, peak_live
from tpmp_kernels.pipeline.simulate import simulate
from tpmp_kernels.pipeline.summary import Shown
from tpmp_kernels.pipeline.validate import validate

_MOST_FORWARDS = 500_000  # of one schedule: half a minute and 0.7 GB


def run(argv: list[str], read_model: Reader) -> None:
    """Print what is asked for. Raises UsageError, in one sentence, for all that whoever asks has to change.

    read_model: called for --model alone.
    """
    if "--list" in argv:
        print(_list())
        return
    options = parse(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # names of files may have characters that a terminal has not
    try:
        model = command_model.read(options, read_model)
        schedules = _schedules(options, model)
        if model is None:
            costs = Costs(**(options.costs or {}))
            shown = [_prove(name, schedule, costs) for name, schedule in schedules.items()]
        else:
            layers = model.layers(schedules[options.name].microbatches)
            shown = [_planned(name, schedule, options, model, layers) for name, schedule in schedules.items()]
        _write(options, shown)
        print(summary.as_json(shown) if options.json else _as_text(options, shown), flush=True)
    except ScheduleError as error:
        raise UsageError(str(error)) from None
    except BrokenPipeError:  # `tpmp schedule ... | head` has seen enough, and nothing is left to be flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        path = error.filename2 or error.filename or "standard output"
        raise UsageError(f"{str(path)!r} cannot be written ({error.strerror}); give another path") from None


def _schedules(options: Namespace, model: Model | None) -> dict[str, Schedule]:
    """NAME and those of --compare, by what they are called on the command line."""
    names = [options.name, *(options.compare or [])]
    loaded = {name: files.load(name) for name in names if _is_file(name)}
    for name in names:
        if name not in loaded and name not in SCHEDULES:
            raise UsageError(
                f"unknown schedule {name!r}; the nearest known one is {nearest(name, SCHEDULES)!r} of "
                f"{', '.join(SCHEDULES)}; a file ends in .json or .csv"
            )
    ranks, microbatches = _sizes(options, loaded, model)
    costs = None if model else Costs(**(options.costs or {}))
    # Where one has the choice of chunks, those without it keep their own; else the first refuses what it has not.
    choosing = any(name not in loaded and SCHEDULES[name].chunks is None for name in names)
    schedules = {}
    for name in names:
        chunks = None if choosing and (name in loaded or SCHEDULES[name].chunks) else options.chunks
        if name in loaded:
            schedules[name] = _with_chunks(name, loaded[name], chunks)
        else:
            schedules[name] = _built(name, ranks, microbatches, chunks, costs)
    return schedules


def _is_file(name: str) -> bool:
    return name not in SCHEDULES and ("." in name or os.sep in name)


def _sizes(options: Namespace, loaded: dict[str, Schedule], model: Model | None) -> tuple[int, int]:
    """Ranks and microbatches: as given, and as the files have them, which must agree; else as the model has them."""
    sizes = {"--pp": options.pp, "--microbatches": options.microbatches}
    for name, schedule in loaded.items():
        for option, size in (("--pp", schedule.ranks), ("--microbatches", schedule.microbatches)):
            if sizes[option] not in (None, size):
                raise UsageError(f"{option}: expected {size}, which {name!r} has, got {sizes[option]}; leave it out")
            sizes[option] = size
    if model is not None:
        of_model = {"--pp": model.ranks, "--microbatches": model.microbatches}
        sizes = {option: of_model[option] if size is None else size for option, size in sizes.items()}
    for option, size in sizes.items():
        if size is None:
            raise UsageError(f"expected {option}, got nothing; such as tpmp schedule 1f1b --pp 4 --microbatches 8")
    return sizes["--pp"], sizes["--microbatches"]


def _with_chunks(name: str, schedule: Schedule, chunks: int | None) -> Schedule:
    if chunks is not None and schedule.stages != chunks * schedule.ranks:
        raise UsageError(
            f"--chunks: {name!r} has {schedule.stages} stages on {schedule.ranks} ranks, got {chunks} on each; leave "
            f"--chunks out"
        )
    return schedule


def _built(name: str, ranks: int, microbatches: int, chunks: int | None, costs: Costs | None) -> Schedule:
    forwards = ranks * microbatches * (SCHEDULES[name].chunks or chunks or 2)
    if forwards > _MOST_FORWARDS:
        raise UsageError(
            f"{name}: expected at most {_MOST_FORWARDS:,} forwards (ranks x chunks x microbatches), got {forwards:,}; "
            f"take fewer"
        )
    try:
        return build(name, ranks=ranks, microbatches=microbatches, chunks=chunks, costs=costs)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _planned(name: str, schedule: Schedule, options: Namespace, model: Model, layers: Sequence[LayerCost]) -> Shown:
    """With the layers of a model in its stages. What depends on costs is built again with those of its partition."""
    split = command_model.split(schedule, layers, _in_flight(name, schedule), options)
    costs = command_model.costs(split, options)
    if name in SCHEDULES and SCHEDULES[name].fed:
        schedule = _built(name, schedule.ranks, schedule.microbatches, None, costs)
    shown = _prove(name, schedule, costs)
    return replace(shown, table=command_model.table(split, model), partition=command_model.fields(split, model))


def _in_flight(name: str, schedule: Schedule) -> Sequence[int]:
    """The closed form where there is one: the order of a schedule that is searched for depends on the partition."""
    if name not in SCHEDULES:
        return _prove(name, schedule, Costs()).report.peak_live
    ranks, chunks = schedule.ranks, schedule.stages // schedule.ranks
    sizes = {"ranks": ranks, "microbatches": schedule.microbatches, "chunks": chunks}
    return [peak_live(name, rank, **sizes) for rank in range(ranks)]


def _prove(name: str, schedule: Schedule, costs: Costs) -> Shown:
    """A file is validated before it is lowered: only then is it known to be sound enough for that."""
    known = name in SCHEDULES
    plan = lower(schedule) if known else schedule
    try:
        report = validate(plan)
    except ScheduleError as error:
        raise UsageError(str(error) if known else f"{name!r} is no schedule that can run: {error}") from None
    joint = any(action.kind is Kind.PAIR for actions in schedule.actions for action in actions)
    return Shown(name, schedule, simulate(schedule if joint else plan, costs), report, bounded=known)


def _write(options: Namespace, shown: list[Shown]) -> None:
    if options.draw:
        sheet = schedule_sheet([each.simulation for each in shown])
        with files.replacing(options.draw) as path:
            if path.suffix.lower() == ".png":
                to_png(sheet, path)
            else:
                path.write_text(to_svg(sheet), encoding="utf-8")
    if options.trace:
        with files.replacing(options.trace) as path:
            path.write_text(json.dumps(chrome_trace(shown[0].simulation)))
    if options.save:
        files.save(shown[0].schedule, options.save)


def _as_text(options: Namespace, shown: list[Shown]) -> str:
    width = options.width or max(40, shutil.get_terminal_size((120, 24)).columns)
    colour = sys.stdout.isatty() and not options.no_color and not os.environ.get("NO_COLOR")
    parts = []
    for each in shown:
        parts += [summary.heading(each), *([each.table] if each.table else [])]
        parts += [text_picture(each.simulation, width=width, colour=colour)]
        parts += [summary.proof(each)] if len(shown) > 1 else [f"{summary.figures(each)}\n{summary.proof(each)}"]
    if len(shown) > 1:
        parts.append(summary.table(shown))
    written = [f"{path} written" for path in (options.draw, options.trace, options.save) if path]
    return "\n\n".join([*parts, *(["\n".join(written)] if written else [])])


def _list() -> str:
    """The first sentence of each schedule's file."""
    lines = []
    for name, entry in SCHEDULES.items():
        paragraph = " ".join(sys.modules[entry.build.__module__].__doc__.partition("\n\n")[0].split())
        lines.append(f"{name:<18} {re.split(r'(?<=[.]) ', paragraph)[0]}")
    return "\n".join(lines)
