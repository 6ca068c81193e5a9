"""What every kernel compiled ahead of time must satisfy."""

from tpmp_kernels.kernels import aot


def assert_no_spill(built: aot.Compiled) -> None:
    spills = built.count("LDL") + built.count("STL")
    assert (built.stack, spills) == (0, 0), f"spills: stack {built.stack} B, {spills} local accesses"
