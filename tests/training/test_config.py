"""The config: what is read is what is written, and everything wrong is said in one sentence before a process starts."""

from dataclasses import replace
from pathlib import Path

import pytest

from tpmp_kernels.errors import UsageError
from tpmp_kernels.training import config_check
from tpmp_kernels.training.config import TYPES, Config, from_tables, load, to_toml
from tpmp_kernels.training.config_check import check, check_resumed
from tpmp_kernels.training.overrides import override

DEMO = Path(__file__).parents[2] / "examples" / "demo.toml"


def changed(**values) -> Config:
    """The demo's config with `section__key=value` changes."""
    config = load(DEMO)
    for name, value in values.items():
        section, key = name.split("__")
        config = replace(config, **{section: replace(getattr(config, section), **{key: value})})
    return config


def test_demo_is_valid_and_four_ranks():
    check(load(DEMO))
    check(Config())
    assert load(DEMO).ranks == 4


def test_round_trip(tmp_path):
    strange = 'a "quoted" \\ path\nwith ü\t\x7f'
    config = changed(
        output__run_dir=strange, optimizer__betas=(0.5, 0.123456789012345), proof__enabled=False, optimizer__lr=1e-300
    )
    assert all(a != b for a, b in ((config, load(DEMO)), (config, Config())))
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert load(path) == config
    assert to_toml(load(path)) == to_toml(config)


def test_missing_keys_keep_their_defaults():
    assert from_tables({}) == Config()
    assert from_tables({"parallel": {"tp": 4}}).parallel == replace(Config().parallel, tp=4)


@pytest.mark.parametrize(
    ("toml", "sentence"),
    [
        ("[parallel]\ntpp = 2", "unknown key 'parallel.tpp'; the nearest known one is 'parallel.tp'"),
        ("[training]\nheads = 2", "unknown key 'training.heads'; the nearest known one is 'training.threads'"),
        ("[paralel]\ntp = 2", "unknown section 'paralel'; the nearest known one is 'parallel'"),
        ("parallel = 2", "parallel is a section, expected a table, got 2; write [parallel]"),
        ("[parallel]\ntp = '2'", "parallel.tp: expected a whole number, got '2'"),
        ("[parallel]\ntp = 2.0", "parallel.tp: expected a whole number, got 2.0"),
        ("[parallel]\ntp = true", "parallel.tp: expected a whole number, got True"),
        ("[proof]\nenabled = 1", "proof.enabled: expected true or false, got 1"),
        ("[optimizer]\nlr = 'fast'", "optimizer.lr: expected a number, got 'fast'"),
        ("[optimizer]\nbetas = [0.9]", "optimizer.betas: expected 2 numbers, got [0.9]; write [0.9, 0.95]"),
        ("[training]\ndtype = 'fp8'", "training.dtype: expected one of float32, float64, bfloat16, got 'fp8'"),
        ("[data]\nsource = 3", "data.source: expected a text, got 3"),
        ("[parallel\ntp = 2", "expected TOML, got "),
    ],
)
def test_bad_file(tmp_path, toml, sentence):
    path = tmp_path / "bad.toml"
    path.write_text(toml)
    with pytest.raises(UsageError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: {sentence}")


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "no.toml", tmp_path):
        with pytest.raises(UsageError, match=r"expected a TOML file, but '.*' is none; examples/demo.toml is one"):
            load(path)


def test_whole_numbers_are_numbers():
    lr = from_tables({"optimizer": {"lr": 1}}).optimizer.lr
    assert lr == 1.0 and type(lr) is float


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"model__heads": 6, "model__hidden": 132, "model__kv_heads": 3},
            "model.kv_heads=3 and parallel.tp=2: neither divides the other; use tp in {1} or change kv_heads",
        ),
        ({"parallel__tp": 3}, "model.heads=4 is not divisible by parallel.tp=3; use tp in {1, 2, 4} or change heads"),
        ({"model__ffn": 351}, "model.ffn=351 is not divisible by parallel.tp=2; use tp in {1} or change ffn"),
        (
            {"model__vocab_size": 257, "model__vocab_multiple": 3, "parallel__tp": 4},
            "model.vocab_size=257, padded to 258, is not divisible by parallel.tp=4; use tp in {1, 2} or change "
            "vocab_multiple",
        ),
        (
            {"parallel__sequence_parallel": True, "data__sequence": 127, "training__batch": 8},
            "parallel.sequence_parallel: the 127 tokens of a microbatch are not divisible by parallel.tp=2; "
            "use tp in {1, 127} or change data.sequence",
        ),
        (
            {"model__hidden": 130},
            "model.hidden=130 is not divisible by model.heads=4; use heads in {1, 2, 5, 10, 13, 26, 65, 130}",
        ),
        (
            {"model__hidden": 20},
            "model.hidden=20 gives 4 heads of 5 features, expected an even number because rotary positions turn "
            "pairs; use hidden=24",
        ),
        ({"model__kv_heads": 3}, "model.heads=4 is not divisible by model.kv_heads=3; use kv_heads in {1, 2, 4}"),
        (
            {"parallel__pp": 7},
            "model.layers=4: expected at least 5 for 1 stage of 1f1b on each of parallel.pp=7 ranks, embedding and "
            "head counted; use fewer ranks or more layers",
        ),
        (
            {"parallel__pp": 4, "parallel__schedule": "zb-v"},
            "model.layers=4: expected at least 6 for 2 stages of zb-v on each of parallel.pp=4 ranks, embedding and "
            "head counted; use fewer ranks or more layers",
        ),
        (
            {"parallel__pp": 2, "parallel__begin": "layer.3"},
            "parallel.begin='layer.3': partition: unknown layer 'layer.3'; the nearest known one is 'layers.3'",
        ),
        (
            {"parallel__microbatches": 5},
            "training.batch=16 is not divisible by parallel.microbatches=5; use microbatches in {1, 2, 4, 8, 16}",
        ),
        (
            {"parallel__schedule": "1f2b"},
            "parallel.schedule: expected one of gpipe, 1f1b, 1f1b-eager, interleaved-1f1b, zb-h1, "
            "zb-h2, zb-v, v-half, v-min, dualpipe-v, got '1f2b'; the nearest known one is '1f1b'",
        ),
        ({"training__steps": 0}, "training.steps: expected more than 0, got 0"),
        ({"optimizer__lr": float("nan")}, "optimizer.lr: expected more than 0, got nan"),
        ({"optimizer__warmup_steps": -1}, "optimizer.warmup_steps: expected 0 or more, got -1"),
        ({"optimizer__betas": (0.9, 1.0)}, "optimizer.betas: expected two numbers from 0 up to 1, got [0.9, 1.0]"),
        ({"model__dropout": 1.0}, "model.dropout: expected from 0 up to 1, got 1.0; 0.1 drops a tenth"),
        ({"model__dropout": -0.1}, "model.dropout: expected from 0 up to 1, got -0.1; 0.1 drops a tenth"),
        ({"model__dropout": float("nan")}, "model.dropout: expected from 0 up to 1, got nan; 0.1 drops a tenth"),
        ({"training__seed": -1}, "training.seed: expected from 0 to 2^63 - 1, got -1"),
        ({"data__validation_fraction": 1.0}, "data.validation_fraction: expected between 0 and 1, got 1.0"),
        (
            {"data__source": "no/such.txt"},
            "data.source: expected 'python-stdlib' or an existing file or folder, got 'no/such.txt', "
            "which does not exist",
        ),
    ],
)
def test_check_refuses(change, sentence):
    with pytest.raises(UsageError) as caught:
        check(changed(**change))
    assert str(caught.value) == sentence


def test_a_resumed_run_keeps_its_model_but_for_dropout():
    check_resumed(changed(model__dropout=0.1, parallel__tp=1), load(DEMO))
    with pytest.raises(UsageError) as caught:
        check_resumed(changed(model__tie_embeddings=True), load(DEMO))
    assert str(caught.value) == (
        "model.tie_embeddings: expected False, as in the run that is resumed, got True; leave it out, or start a new "
        "run"
    )


def test_every_number_is_checked():
    numbers = {name for name, kind in TYPES.items() if kind in (int, float)}
    elsewhere = {"model.dropout", "training.seed", "data.validation_fraction"}
    assert numbers == {*config_check._POSITIVE, *config_check._NOT_NEGATIVE, *elsewhere}


def test_override_wins_over_the_file():
    argv = ["--parallel.tp", "1", "--training.steps=30", "--optimizer.betas", "0.8", "0.9", "--proof.enabled", "false"]
    argv += ["--training.dtype", "float64", "--output.log-every", "3", "--optimizer.warmup_steps", "7"]
    config = override(load(DEMO), [*argv, "--data.source", "x.txt"])
    assert config == changed(
        parallel__tp=1, training__steps=30, optimizer__betas=(0.8, 0.9), proof__enabled=False,
        training__dtype="float64", output__log_every=3, optimizer__warmup_steps=7, data__source="x.txt",
    )  # fmt: skip
    assert override(load(DEMO), []) == load(DEMO)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--paralel.tp", "1"], "unknown option '--paralel.tp'; the nearest known one is '--parallel.tp'"),
        (["--tp=1"], "unknown option '--tp'; the nearest known one is '--parallel.tp'"),
        (["--parallel.tp", "two"], "--parallel.tp: expected a whole number, got 'two'"),
        (["--parallel.tp"], "--parallel.tp: expected 1 value, got 0"),
        (["--optimizer.betas", "0.9"], "--optimizer.betas: expected 2 values, got 1"),
        (["--proof.enabled", "maybe"], "--proof.enabled: expected true or false, got 'maybe'"),
        (["--training.device", "tpu"], "--training.device: expected one of auto, cpu, cuda, got 'tpu'"),
        (["tp=1"], "expected --section.key value, got 'tp=1'; overrides follow the config file"),
    ],
)
def test_bad_override(argv, sentence):
    with pytest.raises(UsageError) as caught:
        override(Config(), argv)
    assert str(caught.value) == sentence


def test_help_shows_every_setting_with_its_text(capsys):
    with pytest.raises(SystemExit) as caught:
        override(Config(), ["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    missing = [name for name in TYPES if f"--{name}" not in shown]
    assert not missing and "Tensor-parallel ranks" in shown
