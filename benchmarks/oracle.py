"""Correctness of what is about to be timed: every contender against the fp64 reference, on the timed inputs."""

from collections.abc import Callable, Mapping

import torch

from tpmp_kernels.bench import OURS
from tpmp_kernels.bench.compare.measure import Error


def assert_correct(
    contenders: Mapping[str, Callable[..., torch.Tensor]],
    oracle: Callable[..., torch.Tensor],
    inputs: tuple[torch.Tensor, ...],
    *,
    baseline: str,
) -> None:
    """Fail where a contender is more than twice as far from the oracle in fp64 as the baseline, plus one rounding.

    The bound is max|out - R| <= 2 max|baseline - R| + u max|R|, with u the unit round-off of the output's dtype.
    """
    exact = oracle(*(each.double() for each in inputs))
    errors = {name: _distance(call(*inputs), exact) for name, call in contenders.items()}
    unit = torch.finfo(inputs[0].dtype).eps / 2
    allowed = 2 * errors[baseline] + unit * exact.abs().max().item()
    for name, error in errors.items():
        # `not <=` rather than `>`: a NaN must fail
        if not error <= allowed:
            raise AssertionError(f"{name}: largest error {error:.3g} against fp64; the bound is {allowed:.3g}")


def check_errors(errors: Mapping[str, Error]) -> None:
    """The same of errors that bench.compare found: only contenders of ours must be right, whatever torch.compile is."""
    for name, error in errors.items():
        if error.wrong and name.split(" ")[0] == OURS:
            raise AssertionError(f"{name}: {error.of_torch:.3g} times as far from fp64 as plain torch")


def _distance(out: torch.Tensor, exact: torch.Tensor) -> float:
    if out.shape != exact.shape:
        raise AssertionError(f"a contender returned shape {tuple(out.shape)}, not {tuple(exact.shape)}")
    return (out.double() - exact).abs().max().item()
