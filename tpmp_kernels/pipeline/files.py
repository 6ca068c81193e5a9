"""Schedules in files: JSON, which keeps everything, and CSV as torch.distributed.pipelining reads and writes it.

    save(schedule, "order.json")        load("order.csv")        by suffix; nothing in a file is ever executed

JSON   name, placement (the rank of each stage), microbatches, backward, and for each rank one text of words: "0F3" is
       the F of stage 0 on microbatch 3, so are B, W and BW, and "0F3+1BW2" is a joint step (PAIR) of these two.
CSV    a row for each rank, a cell for each action, empty where the rank idles. "0F3" is as above, but "0I3" is the
       input gradient alone (B), "0B3" the whole backward (BW), and "(0F3;1B2)OVERLAP_F_B" a joint step.

The cells that torch's lowered form has besides (3SEND_F1, 0UNSHARD and so on) are left out: lowering makes its own. A
CSV is named after its file, a stage is on the rank that computes it, and the microbatches are those that are computed.
"""

import contextlib
import csv
import io
import itertools
import json
import os
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path

from tpmp_kernels.errors import ScheduleError
from tpmp_kernels.pipeline.schedule import Action, Kind, Schedule

_WORD = re.compile("([0-9]{1,9})(F|BW|B|W)([0-9]{1,9})")
_CELL = re.compile("([0-9]{1,9})([FIBW])([0-9]{1,9})")
_JOINT_CELL = re.compile(r"\(([^;()]*);([^;()]*)\)OVERLAP_F_B")
_LOWERED_CELL = re.compile("[0-9]+(?:UNSHARD|RESHARD|REDUCE_GRAD|SEND_F|RECV_F|SEND_B|RECV_B)[0-9]*")
_KIND = {kind.value: kind for kind in (Kind.F, Kind.B, Kind.W, Kind.BW)}
_KIND_OF_CELL = {"F": Kind.F, "I": Kind.B, "B": Kind.BW, "W": Kind.W}
_CELL_OF_KIND = {kind: letter for letter, kind in _KIND_OF_CELL.items()}


def load(path: str | Path) -> Schedule:
    """The schedule in a .json or .csv file. Whether it can run, `validate` says.

    Raises ScheduleError, in one sentence with the file and the place in it, for a file that cannot be read, that is no
    schedule, or that lacks an F (so that a number in a file never asks for more memory than the file itself has).
    """
    path = Path(path)
    read = {".json": from_json, ".csv": lambda text: from_csv(text, path.stem)}.get(path.suffix.lower())
    if read is None:
        raise _unknown_suffix(path)
    try:
        return read(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        text = f"byte {error.start} is no UTF-8 text; expected a schedule as `save` writes it"
    except ScheduleError as error:
        text = str(error)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        text = f"cannot be read ({reason}); expected a file with a schedule, check the path"
    raise ScheduleError(f"{str(path)!r}: {text}")


def save(schedule: Schedule, path: str | Path) -> None:
    """Write a .json or .csv file, whole or not at all. Raises ScheduleError where the suffix or a CSV cannot say it,
    and OSError."""
    path = Path(path)
    write = {".json": to_json, ".csv": to_csv}.get(path.suffix.lower())
    if write is None:
        raise _unknown_suffix(path)
    text = write(schedule)
    with replacing(path) as other:
        other.write_bytes(text.encode())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path`, to be written within the block; it then takes the place of `path`, so that a file is never
    seen half written, and is removed where the block raises."""
    other = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield other
        os.replace(other, path)
    finally:
        other.unlink(missing_ok=True)


def to_json(schedule: Schedule) -> str:
    """One line for each rank. Raises ScheduleError for a PAIR that is not followed by its F and a backward."""
    fields = {
        "name": schedule.name,
        "placement": schedule.placement,
        "microbatches": schedule.microbatches,
        "backward": schedule.backward,
    }
    orders = []
    for rank in range(schedule.ranks):
        words = ["+".join(f"{a.stage}{a.kind}{a.microbatch}" for a in step) for step in _steps(schedule, rank)]
        orders.append(json.dumps(" ".join(words)))
    lines = ",\n".join(orders)
    return f'{json.dumps(fields)[:-1]}, "actions": [\n{lines}\n]}}\n'


def from_json(text: str) -> Schedule:
    """Raises ScheduleError, with the field or the word, for text that `to_json` cannot have written."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ScheduleError(f"no JSON ({error}); expected a schedule as `to_json` writes it") from None
    _check_fields(fields)
    actions = tuple(
        tuple(action for word in order.split() for action in _parse_word(rank, word))
        for rank, order in enumerate(fields["actions"])
    )
    schedule = Schedule(**{**fields, "placement": tuple(fields["placement"]), "actions": actions})
    _check_forwards(schedule)
    return schedule


def to_csv(schedule: Schedule) -> str:
    """In torch's order-only form ("compute_only"), without idle cells. Raises ScheduleError for what it cannot say: a
    rank without actions, and a PAIR that is not followed by its F and a backward."""
    rows = []
    for rank in range(schedule.ranks):
        if not schedule.actions[rank]:
            raise ScheduleError(f"{schedule.name}: rank {rank} computes nothing, which CSV cannot say; use JSON")
        cells = [[f"{a.stage}{_CELL_OF_KIND[a.kind]}{a.microbatch}" for a in step] for step in _steps(schedule, rank)]
        rows.append(",".join(cell[0] if len(cell) == 1 else f"({';'.join(cell)})OVERLAP_F_B" for cell in cells))
    return "".join(f"{row}\r\n" for row in rows)


def from_csv(text: str, name: str) -> Schedule:
    """A schedule called `name`. Raises ScheduleError, with row and cell, for what torch's form does not have."""
    if not _is_name(name):
        raise ScheduleError(f"expected a printable name for the schedule, got {name!r}; rename the file")
    placement: dict[int, int] = {}
    actions = tuple(tuple(_parse_row(rank, row, placement)) for rank, row in enumerate(_rows(text)))
    gap = next(stage for stage in range(len(placement) + 1) if stage not in placement)
    if gap < len(placement):
        raise ScheduleError(
            f"nobody computes stage {gap}, but there is a stage {max(placement)}; expected stages numbered from 0 "
            f"without a gap, each in one row"
        )
    microbatches = 1 + max(action.microbatch for order in actions for action in order)
    backward = any(action.kind in (Kind.B, Kind.W, Kind.BW) for order in actions for action in order)
    schedule = Schedule(name, tuple(placement[stage] for stage in range(gap)), microbatches, actions, backward)
    _check_forwards(schedule)
    return schedule


def _unknown_suffix(path: Path) -> ScheduleError:
    return ScheduleError(f"{str(path)!r}: expected a file that ends in .json or .csv, got {path.suffix!r}; rename it")


def _steps(schedule: Schedule, rank: int) -> Iterator[tuple[Action, ...]]:
    """What is written as one word or cell: an action, or the F and the backward of a joint step."""
    actions = iter(schedule.actions[rank])
    for action in actions:
        if action.kind is not Kind.PAIR:
            yield (action,)
            continue
        step = tuple(itertools.islice(actions, 2))
        if len(step) != 2 or step[0] != (Kind.F, *action[1:]) or step[1].kind not in (Kind.B, Kind.BW):
            got = " and ".join(map(str, step)) or "nothing"
            raise ScheduleError(
                f"{schedule.name}: rank {rank} has {action} followed by {got}; expected that F and then a B or BW"
            )
        yield step


def _joint(forward: Action | None, backward: Action | None) -> tuple[Action, ...] | None:
    """A joint step of the two, or None where they are none."""
    if forward is None or backward is None or forward.kind is not Kind.F or backward.kind in (Kind.F, Kind.W):
        return None
    return Action(Kind.PAIR, *forward[1:]), forward, backward


def _parse_word(rank: int, word: str) -> tuple[Action, ...]:
    first, plus, second = word.partition("+")
    action = _parse(_WORD, _KIND, first)
    actions = (action,)
    if plus:
        actions = _joint(action, _parse(_WORD, _KIND, second))
    if action is None or actions is None:
        raise ScheduleError(
            f"actions of rank {rank}: expected words such as 0F3, 2BW0 (stage, F, B, W or BW, microbatch) or the joint "
            f"step 0F3+1BW2, got {reprlib.repr(word)}; correct that word"
        )
    return actions


def _parse(pattern: re.Pattern, kinds: dict[str, Kind], text: str) -> Action | None:
    match = pattern.fullmatch(text)
    return Action(kinds[match[2]], int(match[1]), int(match[3])) if match else None


def _is_name(name: object) -> bool:
    """Short and printable, for names go to terminals and into pictures."""
    return isinstance(name, str) and 0 < len(name) <= 100 and name.isprintable()


def _are_ranks(value: object) -> bool:
    return isinstance(value, list) and all(type(rank) is int and rank >= 0 for rank in value)


# What each field of the JSON has to be.
_FIELDS = {
    "name": ("a printable name", _is_name),
    "placement": ("a list with the rank of each stage", _are_ranks),
    "microbatches": ("a whole number from 1 on", lambda value: type(value) is int and value > 0),
    "backward": ("true or false", lambda value: isinstance(value, bool)),
    "actions": (
        "a list with one text of actions for each rank",
        lambda value: isinstance(value, list) and all(isinstance(order, str) for order in value),
    ),
}


def _check_fields(fields: object) -> None:
    if not isinstance(fields, dict) or set(fields) != set(_FIELDS):
        got = reprlib.repr(sorted(fields) if isinstance(fields, dict) else fields)
        raise ScheduleError(f"expected an object with the fields {', '.join(_FIELDS)}, got {got}; see `to_json`")
    for field, (expected, fits) in _FIELDS.items():
        if not fits(fields[field]):
            raise ScheduleError(f"{field}: expected {expected}, got {reprlib.repr(fields[field])}; correct it")


def _check_forwards(schedule: Schedule) -> None:
    """Ends after as many tries as there are actions, whatever the schedule claims to have."""
    done = {action[1:] for order in schedule.actions for action in order if action.kind is Kind.F}
    for stage in range(schedule.stages):
        for microbatch in range(schedule.microbatches):
            if (stage, microbatch) not in done:
                raise ScheduleError(
                    f"nobody computes F of stage {stage}, microbatch {microbatch}; expected one for each of "
                    f"{schedule.stages} stages and {schedule.microbatches} microbatches"
                )


def _rows(text: str) -> list[list[str]]:
    rows = []
    try:
        rows.extend(csv.reader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise ScheduleError(f"row {len(rows) + 1}: no CSV ({error}); expected cells such as 0F3") from None
    while rows and not rows[-1]:  # blank lines at the end
        rows.pop()
    if not rows:
        raise ScheduleError("the file is empty; expected a row for each rank with cells such as 0F3")
    return rows


def _parse_row(rank: int, row: list[str], placement: dict[int, int]) -> list[Action]:
    """The actions of one row; notes in `placement` which rank computes a stage."""
    actions = []
    for number, cell in enumerate(row, start=1):
        step = _parse_cell(cell.strip())
        if step is None:
            raise ScheduleError(
                f"row {rank + 1} (rank {rank}), cell {number}: expected an action such as 0F3, 2I0, 2B0, 2W0 (stage, "
                f"kind, microbatch), (0F3;2B0)OVERLAP_F_B or nothing, got {reprlib.repr(cell)}; correct the cell"
            )
        for action in step:
            holder = placement.setdefault(action.stage, rank)
            if holder != rank:
                raise ScheduleError(
                    f"row {rank + 1} (rank {rank}), cell {number}: {cell.strip()!r} is of stage {action.stage}, which "
                    f"rank {holder} computes too; expected every stage in one row"
                )
        actions += step
    if not actions:
        raise ScheduleError(f"row {rank + 1} (rank {rank}): expected actions, got none; remove the row")
    return actions


def _parse_cell(cell: str) -> tuple[Action, ...] | None:
    """Its actions, which may be none, or None where it is no cell of torch's."""
    if match := _CELL.fullmatch(cell):
        return (Action(_KIND_OF_CELL[match[2]], int(match[1]), int(match[3])),)
    if not cell or _LOWERED_CELL.fullmatch(cell):
        return ()
    if match := _JOINT_CELL.fullmatch(cell):
        return _joint(*(_parse(_CELL, _KIND_OF_CELL, part.strip()) for part in match.groups()))
    return None
