"""How the heads of grouped-query attention are cut over ranks, also where there are fewer key and value heads than
ranks."""

from typing import NamedTuple

from tpmp_kernels.comm.communicator import Communicator
from tpmp_kernels.tensor_parallel.shard import shard_size


class HeadShard(NamedTuple):
    """Of one rank: its query heads and its key and value heads; the neighbouring ranks that hold the same of these."""

    heads: int
    kv_heads: int
    replicas: int


def head_shard(heads: int, kv_heads: int, comm: Communicator) -> HeadShard:
    """Rank r holds query heads r heads/R .. and, where kv_heads < R, the one key and value head r kv_heads // R.

    ValueError where R does not divide heads, or neither of kv_heads and R divides the other.
    """
    own = shard_size(heads, comm.size, "heads")
    if kv_heads % comm.size and comm.size % kv_heads:
        allowed = [r for r in range(1, heads + 1) if heads % r == 0 and (kv_heads % r == 0 or r % kv_heads == 0)]
        raise ValueError(
            f"kv_heads is {kv_heads} and tp={comm.size}, neither divides the other; use tp in {allowed} or change "
            "kv_heads"
        )
    return HeadShard(own, max(1, kv_heads // comm.size), max(1, comm.size // kv_heads))
