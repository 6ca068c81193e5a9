"""The peer programs compute what they claim: every layout follows the losses of one process, in plain SGD."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.peers import dtensor_gpt, gpt, pipelining_gpt

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--hidden=32", "--heads=2", "--mlp=64", "--vocab=64", "--sequence=16", "--steps=2", "--warmup=1"]
# SGD with a large step: a gradient of the wrong scale, which AdamW would hide, moves the next loss
SGD = ["--optimizer", "sgd", "--lr", "0.5"]


def rows_in(peer: str, output: str) -> list[dict]:
    """The JSON lines that a peer prints, each after one line to read."""
    lines = output.splitlines()
    assert lines and len(lines) % 2 == 0 and all(line.startswith(peer) for line in lines[::2])
    return [json.loads(line) for line in lines[1::2]]


@pytest.fixture
def run(monkeypatch, capfd):
    """`run(peer, *options)` calls a peer's main here: only its ranks are processes of their own."""

    def call(peer, *options: str) -> list[dict]:
        monkeypatch.setattr(sys, "argv", [peer.__file__, *TINY, *options])
        peer.main()
        return rows_in(Path(peer.__file__).stem, capfd.readouterr().out)

    return call


def losses_of_one_process(layers: int, batch: int, steps: int = 3) -> list[float]:
    """The same model on the whole batch, without microbatches, ranks or the peers' own loop."""
    config = gpt.Config(layers, hidden=32, heads=2, mlp=64, vocab=64, sequence=16)
    model = gpt.GPT(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for i in range(steps):
        tokens, targets = gpt.batch(config, batch, i)
        loss = gpt.mean_loss(model(tokens), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.full
def test_every_schedule_follows_one_process():
    command = [sys.executable, "-m", "benchmarks.peers.pipelining_gpt", *TINY, "--schedule=all", "--layers=4", *SGD]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    rows = rows_in("pipelining_gpt", done.stdout)
    assert [row["variant"] for row in rows] == ["none", *pipelining_gpt.SCHEDULES]
    expected = losses_of_one_process(layers=4, batch=8)
    for row in rows:
        assert "note" not in row, f"{row['variant']}: {row['note']}"
        # the same fp32 arithmetic for each microbatch; only the order in which gradients add up differs
        assert row["losses"] == pytest.approx(expected, rel=1e-5), row["variant"]
        assert 0 < row["p20"] <= row["median"] <= row["p80"]


@pytest.mark.full
def test_schedule_that_cannot_run_is_a_row_with_the_reason(run):
    (row,) = run(pipelining_gpt, "--schedule", "ZBVZeroBubble", "--layers", "2")
    assert "2 layers do not divide into 4 stages" in row["note"]


@pytest.mark.parametrize(
    "variant",
    [pytest.param([], marks=pytest.mark.full), ["--loss-parallel"], ["--backend=tpmp"]],
    ids=["replicated", "loss_parallel", "tpmp"],
)
def test_dtensor_follows_one_process(run, variant):
    (row,) = run(dtensor_gpt, "--layers", "2", *SGD, *variant)
    assert row["losses"] == pytest.approx(losses_of_one_process(layers=2, batch=4), rel=1e-5)
