"""A Config with values from the command line on top: `--parallel.tp 1`, with the names that the file uses."""

import typing
from typing import Any

from tpmp_kernels.errors import UsageError
from tpmp_kernels.training.config import TYPES, Config, typed, unknown


def override(config: Config, argv: list[str], *, prog: str = "tpmp train CONFIG.toml") -> Config:
    """`config` with command-line values such as ["--parallel.tp", "1"] on top. `--help` prints all and exits."""
    import tyro  # 130 ms, paid by the command alone

    argv = _checked_flags(argv)
    return tyro.cli(
        Config,
        args=argv,
        default=config,
        prog=prog,
        use_underscores=True,  # the names are those of the file
        config=(tyro.conf.FlagConversionOff,),
    )


def _checked_flags(argv: list[str]) -> list[str]:
    """`argv` in the form that tyro takes, or our sentence: tyro's own errors fill a screen."""
    argv = [part for flag in argv for part in (flag.split("=", 1) if flag.startswith("--") else [flag])]
    checked, position = [], 0
    while position < len(argv):
        flag, position = argv[position], position + 1
        if flag in ("-h", "--help"):
            return ["--help"]
        name = flag[2:].replace("-", "_")
        if not flag.startswith("--"):
            raise UsageError(f"expected --section.key value, got {flag!r}; overrides follow the config file")
        if name not in TYPES:
            raise unknown("unknown option", flag, [f"--{each}" for each in TYPES])
        count = len(typing.get_args(TYPES[name])) if typing.get_origin(TYPES[name]) is tuple else 1
        values, position = argv[position : position + count], position + count
        if len(values) < count:
            raise UsageError(f"{flag}: expected {count} value{'s' if count > 1 else ''}, got {len(values)}")
        checked += [f"--{name}", *(_parsed(flag, TYPES[name], values))]
    return checked


def _parsed(flag: str, kind: Any, values: list[str]) -> list[str]:
    """The values of one flag, checked by the same rules as a file's."""
    kinds = typing.get_args(kind) if typing.get_origin(kind) is tuple else [kind]
    return [str(typed(flag, each, _scalar(each, value))) for each, value in zip(kinds, values, strict=True)]


def _scalar(kind: Any, value: str) -> Any:
    if kind is bool:
        return {"true": True, "false": False}.get(value.lower(), value)
    try:
        return kind(value) if kind in (int, float) else value
    except ValueError:
        return value
