"""What every kernel compiled ahead of time must satisfy."""

from tpmp_kernels.kernels import aot


def assert_no_spill(built: aot.Compiled) -> None:
    spills = built.count("LDL") + built.count("STL")
    assert (built.stack, spills) == (0, 0), f"spills: stack {built.stack} B, {spills} local accesses"


def assert_wide(built: aot.Compiled) -> None:
    """A pass over memory moves 16 bytes at a time: by less it cannot reach the bandwidth of a copy."""
    for way in ("LDG", "STG"):
        assert built.count(rf"{way}\.E\S*\.128") > 0, f"no {way} of 16 bytes"
