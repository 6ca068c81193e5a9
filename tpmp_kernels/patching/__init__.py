"""Swap the ops into one loaded model, and out again: `tpmp_kernels.patch(model)`.

    swap.py     patch: finds, refuses, binds a forward to the instance;  Patched: what was replaced, and undo
    proof.py    a module's own forward against ours, values and gradients, on a twin of a few numbers in fp64
    mlp.py, norm.py, rope.py, head.py    one op each: what it looks for, and the forward that it binds

Nothing is decided by a class's name: modules are recognised by their attributes, and what the proof does not find equal
is left alone and listed with the reason. Classes, modules of other models and their globals are never touched.
"""

from tpmp_kernels.patching.swap import Patched, Site, patch

__all__ = ["Patched", "Site", "patch"]
