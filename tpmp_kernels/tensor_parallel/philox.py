"""Random numbers as a function of their place: Philox 4x32-10 in plain torch integers.

    for row, words in matrix_words(seed, stream, rows=range(8, 16), columns=range(64), width=64):
        ...                                     # words [n, 64] of rows row .. row + n - 1, each below 2^32

Nothing but (seed, stream, row, column) goes in, so that the bits are the same on every device, for every shard and in
every order of calls. Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011: ten rounds,
three more than BigCrush asks for; tests hold it to the known answers of their Random123. `tl.philox` is the same
generator.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # the golden ratio and sqrt(3) - 1
_ROUNDS = 10
# Counters that are computed together: the four words and two products stay in a core's second-level cache. A GPU
# wants few launches instead.
_BLOCK = {"cpu": 2**15}
_BLOCK_ELSEWHERE = 2**22


def philox(key: tuple[int, int], counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The four words of each counter, int64 tensors of values below 2^32, which are overwritten."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    # Products wrap around at 2^64 and their sign bit is the top bit, which is right once the upper half is masked. The
    # lower halves keep the upper ones in front of them until they are masked as part of the next round.
    p0, p1 = torch.empty_like(c0), torch.empty_like(c0)
    for _ in range(_ROUNDS):
        torch.mul(c0, _MULTIPLIERS[0], out=p0)
        torch.mul(c2, _MULTIPLIERS[1], out=p1)
        torch.bitwise_right_shift(p1, 32, out=c0).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(WORD)
        torch.bitwise_right_shift(p0, 32, out=c2).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(WORD)
        c1, c3, p0, p1 = p1, p0, c3, c1
        k0, k1 = (k0 + _WEYL[0]) & WORD, (k1 + _WEYL[1]) & WORD
    return c0, c1.bitwise_and_(WORD), c2, c3.bitwise_and_(WORD)


def matrix_words(
    seed: int, stream: tuple[int, int, int], *, rows: range, columns: range, width: int, device: torch.device | str
) -> Iterator[tuple[int, Tensor]]:
    """(first row, words [n, len(columns)]) for blocks of the `rows` of a matrix of `width` columns.

    seed: below 2^64. stream: below 2^16, 2^32 and 2^32; two streams share no counter. A counter serves four neighbours
    in a row. Memory is that of one block, but at least of one row.
    """
    quads, first = -(-width // 4), columns.start // 4
    inner = torch.arange(first, -(-columns.stop // 4), device=device)
    step = max(1, _BLOCK.get(torch.device(device).type, _BLOCK_ELSEWHERE) // max(1, len(inner)))
    key = (seed & WORD, seed >> 32 & WORD)
    for start in range(rows.start, rows.stop, step):
        outer = torch.arange(start, min(start + step, rows.stop), device=device)
        index = outer.unsqueeze(1) * quads + inner
        high = (index >> 32).add_(stream[0] << 16)
        words = philox(key, (index & WORD, high, torch.full_like(index, stream[1]), torch.full_like(index, stream[2])))
        left = columns.start - 4 * first
        yield start, torch.stack(words, -1).flatten(1)[:, left : left + len(columns)]
