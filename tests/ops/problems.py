"""One small problem for each op and form, which the tests of this folder go through: families are added here."""

import glu_problems
import grad_norm_problems
import linear_problems
import loss_problems
import norm_problems
from glu_problems import GLUS
from linear_problems import GATED, LINEARS, MLPS, SPLIT
from loss_problems import LOSSES
from norm_problems import ADD_RMS_NORM, NORMS, RMS_NORM
from problem import Inner, Problem, flat
from rope_problems import ROPES

PROBLEMS = [*LINEARS, *GATED, *MLPS, *SPLIT, *LOSSES, *NORMS, *GLUS, *ROPES]
INNER = [
    *linear_problems.INNER,
    *loss_problems.INNER,
    *norm_problems.INNER,
    *glu_problems.INNER,
    *grad_norm_problems.INNER,
]

__all__ = [
    "ADD_RMS_NORM",
    "GATED",
    "INNER",
    "LINEARS",
    "LOSSES",
    "MLPS",
    "NORMS",
    "PROBLEMS",
    "RMS_NORM",
    "Inner",
    "Problem",
    "flat",
]
