"""Our kernel, or cuBLASLt with the rest in passes of their own: a pure function of the problem, the same on every rank.

cuBLASLt wins where nothing stands behind the product that it cannot fuse itself, and where K is so large that a pass
over the result costs less than the few percent by which its GEMM is the faster one (K = 8192: one pass is 4.5 %).
Estimated in nanoseconds from the chip's rates in tables/: integers, and no clock. Standard library only.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

from tpmp_kernels.kernels import tiles

# What cuBLASLt computes behind its product besides the bias: torch._addmm_activation, on CUDA the tanh form of gelu.
LIBRARY_ACTIVATIONS = ("relu", "gelu_tanh")
# What no library call does without several more passes.
_OURS_ALONE = {
    "mlp_dz": "writes dz, its bias gradient and the activations made again in one epilogue",
    "wgrad": "adds to fp32 in its epilogue",
}
_LAUNCH = 2_000  # ns from the end of one kernel to the start of the next on one stream


@dataclass(frozen=True)
class Choice:
    """How one product and what stands behind it runs: on `tile`, or by the library where that is None.

    `ours` and `library`: estimates in ns, None where only one of them can; `passes`: kernels that the library needs
    after its product; `reason`: in one sentence.
    """

    operation: str
    m: int
    n: int
    k: int
    tile: tiles.Tile | None
    ours: int
    library: int | None
    passes: int
    reason: str

    def __str__(self) -> str:
        shape = f"{self.operation} {self.m}x{self.n}x{self.k}"
        if self.tile is None:
            way = "torch's GEMM" + (f" and {self.passes} pass{'es' * (self.passes > 1)}" if self.passes else "")
        else:
            t = self.tile
            way = f"Triton {t.block_m}x{t.block_n}x{t.block_k}, {t.num_stages} stages, {t.num_warps} warps, {t.loads}"
            way += ", persistent" * t.persistent
        return f"{shape}: {way}; {self.reason}"


@lru_cache(maxsize=4096)
def choose(
    operation: str,
    m: int,
    n: int,
    k: int,
    dtype: str,
    *,
    arch: str,
    sms: int,
    epilogue: tiles.Epilogue,
    triton_version: str,
    aligned: bool = True,
) -> Choice:
    """The choice for a result [m, n] of linear, gated_linear, mlp_dz or wgrad; arguments as for `tiles.tile`."""
    tile = tiles.tile(
        operation, m, n, k, dtype, arch=arch, sms=sms, epilogue=epilogue, triton_version=triton_version, aligned=aligned
    )
    chip = tiles.chip(tiles.table(arch))
    products = 2 if operation == "gated_linear" else 1
    gemm = products * _waves(m, n, tile, sms) * tile.block_m * tile.block_n * sms * 2 * k // (1000 * chip.tflops)
    ours = gemm * 100 // chip.of_library + _bytes_fused(operation, epilogue) * m * n // chip.gbytes + _LAUNCH
    own = Choice(operation, m, n, k, tile, ours, None, 0, "")
    if dtype == "fp32":
        return replace(own, reason="fp32 in IEEE arithmetic, whatever torch's switch for TF32 says")
    if operation in _OURS_ALONE:
        return replace(own, reason=_OURS_ALONE[operation])
    if epilogue.wide:
        return replace(own, reason="an fp32 result of a half-precision product")
    passes, nbytes = _passes(operation, epilogue)
    library = gemm + (products - 1) * _LAUNCH + passes * _LAUNCH + nbytes * m * n // chip.gbytes + _LAUNCH
    both = replace(own, library=library, passes=passes)
    if passes == 0:
        return replace(both, tile=None, reason="it fuses all that stands behind the product")
    saved = f"{passes} pass{'es' * (passes > 1)} over the result" + f", {nbytes} bytes an element,"
    if library < ours:
        return replace(both, tile=None, reason=f"{saved} cost less than the faster GEMM gains ({library} < {ours} ns)")
    return replace(both, reason=f"{saved} would cost more than a faster GEMM gains ({ours} <= {library} ns)")


def _waves(m: int, n: int, tile: tiles.Tile, sms: int) -> int:
    return -(-(-(-m // tile.block_m) * -(-n // tile.block_n)) // sms)


def _bytes_fused(operation: str, epilogue: tiles.Epilogue) -> int:
    """Bytes of half precision that an epilogue moves for each element beside the result itself."""
    if operation == "gated_linear":
        return 4 * epilogue.preact
    return 2 * epilogue.residual + 2 * epilogue.preact


def _passes(operation: str, epilogue: tiles.Epilogue) -> tuple[int, int]:
    """(passes, bytes an element that they move) of the library's way; the product itself writes its result."""
    if operation == "gated_linear":
        return 1, 2 + 4  # the products write gate and up: one write more than fused; the pass reads two, writes one
    activation = epilogue.activation is not None
    alone = epilogue.bias and not epilogue.preact and not epilogue.residual
    if alone and epilogue.activation in LIBRARY_ACTIVATIONS:
        return 0, 0
    return activation + epilogue.residual, 4 * activation + 6 * epilogue.residual
