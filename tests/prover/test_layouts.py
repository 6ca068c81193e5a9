"""Layouts told from shapes, and the tape that their whole tensors come from."""

import pytest
import torch

from tpmp_kernels.prover.layouts import layout_of
from tpmp_kernels.prover.sites import Site, of_parameter, place
from tpmp_kernels.prover.tape import Tape

WHOLE = torch.arange(2 * 6 * 8).view(2, 6, 8)


@pytest.mark.parametrize(
    ("made", "ranks"),
    [
        (lambda r: WHOLE, 3),
        (lambda r: WHOLE.chunk(2, 2)[r], 2),
        (lambda r: WHOLE.chunk(3, 1)[r], 3),
        (lambda r: WHOLE.flatten(0, 1), 4),
        (lambda r: WHOLE.flatten(0, 1).chunk(4)[r], 4),
        (lambda r: WHOLE.flatten(0, 1).chunk(4, 1)[r], 4),
        (lambda r: WHOLE.chunk(2, 2)[r // 2], 4),  # neighbouring ranks hold the same
        (lambda r: WHOLE.chunk(4, 1)[r] if r < 3 else WHOLE[:, :0], 4),  # torch's chunks, the last one empty
        (lambda r: WHOLE.flatten(), 2),
    ],
)
def test_a_rank_finds_its_part(made, ranks):
    for rank in range(ranks):
        local = made(rank)
        layout = layout_of(local.shape, WHOLE.shape, rank, ranks)
        assert torch.equal(layout.real(local), layout.cut(WHOLE))


def test_padding_is_left_out_and_kept():
    vocab = torch.arange(5.0)
    for rank in range(4):
        local = torch.cat((vocab, torch.full((3,), -1.0))).chunk(4)[rank].double()
        layout = layout_of(local.shape, vocab.shape, rank, 4, padded=True)
        assert torch.equal(layout.real(local).float(), layout.cut(vocab))
        assert torch.equal(layout.filled(local, layout.cut(vocab)), local)
    # 64 ids padded to 128 over 4 ranks: the shapes alone would say that two neighbours share each part.
    blocks = [layout_of((32,), (64,), rank, 4, padded=padded).block for padded in (False, True) for rank in range(4)]
    assert blocks == [0, 0, 1, 1, 0, 1, 2, 3]


@pytest.mark.parametrize("shape", [(2, 6, 7), (3, 8), (1, 3, 8), (2, 6, 8, 1), ()])
def test_what_is_no_part_is_none(shape):
    assert layout_of(shape, WHOLE.shape, 0, 2) is None


def test_parts_of_ranks_may_be_empty_or_scalar():
    assert layout_of((), (), 1, 2).cut(torch.tensor(3.0)) == 3
    assert layout_of((0, 4), (0, 4), 1, 2).cut(torch.zeros(0, 4)).shape == (0, 4)


def test_the_tape_gives_back_what_was_put():
    tape, tensors = Tape(), [torch.randn(3, 4).t(), torch.zeros(0, 3), torch.tensor(2.5), torch.tensor([True, False])]
    tensors += [torch.arange(5), torch.randn(2, dtype=torch.bfloat16), torch.randn(3, 4)[:, 1]]
    sites = [of_parameter("weights", f"layers.{i}.weight") for i in range(len(tensors))]
    for site, tensor in zip(sites, tensors, strict=True):
        tape.put(site, tensor)
    reader = Tape(tape.path, tape.index)
    for site, tensor in zip(sites, tensors, strict=True):
        found = reader.get(site)
        assert torch.equal(found, tensor.double() if tensor.is_floating_point() else tensor)
    assert reader.get(of_parameter("weights", "none")) is None


def test_equal_tensors_are_written_once():
    tape, x = Tape(), torch.randn(64)
    first, second = (Site("forward", 0, name, 0, "out") for name in "ab")
    tape.put(first, x)
    tape.put(second, x.clone())
    assert tape.index[first].offset == tape.index[second].offset and tape.index[second].order == 1


@pytest.mark.parametrize(
    ("site", "module", "detail"),
    [
        (Site("forward", 0, "layers.0.mlp", 0, "out"), "layers.0.mlp", ""),
        (Site("forward", 0, "layers.0.mlp", 0, "in.0"), "layers.0", "in what layers.0.mlp is given"),
        (Site("forward", 0, "layers.0", 0, "in.0"), "model", "in what layers.0 is given"),
        (Site("backward", 0, "layers.0", 0, "out"), "model", "in the gradient that comes back to layers.0"),
        (Site("backward", 0, "", 0, "out"), "loss", ""),
        (Site("backward", 0, "layers.0", 0, "in.x"), "layers.0", "in the gradient of its input"),
        (of_parameter("backward", "norm.weight", 2), "norm", "in the gradient of weight"),
        (of_parameter("update", "scale"), "model", "in scale"),
    ],
)
def test_whose_mistake_a_difference_is(site, module, detail):
    assert place(site, called={"", "layers.0", "layers.0.mlp"}) == (module, detail)
