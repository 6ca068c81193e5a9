"""`tpmp train` as a user runs it: four processes, the proof, what it leaves, and a resumed run."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from torch.distributed.checkpoint import FileSystemReader

CONFIG = """
[model]
vocab_size = 256
hidden = 32
layers = 4
heads = 4
kv_heads = 2
ffn = 48

[data]
source = "{text}"
cache = "{cache}"
sequence = 16
validation_fraction = 0.1

[parallel]
tp = 2
pp = 2
schedule = "1f1b"
microbatches = 4

[training]
steps = 8
batch = 8
seed = 7

[optimizer]
lr = 0.003
warmup_steps = 2

[validation]
every = 4
batches = 2

[checkpoint]
every = 4

[proof]
fp64_steps = 6
fp32_steps = 4

[output]
run_dir = "{run}"
"""


@pytest.fixture
def config(tmp_path):
    text = tmp_path / "text"
    text.write_text("the quick brown fox jumps over the lazy dog; " * 400)
    path = tmp_path / "config.toml"
    path.write_text(CONFIG.format(text=text, cache=tmp_path / "cache", run=tmp_path / "run"))
    return path


def train(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tpmp_kernels", "train", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def losses(run) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def test_trains_proves_and_leaves_its_pictures_and_resumes_bitwise(config, tmp_path):
    """With dropout, whose masks a resumed run must find again, and a tied embedding, which two stages hold."""
    both = ["--model.dropout", 0.1, "--model.tie-embeddings", "true"]
    done = train(config, *both)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "proof fp64: largest relative loss difference over 6 steps" in done.stdout
    assert done.stdout.count(": equal") == 2
    assert done.stderr == ""

    run = tmp_path / "run"
    names = {p.name for p in run.iterdir()}
    assert names == {"checkpoints", "config.toml", "loss.png", "metrics.jsonl", "timeline.json", "timeline.svg"}
    svg = (run / "timeline.svg").read_text()
    assert svg.startswith("<svg") and ">measured<" in svg and ">predicted from its median times<" in svg
    named = {entry["args"].get("name") for entry in json.loads((run / "timeline.json").read_text())["traceEvents"]}
    assert {"rank 3", "rank 1, predicted"} <= named and "rank 2, predicted" not in named
    assert re.search(r"last step: bubble [\d.]+% \(predicted [\d.]+%\), [\d.]+ ms to the last gradient", done.stdout)
    whole = losses(run)
    assert sorted(whole) == list(range(8))

    # Continued from its checkpoint of step 4: the same losses as the uninterrupted one, to the last bit.
    _, newest = sorted((run / "checkpoints").iterdir())
    shutil.rmtree(newest)
    resumed = train("--resume", run)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "resumed behind step 4" in resumed.stdout
    assert losses(run) == whole


@pytest.mark.full
def test_a_difference_fails_the_run_with_one_sentence(config):
    alone = ["--parallel.tp", 1, "--parallel.pp", 1]
    done = train(config, *alone, "--training.steps", 2, "--proof.fp64-steps", 2, "--proof.fp64-tolerance", 1e-30)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "proof fp64" in line and "DIFFERENT" in line


@pytest.mark.full
def test_four_ranks_that_share_heads_and_cut_tokens_are_proved_too(config):
    """Two key and value heads on four ranks, with sequence parallelism: partial gradients of both kinds."""
    argv = ["--parallel.tp", 4, "--parallel.pp", 1, "--parallel.sequence-parallel", "true", "--training.steps", 3]
    done = train(config, *argv, "--proof.fp64-steps", 3, "--proof.fp32-steps", 3)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": equal") == 2
    (saved,) = (config.parent / "run" / "checkpoints").iterdir()
    sizes = {name: entry.size for name, entry in FileSystemReader(saved).read_metadata().state_dict_metadata.items()}
    for kind in ("model", "optimizer.exp_avg"):  # each shared row once: a checkpoint for any tp
        assert sizes[f"{kind}.layers.0.self_attn.k_proj.weight"] == (2 * 8, 32)
