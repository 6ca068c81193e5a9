"""Stages out of a whole model: one after the other they are the model, to the bit, and train its own parameters."""

import pytest
import torch
from torch import nn

from tpmp_kernels.pipeline.parts import parts_of_decoder, parts_of_sequence

CUTS = [range(0, 1), range(1, 3), range(3, 4)]


def through(parts, x):
    for part in parts:
        x = part(x)
    return x


@pytest.mark.parametrize("kind", [nn.Sequential, lambda *layers: list(layers)], ids=["Sequential", "list"])
def test_a_sequence(kind):
    torch.manual_seed(0)
    layers = kind(*(nn.Linear(5, 5) for _ in range(4)))
    x = torch.randn(3, 5)
    parts = parts_of_sequence(layers, CUTS)
    assert torch.equal(through(parts, x), through(layers, x))
    assert [len(part) for part in parts] == [1, 2, 1] and parts[1][0] is layers[1]
    assert [*parts[1].state_dict()] == ["1.weight", "1.bias", "2.weight", "2.bias"]


@pytest.mark.parametrize("cuts", [[range(0, 2)], [range(0, 2), range(1, 4)], [range(1, 4)], [range(0, 4, 2)]])
def test_cuts_that_are_not_the_whole_are_refused(cuts):
    with pytest.raises(ValueError, match="are not all of 4 layers, each once and in order"):
        parts_of_sequence([nn.Identity()] * 4, cuts)


def llama(tied: bool = False) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="make peers installs transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, tie_word_embeddings=tied))


def test_a_hugging_face_decoder():
    model, ids = llama(), torch.arange(14).view(2, 7)
    parts = parts_of_decoder(model, CUTS)
    whole = model(ids).logits
    assert torch.equal(through(parts, ids), whole)
    whole.square().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    through(parts, ids).square().sum().backward()
    assert all(torch.equal(p.grad, expected[name]) for name, p in model.named_parameters())
    names = [{name for name, _ in part.named_parameters()} for part in parts]
    assert set.union(*names) == expected.keys() and "model.layers.3.mlp.up_proj.weight" in names[2]
    assert not any(m.training for part in parts for m in (part.eval(), part._model))
    held = [sum(p.numel() for p in part.parameters()) for part in parts]
    assert sum(held) == sum(p.numel() for p in model.parameters())
    assert len(model.model.layers) == 4 and model(ids).logits.shape == (2, 7, 50)  # the model is as it was


def test_a_path_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"Sequential has no module 'model\.layers'; pass the path of it"):
        parts_of_decoder(nn.Sequential(nn.Identity()), [range(1)])
