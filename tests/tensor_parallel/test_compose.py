"""Every layer, cut over 2 and 4 ranks, with and without sequence parallelism, against itself unsharded: outputs, dx and
the gradient of every parameter. On small integers in fp64 every sum is exact and bits must agree."""

import itertools
import random
from functools import partial

import pytest
import torch
import torch.distributed as dist
from bounds import UNIT
from layer_problems import LAYERS, TOKENS, VOCAB, Layer, shared_columns

from tpmp_kernels.comm import EmulatedLink, communicator
from tpmp_kernels.tensor_parallel import reduce_partial_gradients, shard_of

SIZES = (2, 4)
DTYPES = ("integers", "float64", "float32", "bfloat16")


def values(shape, dtype: str, seed: int) -> torch.Tensor:
    """fp64 numbers that the dtype represents exactly."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == "integers":
        return torch.randint(-4, 5, shape, generator=generator).double()
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(getattr(torch, dtype)).double()


class Problem:
    """The whole x, parameters and upstream gradients in fp64, and what the unsharded layer makes of them in a dtype."""

    def __init__(self, layer: Layer, dtype: str, flat: bool, seed: int):
        lead = (TOKENS,) if flat else (4, TOKENS // 4)
        self.layer = layer
        if layer.ids:
            self.x = torch.randint(0, VOCAB, lead, generator=torch.Generator().manual_seed(seed))
        else:
            self.x = values((*lead, layer.features), dtype, seed)
        shapes = enumerate(layer.shapes.items(), start=seed + 1)
        self.parameters = {name: values(shape, dtype, number) for number, (name, shape) in shapes}
        outputs = layer.unsharded(self.parameters, self.x)
        self.upstream = [values(y.shape, dtype, seed + 100 + i) for i, y in enumerate(outputs)]

    def solve(self, dtype: torch.dtype, shares: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(outputs, gradients of x and the parameters). shares: the sum of what the sharers of an output pass back."""
        x = self.x.clone() if self.layer.ids else self.x.to(dtype, copy=True).requires_grad_()
        parameters = {name: p.to(dtype, copy=True).requires_grad_() for name, p in self.parameters.items()}
        outputs = self.layer.unsharded(parameters, x)
        upstream = [
            dy.to(y.dtype) * (shares if cut is shared_columns else 1)
            for y, dy, cut in zip(outputs, self.upstream, self.layer.outputs, strict=True)
        ]
        torch.autograd.backward(outputs, upstream)
        return [y.detach() for y in outputs], [x.grad, *(p.grad for p in parameters.values())]


def check(comm, name: str, dtype: str, sequence_parallel: bool, seed: int) -> None:
    layer, wide = LAYERS[name], torch.float64 if dtype == "integers" else getattr(torch, dtype)
    problem = Problem(layer, dtype, sequence_parallel, seed)
    sharers = max(1, comm.size // 2)
    shares = sharers * (sharers + 1) // 2
    oracle, unsharded = problem.solve(torch.float64, shares), problem.solve(wide, shares)

    module = layer.build(comm, sequence_parallel=sequence_parallel, dtype=wide)
    parameters = dict(module.named_parameters())
    assert parameters.keys() == layer.shapes.keys()
    with torch.no_grad():
        for key, p in parameters.items():
            p.copy_(shard_of(problem.parameters[key], p, comm))
    x = layer.x(problem.x, comm, sequence_parallel).clone()
    x = x if layer.ids else x.to(wide).requires_grad_()
    outputs = layer.run(module, x)
    own = [
        cut(dy, comm, sequence_parallel).nan_to_num(neginf=7.0).to(y.dtype)
        * (comm.rank % sharers + 1 if cut is shared_columns else 1)
        for y, dy, cut in zip(outputs, problem.upstream, layer.outputs, strict=True)
    ]
    torch.autograd.backward(outputs, own)
    reduce_partial_gradients(module, comm)

    def judge(what: str, got: torch.Tensor, cut, exact: torch.Tensor, same_dtype: torch.Tensor) -> None:
        want = cut(exact)
        assert got.shape == want.shape, f"{what}: shape {list(got.shape)}, expected {list(want.shape)}"
        if dtype == "integers" and layer.exact:
            assert torch.equal(got, want), f"{what}: bits differ"
            return
        # Each rank's partial sum is rounded once, and then their sum: some units more than the unsharded layer.
        units = layer.slack * (64 if wide is torch.float64 else comm.size + 2)
        bound = 2 * (same_dtype.double() - exact).abs().max() + units * UNIT[wide] * exact.abs().max()
        error = torch.where(got == want, 0.0, got.double() - want).abs().max() if got.numel() else 0.0
        assert error <= bound, f"{what}: error {error:.3e}, bound {bound:.3e}"

    for i, (y, cut) in enumerate(zip(outputs, layer.outputs, strict=True)):
        part = partial(cut, comm=comm, sequence_parallel=sequence_parallel)
        judge(f"output {i}", y.detach(), part, oracle[0][i], unsharded[0][i])
    if not layer.ids:
        part = partial(layer.x, comm=comm, sequence_parallel=sequence_parallel)
        judge("dx", x.grad, part, oracle[1][0], unsharded[1][0])
    for key, exact, same_dtype in zip(layer.shapes, oracle[1][1:], unsharded[1][1:], strict=True):
        part = partial(shard_of, parameter=parameters[key], comm=comm)
        judge(f"gradient of {key}", parameters[key].grad, part, exact, same_dtype)


def run_cases(cases: list[tuple], overlaps: bool = False) -> list[str]:
    failures = []
    with communicator(dist.group.WORLD, name="compose") as comm:
        if overlaps:
            comm = EmulatedLink(comm, latency=0.0, bandwidth=float("inf"))
        for case in cases:
            try:
                check(comm, *case)
            except AssertionError as error:
                failures.append(f"{case}: {error}")
    return failures


def grid(sequence_parallel: bool, seeds) -> list[tuple]:
    return [
        (name, dtype, sequence_parallel, seed)
        for name, dtype, seed in itertools.product(LAYERS, DTYPES, seeds)
        if dtype != "integers" or LAYERS[name].exact
    ]


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_layers_equal_the_unsharded_ones(ranks, size, sequence_parallel):
    cases = grid(sequence_parallel, [0])
    exact = [case for case in cases if case[1] == "integers"]
    sample = random.Random(size + sequence_parallel).sample([case for case in cases if case[1] != "integers"], 20)
    assert ranks(size).run(run_cases, exact + sample) == [[]] * size


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_layers_over_a_link_that_overlaps_are_the_same(ranks, sequence_parallel):
    cases = [case for case in grid(sequence_parallel, [1]) if case[1] in ("integers", "float64")]
    assert ranks(2).run(run_cases, cases, True) == [[]] * 2


@pytest.mark.full
@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_the_whole_grid(ranks, size, sequence_parallel, overlaps):
    assert ranks(size).run(run_cases, grid(sequence_parallel, range(10)), overlaps, timeout=300) == [[]] * size
