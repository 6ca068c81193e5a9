"""Masks and weights on a CUDA device are those of the CPU, bit by bit. Imports torch and pytest alone."""

import pytest
import torch
from torch import nn

from tpmp_kernels.models import initialize
from tpmp_kernels.tensor_parallel import DropoutKey, dropout
from tpmp_kernels.tensor_parallel.philox import matrix_words

pytestmark = pytest.mark.gpu


def words(device: str) -> torch.Tensor:
    rows, columns = range(2**31 - 3, 2**31 + 70), range(5, 998)
    blocks = matrix_words(2**63 + 7, (9, 2**32 - 1, 4), rows=rows, columns=columns, width=1000, device=device)
    return torch.cat([block.cpu() for _, block in blocks])


def test_cuda_words_are_those_of_the_cpu():
    assert torch.equal(words("cuda"), words("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_dropout_is_that_of_the_cpu(dtype):
    x = torch.randn(65, 3, 130, generator=torch.Generator().manual_seed(0)).to(dtype)
    key = DropoutKey(seed=1, step=2, layer=3, microbatch=4)
    assert torch.equal(dropout(x.cuda(), 0.3, key).cpu(), dropout(x, 0.3, key))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_weights_are_those_of_the_cpu(dtype):
    models = [nn.Linear(777, 333, device=device, dtype=dtype) for device in ("cpu", "cuda")]
    for model in models:
        initialize(model, seed=5, layers=2)
    assert torch.equal(models[0].weight, models[1].weight.cpu())
