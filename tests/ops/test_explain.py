"""ops.explain: each product of a call with its choice, on a chip that is not here and on this CPU."""

import pytest
import torch

from tpmp_kernels import ops


def meta(*shape):
    return torch.empty(*shape, dtype=torch.bfloat16, device="meta")


def lines(*args, **options) -> list[str]:
    return str(ops.explain(*args, **options)).splitlines()


def test_a_linear_has_three_products_and_says_why():
    head, forward, dgrad, wgrad = lines(
        ops.linear, meta(4, 512, 1024), meta(4096, 1024), activation="silu", arch="sm90"
    )
    assert head.startswith("linear in bf16 on sm90 (132 multiprocessors), Triton ")
    assert "linear 2048x4096x1024: Triton 128x256x64" in forward and "would cost more" in forward
    assert "2048x1024x4096: torch's GEMM" in dgrad and "4096x1024x2048: torch's GEMM" in wgrad
    (only,) = lines(ops.linear, meta(8, 64), meta(32, 64), arch="sm90", training=False)[1:]
    assert "forward" in only


def test_pre_activations_are_kept_for_training_alone():
    def choice(**options):
        return ops.explain(ops.linear, meta(512, 256), meta(1024, 256), activation="silu", arch="sm90", **options)

    (_, kept), *_ = choice().products
    for options in ({"training": False}, {"save_preact": False}):
        (_, dropped), *_ = choice(**options).products
        assert dropped.ours < kept.ours


def test_a_main_grad_is_accumulated_by_our_kernel():
    weight = torch.nn.Parameter(torch.randn(64, 32))
    ops.attach_main_grad([weight])
    assert "wgrad 64x32x8: Triton" in lines(ops.linear, torch.randn(8, 32), weight, arch="sm90")[-1]


def test_an_operand_that_is_not_aligned_changes_the_choice():
    def way(width):
        return lines("linear", meta(512, width)[:, :1024], meta(1024, 1024), activation="silu", arch="sm90")[1]

    assert "descriptors" in way(1032) and "scalars" in way(1027)


@pytest.mark.parametrize(
    ("op", "weights", "names"),
    [
        ("mlp", [(192, 96), (96, 192)], ["up", "down", "down dgrad", "down wgrad", "up dgrad", "up wgrad"]),
        (
            "gated_mlp",
            [(192, 96), (192, 96), (96, 192)],
            ["up", "down", "down dgrad", "down wgrad", "gate dgrad", "gate wgrad", "up dgrad", "up wgrad"],
        ),
        ("gated_linear", [(192, 96)] * 2, ["forward", "gate dgrad", "gate wgrad", "up dgrad", "up wgrad"]),
    ],
)
def test_every_product_of_a_pair_is_named(op, weights, names):
    for device, arch in (("meta", "gfx942"), ("cpu", None)):
        tensors = [torch.empty(*s, device=device) for s in ((64, 96), *weights)]
        assert [name for name, _ in ops.explain(op, *tensors, arch=arch).products] == names


def test_another_op_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match=r"^explain: expected one of linear, gated_linear, mlp, gated_mlp, got 'rope'"):
        ops.explain(ops.rope)
