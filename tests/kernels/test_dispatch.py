"""Our kernel or torch's GEMM: the rule at its ends and where it turns, and torch's way on the CPU."""

import subprocess
import sys

import pytest
import torch
from bounds import assert_within, linear_bound

from tpmp_kernels import reference
from tpmp_kernels.kernels import dispatch, tiles

E = tiles.Epilogue


def choose(k, epilogue, *, operation="linear", m=8192, n=8192, dtype="bf16", arch="sm90"):
    return dispatch.choose(
        operation, m, n, k, dtype, arch=arch, sms=132, epilogue=epilogue, triton_version="3.6.0"
    )  # fmt: skip


@pytest.mark.parametrize(
    "epilogue",
    [E(), E(bias=True), E("relu", bias=True), E("gelu_tanh", bias=True)],
    ids=["none", "bias", "relu", "gelu_tanh"],
)
def test_what_the_library_fuses_itself_is_left_to_it(epilogue):
    choice = choose(1024, epilogue)
    assert choice.tile is None and choice.passes == 0
    assert "it fuses all" in str(choice)


@pytest.mark.parametrize(
    "epilogue",
    [E("gelu", bias=True), E("silu"), E("relu", bias=True, residual=True), E(residual=True), E("relu2", preact=True)],
    ids=str,
)
def test_ours_is_chosen_below_some_k_and_never_above_it(epilogue):
    ours = [choose(k, epilogue).tile is not None for k in range(256, 32769, 256)]
    turn = ours.index(False)
    assert turn > 0 and not any(ours[turn:])


def test_more_passes_behind_the_product_are_worth_a_larger_k():
    def turn(epilogue):
        return next(k for k in range(256, 65536, 256) if choose(k, epilogue).tile is None)

    assert turn(E("gelu", bias=True)) < turn(E("gelu", bias=True, residual=True))
    assert turn(E("gelu", bias=True, preact=True)) < turn(E("gelu", bias=True))


def test_what_only_our_kernels_do_is_theirs():
    for operation, epilogue in (
        ("wgrad", E(residual=True)),
        ("mlp_dz", E("silu", residual=True)),
        ("linear", E(wide=True)),
    ):
        assert choose(1 << 16, epilogue, operation=operation).tile is not None
    assert choose(1 << 16, E(), dtype="fp32").tile is not None


def test_the_estimates_follow_the_ceiling_of_fusion():
    """At K = 4096 one pass over the result is 9 % of the GEMM (read and write 4 B at 4.3 TB/s, 790 TFLOP/s)."""
    choice, chip = choose(4096, E("gelu", bias=True)), tiles.chip("sm90")
    gemm = 2 * 8192 * 8192 * 4096 / (chip.tflops * 1000)
    assert choice.library / gemm == pytest.approx(1.09, abs=0.08)
    assert choice.ours / gemm == pytest.approx(100 / chip.of_library, abs=0.08)


@pytest.mark.parametrize("activation", [None, *reference.ACTIVATIONS])
@pytest.mark.parametrize("form", ["plain", "bias", "residual", "preact"])
def test_the_librarys_way_is_within_the_unfused_bound(activation, form):
    pytest.importorskip("triton")
    from tpmp_kernels.kernels import library

    torch.manual_seed(0)
    x, w, b, r = (torch.randn(s).bfloat16() for s in ((33, 40), (24, 40), (24,), (33, 24)))
    bias, residual = b if form != "plain" else None, r if form == "residual" else None
    y, z = library.linear(x, w, bias, residual, activation, form == "preact")
    if (activation, form) != ("gelu_tanh", "bias"):  # torch._addmm_activation takes the erf form on the CPU
        assert_within(y, *linear_bound(x, w, bias, activation=activation, residual=residual, unfused=True))
    assert (z is None) == (form != "preact")
    if z is not None:
        assert z.data_ptr() != y.data_ptr()
        assert_within(z, *linear_bound(x, w, bias))


def test_the_choice_needs_neither_torch_nor_triton():
    program = (
        "import sys; from tpmp_kernels.kernels import dispatch as d, tiles as t;"
        "d.choose('linear', 64, 64, 64, 'bf16', arch='sm90', sms=132, epilogue=t.Epilogue(), triton_version='3.6.0');"
        "assert 'torch' not in sys.modules and 'triton' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
