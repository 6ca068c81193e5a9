"""Which tile a GEMM runs with: a pure function of the problem, in integers, the same on every rank.

Nothing here is timed: ranks that timed would choose differently, and differ in numerics or deadlock. Standard
library only, so that a planner can ask without Triton.
"""

from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Tile:
    """One program computes block_m x block_n of Y in steps of block_k; group_m row blocks share one sweep of W."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Epilogue:
    """What happens between the accumulator and memory; operands of a full [M, N] cost registers and bandwidth.

    `wide`: fp32 results of a half-precision product. In mlp_dz `bias` is the bias gradient's partial sums, `residual`
    the second factor of a gated MLP, and `preact` the activations made again.
    """

    activation: str | None = None
    bias: bool = False
    residual: bool = False
    preact: bool = False
    wide: bool = False


@dataclass(frozen=True)
class _Candidate:
    """A tile, the cost of one output element in percent of the best tile's, and where it would spill registers.

    `spills`: the epilogues that do not fit its registers; `ragged`: whether it takes an operand whose loads are not
    16 bytes wide and pass through registers. Both as the ahead-of-time tests see them.
    """

    tile: Tile
    percent: int
    spills: tuple[Epilogue, ...] = ()
    ragged: bool = True

    def fits(self, operation: str, dtype: str, arch: int, epilogue: Epilogue, ragged: bool) -> bool:
        if epilogue in self.spills or (ragged and not self.ragged):
            return False
        t, weights = self.tile, 2 if operation == "gated_linear" else 1
        columns = t.block_m + weights * t.block_n
        return t.num_stages * columns * t.block_k * _ITEMSIZE[dtype] <= shared_limit(arch)


_ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}

# With nothing else in the epilogue the compiler runs an activation on all parts of the accumulator at once (gelu on
# Triton 3.6, the other two on 3.9).
_SMOOTH_ALONE = (Epilogue("gelu"), Epilogue("gelu_tanh"), Epilogue("silu"))
# Two fp32 results and an fp32 residual.
_ALL_WIDE = tuple(
    Epilogue(activation, bias, residual=True, preact=True, wide=True)
    for activation in (None, "gelu", "gelu_tanh", "silu", "relu", "relu2")
    for bias in (False, True)
)

# A small tile reloads its operands more often; it wins only where it wastes less of the last wave. 64 rows are the
# least that WGMMA takes.
_HALF = (
    _Candidate(Tile(128, 256, 64, 8, 8, 4), 100, spills=_SMOOTH_ALONE + _ALL_WIDE, ragged=False),
    _Candidate(Tile(128, 128, 64, 8, 8, 4), 108),
    _Candidate(Tile(64, 128, 64, 8, 4, 4), 130, ragged=False),
    _Candidate(Tile(64, 64, 64, 8, 4, 4), 170),
)
# Two accumulators, or an epilogue with several operands of a full [M, N], leave no registers for 256 columns.
_HALF_MLP = (
    _Candidate(Tile(128, 128, 64, 8, 8, 4), 108),
    _Candidate(Tile(64, 128, 64, 8, 8, 4), 130),
    _Candidate(Tile(64, 64, 64, 8, 8, 4), 170),
)
_HALF_GATED = (
    _Candidate(Tile(128, 128, 64, 8, 8, 4), 108, ragged=False),
    _Candidate(Tile(64, 128, 64, 8, 8, 4), 130, ragged=False),
    _Candidate(Tile(64, 64, 64, 8, 8, 4), 170),
)
# IEEE fp32 products run on the CUDA cores: the accumulator is what limits the tile.
_SINGLE = (
    _Candidate(Tile(128, 64, 16, 8, 8, 3), 100),
    _Candidate(Tile(64, 64, 16, 8, 4, 3), 112),
    _Candidate(Tile(32, 64, 16, 8, 4, 3), 160),
)
_SINGLE_NARROW = (
    _Candidate(Tile(64, 64, 16, 8, 8, 3), 112),
    _Candidate(Tile(32, 64, 16, 8, 4, 3), 160, ragged=False),
)
_CANDIDATES = {
    "linear": {"half": _HALF, "fp32": _SINGLE},
    "gated_linear": {"half": _HALF_GATED, "fp32": _SINGLE_NARROW},
    "wgrad": {"half": _HALF, "fp32": _SINGLE},
    "mlp_dz": {"half": _HALF_MLP, "fp32": _SINGLE_NARROW},
}
OPERATIONS = tuple(_CANDIDATES)
# The axes that are adjacent in memory in each operation's operands: a transposed operand's is its row.
_ADJACENT = {"linear": "k", "gated_linear": "k", "wgrad": "mn", "mlp_dz": "kn"}

# Shared memory that one block may use, by compute capability (CUDA programming guide, table of technical data).
_SHARED = {80: 166_912, 86: 101_376, 87: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 103: 232_448}
_SHARED_LEAST = 101_376


def shared_limit(arch: int) -> int:
    """Bytes of shared memory that one thread block may use on compute capability `arch` (90 for sm_90)."""
    return _SHARED.get(arch, _SHARED_LEAST)


def shipped(operation: str, m: int, n: int, k: int, dtype: str, *, arch: int, epilogue: Epilogue) -> list[Tile]:
    """Every tile that `tile` can return for such a problem: what the ahead-of-time tests compile."""
    return [each.tile for each in _fitting(operation, m, n, k, dtype, arch, epilogue)]


@lru_cache(maxsize=4096)
def tile(
    operation: str, m: int, n: int, k: int, dtype: str, *, arch: int, sms: int, epilogue: Epilogue, triton_version: str
) -> Tile:
    """The tile for a result [m, n] = X [m, k] @ W^T in dtype "bf16" | "fp16" | "fp32" on `sms` multiprocessors.

    The least of waves x work per wave, where a wave is one tile on every multiprocessor; ties go to the larger tile.
    `operation` is one of OPERATIONS. Today's candidates serve every Triton version; it is an argument because a tuned
    table depends on it.
    """

    def cost(candidate: _Candidate) -> tuple[int, int]:
        area = candidate.tile.block_m * candidate.tile.block_n
        tiles = -(-m // candidate.tile.block_m) * -(-n // candidate.tile.block_n)
        return -(-tiles // sms) * area * candidate.percent, -area

    return min(_fitting(operation, m, n, k, dtype, arch, epilogue), key=cost).tile


def _fitting(operation: str, m: int, n: int, k: int, dtype: str, arch: int, epilogue: Epilogue) -> list[_Candidate]:
    size = {"m": m, "n": n, "k": k}
    ragged = any(size[axis] * _ITEMSIZE[dtype] % 16 for axis in _ADJACENT[operation])
    candidates = _CANDIDATES[operation]["fp32" if dtype == "fp32" else "half"]
    return [each for each in candidates if each.fits(operation, dtype, arch, epilogue, ragged)]
