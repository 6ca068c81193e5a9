"""The `tpmp` command: one sentence and exit code 2 for bad input, help and version without loading torch."""

import subprocess
import sys
from pathlib import Path

import pytest

import tpmp_kernels
from tpmp_kernels import __main__ as command
from tpmp_kernels.training import rank

DEMO = str(Path(__file__).parents[1] / "examples" / "demo.toml")


@pytest.fixture
def no_launch(monkeypatch):
    """Records what would be launched."""
    from tpmp_kernels.training import launch

    launched = []
    monkeypatch.setattr(launch, "launch", lambda function, args, **options: launched.append((function, args, options)))
    return launched


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["trian"], "tpmp: expected a command (train, schedule, bench, compare, verify), got 'trian'; tpmp --help"),
        (["train"], "tpmp train: expected a config file first, got nothing; examples/demo.toml is one"),
        (["train", "--x", "1"], "tpmp train: expected a config file first, got '--x'; examples/demo.toml is one"),
        (
            ["train", "no.toml"],
            "tpmp train: config: expected a TOML file, but 'no.toml' is none; examples/demo.toml is one",
        ),
        (
            ["train", DEMO, "--parallel.tp", "3"],
            "tpmp train: model.heads=4 is not divisible by parallel.tp=3; use tp in {1, 2, 4} or change heads",
        ),
        (
            ["train", DEMO, "--trainig.steps", "3"],
            "tpmp train: unknown option '--trainig.steps'; the nearest known one is '--training.steps'",
        ),
        (
            ["train", DEMO, "--resume"],
            "tpmp train: --resume: expected the folder of a run, got nothing; write --resume",
        ),
        (
            ["train", "--resume", "runs/none"],
            "tpmp train: --resume: expected the folder of a run, but 'runs/none/config.toml' does not exist",
        ),
        (
            ["train", DEMO, "--resume", "runs/none"],
            "tpmp train: --resume: expected no config file beside runs/none, which has its own, got ",
        ),
    ],
)
def test_bad_input_is_one_sentence(argv, sentence, capsys, no_launch):
    assert command.main(argv) == 2
    out, err = capsys.readouterr()
    assert err.startswith(sentence) and err.count("\n") == 1 and out == ""
    assert not no_launch


def test_train_launches_with_the_overrides(no_launch):
    assert command.main(["train", DEMO, "--parallel.tp", "1", "--training.steps", "30"]) == 0
    ((function, (config, resume), options),) = no_launch
    assert function is rank.train and resume is None
    assert (config.parallel.tp, config.training.steps, config.model.hidden) == (1, 30, 128)
    assert options == {"ranks": 2, "preload": ["tpmp_kernels.training.loop"]}


def test_resume_takes_the_config_of_the_run(no_launch, tmp_path):
    (tmp_path / "config.toml").write_text("[training]\nsteps = 7\nseed = 3\n")
    assert command.main(["train", "--resume", str(tmp_path), "--training.steps", "9"]) == 0
    ((_, (config, resume), _),) = no_launch
    assert (config.training.steps, config.training.seed, resume) == (9, 3, tmp_path)


def test_under_torchrun_other_ranks_leave_the_sentence_to_rank_0(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(command.time, "sleep", lambda seconds: waited.append((seconds, capsys.readouterr().err)))
    for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("RANK", "0")
    assert command.main(["train", "no.toml"]) == 2 and waited == []
    assert "no.toml" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert command.main(["train", "no.toml"]) == 2
    assert waited == [(1, "")], "torchrun ends it meanwhile"


@pytest.mark.parametrize(("argv", "shown"), [([], "tpmp train"), (["--help"], "usage: tpmp"), (["--version"], "")])
def test_help_and_version_load_neither_torch_nor_tyro(argv, shown):
    code = (
        "import sys; from tpmp_kernels.__main__ import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'tyro', 'numpy'} & set(sys.modules); assert not heavy, heavy; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (shown or tpmp_kernels.__version__) in done.stdout


def test_train_help_lists_the_settings(capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(["train", "--help"])
    assert caught.value.code == 0
    assert "--parallel.tp" in capsys.readouterr().out
