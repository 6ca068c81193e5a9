"""The `tpmp` command, also `python -m tpmp_kernels`. Each subcommand is one entry of COMMANDS.

Exit codes: 0 done; 1 a rank or a proof failed, or a result was wrong; 2 bad input, said in one sentence; 130 Ctrl-C,
143 SIGTERM.
"""

import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tpmp_kernels import __version__
from tpmp_kernels.errors import ProofFailed, UsageError, WrongResult


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name == "--version":
        print(f"tpmp {__version__}")
        return 0
    if name not in COMMANDS:
        return guarded("tpmp", _refuse, name)
    return guarded(f"tpmp {name}", COMMANDS[name].run, argv[1:])


def guarded(prog: str, function: Callable, *args) -> int:
    """Call the function; returns the exit code after saying in one sentence, on stderr, why it could not finish."""
    from tpmp_kernels.training.launch import Interrupted, RankFailed, given_rank

    try:
        function(*args)
        return 0
    except UsageError as error:
        if given_rank():
            time.sleep(1)  # rank 0 says it, and torchrun ends the others; unless it is about this rank alone
        return _say(prog, str(error), 2)
    except RankFailed as error:
        sys.stderr.write(error.traceback)
        return _say(prog, f"{error}{'; its traceback is above' if error.traceback else ''}", 1)
    except ProofFailed as error:
        return _say(prog, f"the proof failed: {error}", 1)
    except WrongResult as error:
        return _say(prog, str(error), 1)
    except Interrupted as error:
        return _say(prog, str(error), 128 + error.signum)
    except KeyboardInterrupt:
        return _say(prog, "interrupted before any rank was started", 128 + signal.SIGINT)


def _say(prog: str, sentence: str, code: int) -> int:
    sys.stdout.flush()
    print(f"{prog}: {sentence}", file=sys.stderr, flush=True)
    return code


def _help() -> str:
    lines = [f"  tpmp {f'{name} {each.arguments}':<60} {each.summary}" for name, each in COMMANDS.items()]
    return "\n".join(["usage: tpmp COMMAND ...", "", *lines, "", "tpmp --version; tpmp COMMAND --help says more"])


def _refuse(name: str) -> None:
    raise UsageError(f"expected a command ({', '.join(COMMANDS)}), got {name!r}; tpmp --help lists them")


def _train(argv: list[str]) -> None:
    from tpmp_kernels.training import rank
    from tpmp_kernels.training.config import Config, load
    from tpmp_kernels.training.config_check import check, check_resumed
    from tpmp_kernels.training.launch import launch
    from tpmp_kernels.training.overrides import override

    if argv[:1] in (["-h"], ["--help"]):
        override(Config(), ["--help"])
    path, resume, rest = _train_arguments(argv)
    saved = load(path)
    config = override(saved, rest)
    check(config)
    if resume:
        check_resumed(config, saved)
    launch(rank.train, (config, resume), ranks=config.ranks, preload=rank.PRELOAD)


def _train_arguments(argv: list[str]) -> tuple[Path, Path | None, list[str]]:
    """(config file, run to resume, overrides). A resumed run brings its own config."""
    if "--resume" not in argv:
        if not argv or argv[0].startswith("-"):
            got = repr(argv[0]) if argv else "nothing"
            raise UsageError(f"expected a config file first, got {got}; examples/demo.toml is one")
        return Path(argv[0]), None, argv[1:]
    at = argv.index("--resume")
    run, rest = argv[at + 1 : at + 2], argv[:at] + argv[at + 2 :]
    if not run or run[0].startswith("-"):
        raise UsageError("--resume: expected the folder of a run, got nothing; write --resume runs/demo")
    if rest and not rest[0].startswith("-"):
        raise UsageError(f"--resume: expected no config file beside {run[0]}, which has its own, got {rest[0]!r}")
    config = Path(run[0]) / "config.toml"
    if not config.is_file():
        raise UsageError(f"--resume: expected the folder of a run, but {str(config)!r} does not exist")
    return config, Path(run[0]), rest


def _schedule(argv: list[str]) -> None:
    from tpmp_kernels.pipeline import command
    from tpmp_kernels.training.schedule_model import read_model

    command.run(argv, read_model)


def _bench(argv: list[str]) -> None:
    import multiprocessing

    from tpmp_kernels.bench import command
    from tpmp_kernels.training.interrupt import Interrupted, signals_end_ranks
    from tpmp_kernels.training.launch import RankFailed

    reached = "before the first measurement"

    def progress(text: str) -> None:
        nonlocal reached
        if received:  # while no rank was there to be ended
            raise Interrupted(received[0])
        reached = text

    with signals_end_ranks(set(multiprocessing.active_children())) as received:
        try:
            command.run(argv, progress)
        except AssertionError as error:
            if not received:
                raise RankFailed(f"a rank failed {reached}", f"{error}\n") from None
        except (EOFError, OSError, Interrupted):  # what else comes of ranks that a signal ended
            if not received:
                raise
    if received:
        interrupted = Interrupted(received[0])
        interrupted.progress = reached
        raise interrupted


def _compare(argv: list[str]) -> None:
    from tpmp_kernels.bench.compare import command

    command.run(argv)


def _verify(argv: list[str]) -> None:
    from tpmp_kernels.prover import command

    command.run(argv)


@dataclass(frozen=True)
class Command:
    """A subcommand: `run` takes its arguments. Imports of torch and tyro belong inside `run`."""

    arguments: str
    summary: str
    run: Callable[[list[str]], None]


COMMANDS = {
    "train": Command("CONFIG.toml | --resume RUN  [--section.key VALUE ...]", "train a model and prove it", _train),
    "schedule": Command("NAME --pp P --microbatches M  [options]", "prove and draw a pipeline schedule", _schedule),
    "bench": Command("comm  [--ranks R] [--sizes S,S] [--quick]", "measure the transports on this machine", _bench),
    "compare": Command("OP  [--shape AxB] [--dtype D,D] [--backward]", "an op's backends and its peers", _compare),
    "verify": Command("[--tp T] [--pp P] [--config FILE.toml]", "prove a parallel step, or find what differs", _verify),
}

if __name__ == "__main__":
    sys.exit(main())
