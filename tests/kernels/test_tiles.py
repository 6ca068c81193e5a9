"""The choice of a tile: pure, integral, within shared memory, and sensible at the ends."""

import random
import subprocess
import sys

import pytest

from tpmp_kernels.kernels import tiles

PLAIN = tiles.Epilogue()
FULL = tiles.Epilogue("gelu", bias=True, residual=True, preact=True)


def choose(m, n, k, dtype="bf16", *, operation="linear", arch=90, sms=132, epilogue=PLAIN):
    return tiles.tile(operation, m, n, k, dtype, arch=arch, sms=sms, epilogue=epilogue, triton_version="3.9.0")


def test_large_problems_take_the_large_tile_and_small_ones_spread_out():
    assert (choose(8192, 8192, 4096).block_m, choose(8192, 8192, 4096).block_n) == (128, 256)
    assert (choose(64, 1024, 4096).block_m, choose(64, 1024, 4096).block_n) == (64, 64)


def test_a_tile_that_would_spill_is_not_chosen():
    assert choose(8192, 8192, 4096, epilogue=tiles.Epilogue("silu")).block_n == 128
    assert choose(8192, 8192, 4097).block_n == 128


def test_what_is_ragged_depends_on_the_axes_that_lie_adjacent():
    """Tokens are the inner dimension of wgrad, but rows of its operands: their number changes nothing."""
    aligned = choose(8192, 8192, 4096, operation="wgrad")
    assert choose(8192, 8192, 4097, operation="wgrad") == aligned
    assert choose(8193, 8192, 4096, operation="wgrad") != aligned != choose(8192, 8193, 4096, operation="wgrad")


@pytest.mark.parametrize("arch", [75, 80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("operation", tiles.OPERATIONS)
def test_every_choice_is_shipped_and_fits_the_chip(operation, dtype, arch):
    rng = random.Random(arch)
    for _ in range(50):
        m, n, k = (rng.choice([0, 1, 17, 128, 1000, 4096, 100_000]) for _ in range(3))
        epilogue = rng.choice([PLAIN, FULL])
        options = {"operation": operation, "arch": arch, "epilogue": epilogue}
        t = choose(m, n, k, dtype, sms=rng.choice([1, 80, 132]), **options)
        assert t in tiles.shipped(m=m, n=n, k=k, dtype=dtype, **options)
        itemsize = 4 if dtype == "fp32" else 2
        columns = t.block_m + t.block_n * (2 if operation == "gated_linear" else 1)
        assert t.num_stages * columns * t.block_k * itemsize <= tiles.shared_limit(arch)


def test_the_choice_needs_neither_torch_nor_triton_and_is_the_same_in_another_process():
    program = (
        "import sys; from tpmp_kernels.kernels import tiles as t;"
        "e = t.Epilogue('silu');"
        "print(t.tile('linear', 1000, 3000, 512, 'bf16', arch=90, sms=132, epilogue=e, triton_version='3.6.0'));"
        "assert 'torch' not in sys.modules and 'triton' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == str(choose(1000, 3000, 512, epilogue=tiles.Epilogue("silu"))), done.stderr
