"""The prover: is this parallel training step the unsharded one, or where does it first differ, and by which mistake?

    report = tpmp_kernels.verify(model_fn, batch, plan, tp=2, pp=1, microbatches=4)
    assert report.equal, report                     # tpmp verify --tp 2 --pp 2 does so for the demo model

    entry.py, command.py, options.py      the two ways in, from Python and from the command line
    subject.py    what is to be proved: a module of one's own (user.py), or a training config (demo.py)
    reference.py  the unsharded step, recorded on a tape (tape.py) by probes on every module (probes.py)
    bounds.py     how far rounding may go at each site, from the reference's own rounding
    steps.py      the parallel step, once as it is and once replayed module by module on the reference's tensors
    judge.py      one rank's comparisons: its tensor against its part (layouts.py) of the tape's
    replay.py     modules that no hook sees, each called by itself
    findings.py   what the ranks of a stage found; diagnose.py: which mistake a difference looks like
    verdict.py    what all found, as a report.py: rows, the first difference, the table
    prove.py      all of it in order;  rank.py: what every rank of the command runs

Nothing is imported here, so that a command line can be refused before torch is loaded.
"""

import importlib

_NAMES = {"Difference": "report", "Report": "report", "Row": "report", "verify": "entry"}
__all__ = ["Difference", "Report", "Row", "verify"]


def __getattr__(name: str):
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
