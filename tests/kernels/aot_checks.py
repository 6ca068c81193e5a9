"""What every kernel compiled ahead of time must satisfy."""

from tpmp_kernels.kernels import aot

# Bytes of a thread's stack that may be written and read again once a tile: 16 registers.
ONCE = 64


def assert_no_spill(built: aot.Compiled) -> None:
    """Nothing goes to memory and back within an innermost loop, and little of it outside."""
    within, spills = (count("LDL") + count("STL") for count in (built.count_in_loops, built.count))
    text = f"spills: stack {built.stack} B, {spills} local accesses, {within} of them in an innermost loop"
    assert within == 0 and built.stack <= (0 if built.arch.startswith("gfx") else ONCE), text


def assert_wide(built: aot.Compiled) -> None:
    """A pass over memory moves 16 bytes at a time: by less it cannot reach the bandwidth of a copy."""
    for way in ("LDG", "STG"):
        assert built.count(rf"{way}\.E\S*\.128") > 0, f"no {way} of 16 bytes"
