"""Linears whose collective runs under their GEMM, the rule that says in how many chunks, and what it would say."""

from tpmp_kernels.comm.overlap.explain import MODES, Explanation, explain, plan_of
from tpmp_kernels.comm.overlap.linears import (
    all_gather_linear,
    all_gather_linears,
    copy_linear,
    copy_linears,
    linear_all_reduce,
    linear_reduce_scatter,
)
from tpmp_kernels.comm.overlap.plan import Costs, Link, Plan
from tpmp_kernels.comm.overlap.rates import Rates, calibrate

__all__ = [
    "MODES",
    "Costs",
    "Explanation",
    "Link",
    "Plan",
    "Rates",
    "all_gather_linear",
    "all_gather_linears",
    "calibrate",
    "copy_linear",
    "copy_linears",
    "explain",
    "linear_all_reduce",
    "linear_reduce_scatter",
    "plan_of",
]
