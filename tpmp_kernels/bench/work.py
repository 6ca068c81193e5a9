"""What one call does, for rates: floating-point operations of a GEMM, bytes of a transfer."""


def gemm_flop(m: int, n: int, k: int) -> int:
    return 2 * m * n * k


def bus_bytes(kind: str, nbytes: int, ranks: int) -> float:
    """Bytes of one call that cross the slowest link of the best algorithm, as nccl-tests defines busbw.

    `nbytes` is the size of the call's larger tensor: the whole of an all_gather or a reduce_scatter.
    """
    part = (ranks - 1) / ranks
    factors = {"all_reduce": 2 * part, "all_gather": part, "reduce_scatter": part, "all_to_all": part}
    factors |= {"broadcast": 1.0, "send": 1.0}
    if kind not in factors:
        raise ValueError(f"bus_bytes: kind is {kind!r}; pass one of {', '.join(sorted(factors))}")
    return factors[kind] * nbytes
