"""Our GEMM kernels on a tile of one's choice, past the dispatcher: what is tuned and timed for itself."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tpmp_kernels.kernels import gated_linear, gemm, linear, mlp, tiles, wgrad

# What stands behind the product of each operation when it is tuned: the usual call of a transformer layer.
EPILOGUES = {
    "linear": tiles.Epilogue("gelu", bias=True),
    "gated_linear": tiles.Epilogue("silu"),
    "mlp_dz": tiles.Epilogue("silu", residual=True, preact=True),
    "wgrad": tiles.Epilogue(residual=True),
}


@dataclass(frozen=True)
class Gemm:
    """A result [m, n] = X [m, k] @ W^T of one operation of tiles.OPERATIONS, on random operands of its own."""

    operation: str
    m: int
    n: int
    k: int
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"

    def prepared(self, tile: tiles.Tile, epilogue: tiles.Epilogue) -> tuple[Any, dict[str, Any]]:
        """(kernel, its arguments) on the tile, operands included."""
        return _FORMS[self.operation](self, tile, epilogue)

    def call(self, tile: tiles.Tile, epilogue: tiles.Epilogue | None = None, *, sets: int = 1) -> Callable[[], None]:
        """Launches the kernel, each time on the next of `sets` sets of operands."""
        ready = [self.prepared(tile, EPILOGUES[self.operation] if epilogue is None else epilogue) for _ in range(sets)]
        position = -1

        def launch() -> None:
            nonlocal position
            position = (position + 1) % sets
            kernel, named = ready[position]
            gemm.launch(kernel, named, tile, torch.device(self.device))

        return launch

    def draw(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Random numbers: a chip multiplies zeros at less power and higher clocks. Rows have the size of a layer's."""
        if self.device == "meta":
            return torch.empty(*shape, dtype=dtype or self.dtype, device="meta")
        return torch.randn(*shape, device=self.device).mul_(shape[-1] ** -0.5).to(dtype or self.dtype)


def _linear(g: Gemm, tile: tiles.Tile, e: tiles.Epilogue) -> tuple[Any, dict[str, Any]]:
    x, weight, y = g.draw(g.m, g.k), g.draw(g.n, g.k), g.draw(g.m, g.n)
    bias, residual, z = (g.draw(*s) if wanted else None for s, wanted in (
        ((g.n,), e.bias), ((g.m, g.n), e.residual), ((g.m, g.n), e.preact)))  # fmt: skip
    return linear.linear_kernel, linear.arguments(x, weight, bias, residual, y, z, e.activation, tile)


def _gated_linear(g: Gemm, tile: tiles.Tile, e: tiles.Epilogue) -> tuple[Any, dict[str, Any]]:
    x, w_gate, w_up, y = g.draw(g.m, g.k), g.draw(g.n, g.k), g.draw(g.n, g.k), g.draw(g.m, g.n)
    gate, up = (g.draw(g.m, g.n) if e.preact else None for _ in range(2))
    named = gated_linear.arguments(x, w_gate, w_up, y, gate, up, e.activation, tile)
    return gated_linear.gated_linear_kernel, named


def _mlp_dz(g: Gemm, tile: tiles.Tile, e: tiles.Epilogue) -> tuple[Any, dict[str, Any]]:
    dy, w_down, z, dz = g.draw(g.m, g.k), g.draw(g.k, g.n), g.draw(g.m, g.n), g.draw(g.m, g.n)
    up, dup = (g.draw(g.m, g.n) if e.residual else None for _ in range(2))
    h = g.draw(g.m, g.n) if e.preact else None
    partial = g.draw(-(-g.m // tile.block_m), g.n, dtype=torch.float32) if e.bias else None
    return mlp.mlp_dz_kernel, mlp.arguments(dy, w_down, z, up, dz, dup, h, partial, e.activation, tile)


def _wgrad(g: Gemm, tile: tiles.Tile, e: tiles.Epilogue) -> tuple[Any, dict[str, Any]]:
    x, weight, out = g.draw(g.k, g.m).t(), g.draw(g.k, g.n).t(), g.draw(g.m, g.n, dtype=torch.float32)
    return wgrad.wgrad_kernel, wgrad.arguments(x, weight, out, e.residual, tile)


def fused_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str | None = None
) -> torch.Tensor:
    """act(x @ weight^T + bias) by our kernel on its table's tile, where `ops.linear` might take the library."""
    tile = gemm.own_tile("linear", x, weight, epilogue=tiles.Epilogue(activation, bias is not None))
    y = x.new_empty(x.shape[0], weight.shape[0])
    named = linear.arguments(x, weight, bias, None, y, None, activation, tile)
    gemm.launch(linear.linear_kernel, named, tile, x.device)
    return y


_FORMS = {"linear": _linear, "gated_linear": _gated_linear, "mlp_dz": _mlp_dz, "wgrad": _wgrad}
