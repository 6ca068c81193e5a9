"""Which rank holds which stage, for the schedules with more than one stage on a rank (a chunk is one of them).

looped  3 ranks, 2 chunks: stages 0 1 2 3 4 5 on ranks 0 1 2 0 1 2
folded  3 ranks:           stages 0 1 2 3 4 5 on ranks 0 1 2 2 1 0    a V: rank 0 has the first stage and the last
"""


def looped(ranks: int, chunks: int = 1) -> tuple[int, ...]:
    return tuple(range(ranks)) * chunks


def folded(ranks: int, chunks: int = 2) -> tuple[int, ...]:
    return (*range(ranks), *reversed(range(ranks))) * (chunks // 2)
