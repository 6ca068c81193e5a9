"""The GEMMs of a loss on slices of the vocabulary: z = x @ W_s^T, dx += d @ W_s, dW_s = d^T @ x or += it.

Logits and dx are fp32 (fp64 for fp64). On CUDA operands keep their dtype, and of logits that are not to be kept one
kernel makes the statistics, of the whole vocabulary at once, or d: they are never stored. On the CPU, where torch has
no half-precision GEMM with an fp32 result, each slice is widened and multiplied in fp32; only where bf16 GEMMs are the
faster ones are they used, and the logits, like those of F.linear, rounded to bf16.
"""

import torch
from torch import Tensor

from tpmp_kernels.ops import backend, vocab
from tpmp_kernels.ops.plain import fast_bf16

# Elements of a slice of logits, and its narrowest and widest: on the CPU 16 MiB in fp32, for the third-level cache; on
# CUDA 256 MiB. Narrower slices would cost the GEMMs more than smaller ones save.
_SLICES = {"cpu": (1 << 22, 256, 2048), "cuda": (1 << 26, 1024, 16384)}


class Products:
    """For at most `tokens` rows of features at a time.

    A slice has the same shapes in every pass, and so the same bits wherever the logits are stored.
    """

    def __init__(self, x: Tensor, weight: Tensor, tokens: int):
        self.weight = weight
        self.triton = backend.choose(x) == "triton"
        self.wide = torch.promote_types(x.dtype, torch.float32)
        keeps = self.triton or (x.device.type == "cpu" and x.dtype is torch.bfloat16 and fast_bf16())
        self.dtype = x.dtype if keeps else self.wide
        elements, least, most = _SLICES["cuda" if x.is_cuda else "cpu"]
        self.width = max(least, min(most, elements // max(tokens, 1) // 64 * 64))
        self.tokens = tokens
        self._buffers: dict[tuple, Tensor] = {}
        self._widened: slice | None = None

    def slices(self) -> list[slice]:
        classes = self.weight.shape[0]
        return [slice(left, min(left + self.width, classes)) for left in range(0, classes, self.width)]

    def operand(self, x: Tensor) -> Tensor:
        """Features as the other calls take them."""
        return x.to(self.dtype).contiguous()

    def add_statistics(self, found: vocab.Statistics, x: Tensor, first: int) -> None:
        """Of all logits, the ids from `first` on, none of which are kept."""
        if not self.triton:
            for ids in self.slices():
                found.add(self.logits(x, ids, keep=False), first + ids.start)
        elif self.weight.shape[0] > 0:
            found.add_product(x, self.weight, first)

    def gradient(self, gradient: vocab.Gradient, x: Tensor, ids: slice, first: int) -> Tensor:
        """d [T, C] of a slice as the other calls take it, from logits that are made again; the ids from `first` on."""
        if self.triton:
            return gradient.of_product(x, self.weight[ids], first + ids.start)
        return self.gradient_of(gradient, self.logits(x, ids, keep=False), first + ids.start)

    def gradient_of(self, gradient: vocab.Gradient, z: Tensor, first: int) -> Tensor:
        """d of the logits z [T, C] of the ids from `first` on; over them, unless the GEMMs take another dtype."""
        d = z if z.dtype == self.dtype else z.new_empty(z.shape, dtype=self.dtype)
        gradient.put(d, z, first)
        return d

    def logits(self, x: Tensor, ids: slice, *, keep: bool) -> Tensor:
        """z [T, C] of a slice, in a buffer that the next slice takes over unless they are to be kept."""
        if self.triton:
            from tpmp_kernels.kernels.linear import linear

            return linear(x, self.weight[ids], out_dtype=self.wide)[0]
        z = self._buffer(("logits", ids.start if keep else 0), x.shape[0], ids.stop - ids.start)
        return torch.mm(x, self._rows(ids).t(), out=z)

    def add_dx(self, dx: Tensor, d: Tensor, ids: slice) -> None:
        """dx [T, D] += d [T, C] @ W_s, in the wide dtype."""
        if self.dtype == self.wide:
            dx.addmm_(d, self._rows(ids))
        elif self.triton:
            from tpmp_kernels.kernels.wgrad import accumulate

            accumulate(d, self.weight[ids].t(), dx, add=True)
        else:
            dx.add_(torch.mm(d, self._rows(ids), out=self._buffer(("dx",), *dx.shape)))

    def put_dweight(self, dweight: Tensor, d: Tensor, x: Tensor, ids: slice, *, add: bool) -> None:
        """dweight [V_r, D] in the slice: d^T @ x, or with `add` += that. Its dtype is the weight's or the wide one."""
        rows = dweight[ids]
        if rows.dtype == self.dtype:
            rows.addmm_(d.t(), x) if add else torch.mm(d.t(), x, out=rows)
        elif self.triton:
            from tpmp_kernels.kernels.wgrad import wgrad

            wgrad(d, x, rows, add=add)
        else:
            product = self._buffer(("dweight",), *rows.shape)
            if add and product.dtype == self.wide:
                rows.copy_(product.copy_(rows).addmm_(d.t(), x))
            else:
                torch.mm(d.t(), x, out=product)
                rows.add_(product) if add else rows.copy_(product)

    def _rows(self, ids: slice) -> Tensor:
        rows = self.weight[ids]
        if rows.dtype == self.dtype:
            return rows
        widened = self._buffer(("weight",), *rows.shape)
        if self._widened != ids:
            widened.copy_(rows)
            self._widened = ids
        return widened

    def _buffer(self, name: tuple, rows: int, columns: int) -> Tensor:
        """Memory of this call, used again: new pages would cost as much as a pass over them."""
        held = self._buffers.get(name)
        if held is None or held.numel() < rows * columns:
            held = self._buffers[name] = torch.empty(rows * columns, dtype=self.dtype, device=self.weight.device)
        return held[: rows * columns].view(rows, columns)
