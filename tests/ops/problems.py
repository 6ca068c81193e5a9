"""One small problem for each op and form, which the tests of this folder go through: families are added here."""

import linear_problems
import norm_problems
from linear_problems import GATED, LINEARS
from norm_problems import ADD_RMS_NORM, NORMS, RMS_NORM
from problem import Inner, Problem, flat

PROBLEMS = [*LINEARS, *GATED, *NORMS]
INNER = [*linear_problems.INNER, *norm_problems.INNER]

__all__ = ["ADD_RMS_NORM", "GATED", "INNER", "LINEARS", "NORMS", "PROBLEMS", "RMS_NORM", "Inner", "Problem", "flat"]
