"""What a run leaves for people: metrics that survive a resume, and a picture that is skipped where it must be."""

import json
import sys

from tpmp_kernels.training.metrics import Metrics, draw_losses
from tpmp_kernels.training.trainer import StepStats


def stats(loss: float) -> StepStats:
    return StepStats(loss=loss, grad_norm=1.0, seconds=0.5, exposed=0.25, bubble=0.125, transfer=0.0625)


def test_the_live_line_shows_every_figure(tmp_path):
    line = Metrics(tmp_path, tokens_per_step=1000).line(9, 200, stats(2.5))
    shares = "exposed comm 25.0%", "bubble 12.5% (transfer 6.2%)"
    for figure in ("step    10/200", "loss 2.5000", "grad norm   1.000", "2,000 tokens/s", *shares):
        assert figure in line


def test_a_resumed_run_keeps_what_stands_before_it_and_drops_what_it_repeats(tmp_path):
    first = Metrics(tmp_path, tokens_per_step=1000)
    for step in range(4):
        first.step(step, stats(float(step)))
    first.validate(2, 0.5)
    first.close()
    resumed = Metrics(tmp_path, 2, tokens_per_step=1000)
    assert resumed.losses == [0.0, 1.0] and resumed.validation == {2: 0.5}
    resumed.step(2, stats(7.0))
    resumed.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r.get("loss")) for r in rows] == [(0, 0.0), (1, 1.0), (2, None), (2, 7.0)]


def test_a_loss_that_is_no_number_is_null_in_the_file(tmp_path):
    metrics = Metrics(tmp_path, tokens_per_step=1000)
    metrics.step(0, stats(float("nan")))
    assert '"loss": null' in (tmp_path / "metrics.jsonl").read_text()


def test_the_picture_is_drawn_or_skipped_with_one_line(tmp_path, monkeypatch):
    path = tmp_path / "loss.png"
    assert draw_losses(path, [3.0, 2.0], [3.0, 2.0], {2: 2.5}, 3.25) == "loss.png drawn"
    assert path.read_bytes().startswith(b"\x89PNG")
    path.unlink()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = draw_losses(path, [3.0, 2.0], None, {}, 3.25)
    assert line.startswith("loss.png skipped: matplotlib is not installed") and not path.exists()
