"""Command lines of this room: argparse, but wherever one is wrong it is refused in one sentence. Loads no torch."""

import argparse
import difflib
from collections.abc import Callable, Iterable

from tpmp_kernels.errors import UsageError


class Parser(argparse.ArgumentParser):
    """Options without abbreviations; every error is a UsageError."""

    def __init__(self, prog: str, **names):
        super().__init__(prog=prog, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **names)

    def parse(self, argv: list[str]) -> argparse.Namespace:
        options, rest = self.parse_known_args(argv)
        if rest:
            flag = rest[0].partition("=")[0]
            if flag.startswith("-"):
                known = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
                raise UsageError(f"unknown option {flag!r}; the nearest known one is {nearest(flag, known)!r}")
            raise UsageError(f"expected options only, got {rest[0]!r}; {self.prog} --help lists them")
        return options

    def error(self, message: str):
        """Called with a sentence of argparse, or of ours in its ArgumentTypeError."""
        option, _, text = message.removeprefix("argument ").partition(": ")
        if text == "expected one argument":
            text = f"expected a value, got nothing; {self.prog} --help shows one for each option"
        elif text.startswith("ignored explicit argument"):
            text = f"expected no value, got{text.removeprefix('ignored explicit argument')}; leave it out"
        raise UsageError(f"{option}: {text}")


def nearest(word: str, known: Iterable[str]) -> str:
    return difflib.get_close_matches(word, list(known), n=1, cutoff=0.0)[0]


def each(text: str, read: Callable, such: str) -> list:
    """The values of a list with commas, each once, in order. `read` raises argparse.ArgumentTypeError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise argparse.ArgumentTypeError(f"expected {such}, got {text!r}; remove the empty one")
    return list(dict.fromkeys(map(read, parts)))
