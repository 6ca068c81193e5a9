"""`tpmp schedule --model`: the table of the partition, its costs in the simulation, and one sentence for bad input."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from schedule_command import in_a_folder_of_its_own, refused, shown  # noqa: F401

from tpmp_kernels.models.layer_costs import Microbatch, layer_costs
from tpmp_kernels.pipeline.files import load as load_schedule
from tpmp_kernels.pipeline.files import save
from tpmp_kernels.pipeline.partition import partition
from tpmp_kernels.pipeline.schedules import build
from tpmp_kernels.pipeline.simulate import simulate
from tpmp_kernels.training.config import load

DEMO = str(Path(__file__).parents[2] / "examples" / "demo.toml")
MODEL = ["--model", DEMO]


def as_json(capsys, *argv: str) -> list[dict]:
    return json.loads(shown(capsys, *argv, *MODEL, "--json"))["schedules"]


def layers_of_demo(batch: int = 2, **changed):
    return layer_costs(replace(load(Path(DEMO)).model, **changed), Microbatch(batch, 128, tp=2))


def test_the_table_and_the_picture(capsys):

    out = shown(capsys, "1f1b", "--pp", "2", "--microbatches", "8", *MODEL)
    assert out.startswith(
        "1f1b: 2 ranks, 2 stages, 8 microbatches\n"
        "\n"
        "stage  rank  layers                         F       B        W  of largest  memory of rank\n"
        "    0     0  embed_tokens .. layers.1  0.1028  0.1155  0.09437       90.3%           8.266\n"
        "    1     1  layers.2 .. lm_head       0.1112  0.1323   0.1028      100.0%           6.007\n"
        "times of a microbatch in GFLOP, modelled; memory in MB, with all that is in flight\n"
        "slowest rank 0.3463, 105.1% of the mean\n"
        "\n"
        "time     0  "
    )
    assert "peak memory       5.046 2.785 by rank, in MB of activations" in out
    assert shown(capsys, "1f1b", *MODEL) == out, "sizes are those of the file"


def test_the_simulation_has_the_costs_of_the_partition(capsys):
    (fields,) = as_json(capsys, "1f1b", "--stages", "3", "--costs", "latency=0.01,bandwidth=100,kept=0.5")
    found = partition(layers_of_demo(), ranks=3, in_flight=[3, 2, 1], latency=0.01, bandwidth=100)
    simulation = simulate(build("1f1b", ranks=3, microbatches=8), found.costs(kept=0.5))
    assert fields["makespan"] == simulation.makespan and fields["busy"] == list(simulation.busy)
    assert fields["peak_memory"] == list(simulation.peak_memory)
    assert fields["costs"]["F"] == [part.F for part in found.parts] and fields["costs"]["kept"] == 0.5
    assert fields["costs"]["message"] == pytest.approx(2 * 128 * 128 * 4 / 1e6)
    stages = fields["partition"]["stages"]
    assert [(s["first"], s["last"], s["layers"]) for s in stages] == [
        (part.first, part.last, len(part.layers)) for part in found.parts
    ]
    assert sum(stage["layers"] for stage in stages) == 6
    assert fields["partition"]["rank_memory"] == list(found.rank_memory)
    assert fields["partition"]["optimal"] is True and fields["partition"]["unit"] == "GFLOP"


def test_microbatches_of_the_command_line_are_smaller_ones(capsys):
    (few,), (many,) = (as_json(capsys, "1f1b", "--microbatches", count) for count in ("4", "16"))
    assert few["partition"]["rank_times"] == pytest.approx([4 * time for time in many["partition"]["rank_times"]])


def test_each_schedule_has_a_partition_of_its_own(capsys):
    one, two = as_json(capsys, "1f1b", "--compare", "interleaved-1f1b")
    assert [len(each["partition"]["stages"]) for each in (one, two)] == [2, 4]
    assert [stage["rank"] for stage in two["partition"]["stages"]] == [0, 1, 0, 1]
    out = shown(capsys, "1f1b", "--compare", "interleaved-1f1b", *MODEL)
    assert out.count("memory of rank") == 2 and out.rstrip().splitlines()[-1].startswith("interleaved-1f1b")


def test_costs_reach_the_schedules_that_are_searched_for(capsys):
    layers = layers_of_demo()
    found = partition(layers, ranks=2, placement=(0, 1, 1, 0), in_flight=[4, 4])
    searched = build("zb-v", ranks=2, microbatches=8, costs=found.costs())
    assert searched != build("zb-v", ranks=2, microbatches=8)
    shown(capsys, "zb-v", *MODEL, "--save", "order.json")
    assert load_schedule("order.json") == searched


def test_a_schedule_of_a_file(capsys):
    """What it holds is counted by its proof: as much as 1F1B where it is that."""
    save(build("1f1b", ranks=2, microbatches=8), "order.csv")
    (fields,) = as_json(capsys, "order.csv")
    assert fields["partition"] == as_json(capsys, "1f1b")[0]["partition"]


def test_names_that_begin_stages(capsys):
    (fields,) = as_json(capsys, "1f1b", "--stages", "3", "--begin", "layers.3, lm_head")
    assert [stage["first"] for stage in fields["partition"]["stages"]] == ["embed_tokens", "layers.3", "lm_head"]


def test_validation_has_no_backward(capsys):
    (fields,) = as_json(capsys, "forward-only")
    assert fields["partition"]["rank_times"] == fields["costs"]["F"]


@pytest.mark.parametrize("limit", ["8.3MB", "0.0083GB"])
def test_a_memory_limit_that_is_enough(limit, capsys):
    (fields,) = as_json(capsys, "1f1b", "--memory-limit", limit)
    assert fields["partition"] == as_json(capsys, "1f1b")[0]["partition"]


def test_measured_on_this_machine(capsys, monkeypatch):
    from tpmp_kernels.models import layer_profile

    calls = []

    def profile(config, seen, *, device):
        calls.append((config, seen, device))
        return [replace(each, F=1, B=2, W=3) for each in layers_of_demo()]

    monkeypatch.setattr(layer_profile, "measured_layer_costs", profile)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    out = shown(capsys, "1f1b", *MODEL, "--measured")
    assert calls == [(load(Path(DEMO)).model, Microbatch(2, 128, tp=2), "cpu")]
    assert "times of a microbatch in ms, measured here, whole layers; memory in MB" in out
    assert "slowest rank 18, 100.0% of the mean" in out


def test_a_gpu_that_is_not_there(capsys, monkeypatch):
    Path("gpu.toml").write_text('[training]\ndevice = "cuda"\n')
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    sentence = refused(capsys, "1f1b", "--stages", "2", "--model", "gpu.toml", "--measured")
    assert "training.device: expected a GPU to measure on, found none" in sentence


BAD = [
    ("--memory-limit 8MB MODEL", "--memory-limit: expected at least 8.266 MB for 1f1b on 2 ranks, got 8 MB; give that"),
    ("--memory-limit 8 MODEL", "--memory-limit: expected a size in MB or GB (10^6, 10^9 bytes), got '8'; such as 80GB"),
    ("--memory-limit 0GB MODEL", "--memory-limit: expected a size in MB or GB"),
    ("--memory-limit 8GB", "--memory-limit: expected --model beside it, got none; such as --model examples/demo.toml"),
    ("--measured", "--measured: expected --model beside it, got none"),
    ("--begin lm_head", "--begin: expected --model beside it, got none"),
    (
        "--begin layers.1,, MODEL",
        "--begin: expected layers such as layers.2,lm_head, got 'layers.1,,'; remove the empty",
    ),
    ("--begin layers.4 MODEL", "--model: unknown layer 'layers.4'; the nearest known one is 'layers."),
    (
        "--begin layers.1,layers.2 MODEL",
        "--model: layers.1, layers.2 are each to begin a stage behind the first, of wh",
    ),
    (
        "--stages 7 MODEL",
        "--model: 7 stages need a layer each, got 6 layers, embedding and head included; use at most 6",
    ),
    (
        "--microbatches 3 MODEL",
        "training.batch=16 is not divisible by parallel.microbatches=3; use microbatches in {1, ",
    ),
    ("--costs F=1 MODEL", "--costs: F comes from --model, got it here too; leave it out, or leave out --model"),
    ("--costs latency=1,activation=2 MODEL", "--costs: activation comes from --model, got it here too"),
    ("--chunks 2 MODEL", "schedule 1f1b: chunks is 2; it has 1 on each rank, leave chunks out"),
    ("--model", "--model: expected a value, got nothing; tpmp schedule --help shows one for each option"),
    ("--model no.toml", "config: expected a TOML file, but 'no.toml' is none; examples/demo.toml is one"),
    ("--model bad.toml", "bad.toml: expected TOML, got "),
    ("--model odd.toml", "model.hidden=30 is not divisible by model.heads=4; use heads in {"),
    ("--model closed.toml", "--model: 'closed.toml' cannot be read (Permission denied); expected a config, check the"),
    ("--modle x", "unknown option '--modle'; the nearest known one is '--model'"),
]


@pytest.mark.parametrize("line, sentence", BAD, ids=[line[:40] for line, _ in BAD])
def test_bad_input_is_one_sentence(line, sentence, capsys, monkeypatch):
    Path("bad.toml").write_text("model")
    Path("odd.toml").write_text("[model]\nhidden = 30\n")
    Path("closed.toml").write_text("")
    read_text = Path.read_text

    def closed(path: Path, **how) -> str:
        if path.name == "closed.toml":
            raise PermissionError(13, os.strerror(13), str(path))
        return read_text(path, **how)

    monkeypatch.setattr(Path, "read_text", closed)
    assert refused(capsys, "1f1b", *shlex.split(line.replace("MODEL", f"--model {DEMO}"))).startswith(sentence)


def test_a_file_that_is_no_schedule_is_said_to_be_none(capsys):
    Path("stuck.csv").write_text("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n")
    assert "'stuck.csv' is no schedule that can run: stuck deadlocks: rank 0 " in refused(capsys, "stuck.csv", *MODEL)


def test_no_torch_is_loaded_for_a_model_that_is_not_measured():
    code = (
        "import sys; from tpmp_kernels.__main__ import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'tyro', 'numpy', 'rich'} & set(sys.modules); assert not heavy, heavy; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, "schedule", "1f1b", *MODEL], capture_output=True, text=True)
    assert done.returncode == 0 and "lm_head" in done.stdout, done.stderr
