"""`tpmp compare`: every op is compared on this machine, errors are told, bad input is refused in one sentence."""

import re

import pytest
import torch

from tpmp_kernels import __main__ as command
from tpmp_kernels import ops
from tpmp_kernels.bench.compare import measure
from tpmp_kernels.bench.compare.options import AXES, parse
from tpmp_kernels.bench.compare.problems import problem
from tpmp_kernels.bench.memory import extra_bytes
from tpmp_kernels.errors import UsageError

SMALL = {"rope": (2, 5, 4, 2, 8)}


def small(op: str) -> tuple[int, ...]:
    return SMALL.get(op, (24, 40, 16)[: len(AXES[op][1])])


@pytest.mark.parametrize("op", AXES)
def test_each_op_is_as_near_to_fp64_as_torch_forward_and_backward(op):
    options = parse([op])
    asked = problem(op, small(op), options.activation)
    every = measure.contenders(asked, "cpu")
    assert every.pop("tpmp triton") == "needs a CUDA device"
    del every[measure.COMPILED]  # which needs half a minute for all of them
    operands = asked.draw(torch.float32, "cpu", 0)
    found = measure.errors(asked, every, operands, backward=True)
    assert found[measure.EAGER].of_torch == 1
    for name, error in found.items():
        assert not error.wrong, f"{name}: {error}"


@pytest.mark.full
def test_the_table_has_times_beside_errors_and_memory(capsys):
    arguments = ["compare", "linear", "--shape", "16x32x8", "--dtype", "fp32,bf16", "--threads", "1", "--quick"]
    assert command.main(arguments) == 0
    text = capsys.readouterr().out
    assert "linear: M 16, N 32, K 8; forward; cpu-" in text and ", 1 threads" in text
    assert re.search(r"linear\+bias\+gelu, bf16\ncontender +median", text)
    for name in (measure.EAGER, measure.COMPILED, "tpmp cpu"):
        assert (
            len(re.findall(rf"^{name} +[\d.]+ [mu]s .* [mu]s +[\d.]+x .*FLOP/s +\d+ MiB +\S+e-\d+ +", text, re.M)) == 2
        )
    assert text.count("cannot run: needs a CUDA device") == 2


@pytest.mark.full
def test_a_wrong_result_of_ours_is_told_and_is_exit_code_1(monkeypatch, capsys):
    right = ops.glu
    monkeypatch.setattr(ops, "glu", lambda *args, **names: right(*args, **names) * 1.01)
    assert command.main(["compare", "glu", "--shape", "8x16", "--quick"]) == 1
    captured = capsys.readouterr()
    assert re.search(r"^tpmp cpu .* WRONG$", captured.out, re.M)
    assert re.fullmatch(r"tpmp compare: tpmp cpu in fp32 is \S+ times as far from fp64 as eager\n", captured.err)


def test_a_nan_is_wrong():
    asked = problem("glu", (8, 16), "silu")
    calls = {measure.EAGER: measure.contenders(asked, "cpu")[measure.EAGER], "nan": lambda gate, up: gate * torch.nan}
    assert measure.errors(asked, calls, asked.draw(torch.float32, "cpu", 0), backward=False)["nan"].wrong


def test_extra_bytes_count_what_is_held_at_one_time_and_not_what_is_returned():
    def call(x):
        held = [torch.ones(32 << 20, dtype=torch.uint8) for _ in range(2)]
        held.clear()
        return [torch.ones(16 << 20, dtype=torch.uint8) + torch.ones(16 << 20, dtype=torch.uint8)]

    mib = extra_bytes(call, (torch.ones(1),)) / 2**20
    assert 46 <= mib <= 52  # 64 at one time, of which 16 were returned


REFUSED = [
    ("", "expected an op (linear, "),
    ("lineer", "got 'lineer'; the nearest is 'linear'"),
    ("linear --shape 3x4", "--shape: expected MxNxK, got '3x4'; such as 512x3072x768"),
    ("linear --shape 3x4x0", "--shape: expected sizes from 1 to 16777216, got '3x4x0'"),
    ("rope --shape 1x2x3", "--shape: expected BxSxQxKxD, got '1x2x3'"),
    ("linear --dtype int8", "--dtype: expected dtypes of fp32, bf16, fp16, fp64, got 'int8'"),
    ("linear --dtype fp32,", "--dtype: expected dtypes such as fp32,bf16, got 'fp32,'; remove the empty one"),
    ("linear --activation sine", "--activation: expected one of none, gelu, "),
    ("rms_norm --activation silu", "--activation: rms_norm has none, got 'silu'; leave it out"),
    ("linear --threads 0", "--threads: expected a whole number from 1, got '0'"),
    ("linear --device tpu", "--device: expected one of auto, cpu, cuda, got 'tpu'"),
    ("linear --shap 3", "unknown option '--shap'; the nearest known one is '--shape'"),
    ("linear 3", "expected options only, got '3'"),
]


@pytest.mark.parametrize(("words", "sentence"), REFUSED, ids=[words for words, _ in REFUSED])
def test_refused_in_one_sentence(words, sentence, capsys):
    assert command.main(["compare", *words.split()]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_missing_is_refused():
    with pytest.raises(UsageError, match="torch finds none; use --device cpu"):
        from tpmp_kernels.bench.compare import command as compare

        compare.run(["linear", "--device", "cuda"])


def test_help_says_what_the_axes_are(capsys):
    for arguments in (["compare", "--help"], ["compare", "rope", "--help"]):
        with pytest.raises(SystemExit) as done:
            command.main(arguments)
        assert done.value.code == 0
        assert "B batch, S sequence" in capsys.readouterr().out
