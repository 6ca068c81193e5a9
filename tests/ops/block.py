"""One transformer layer's worth of ops as a module, for tests of a whole block."""

from torch import Tensor, nn

from tpmp_kernels import ops


class Block(nn.Module):
    def __init__(self, hidden: int = 8, inner: int = 12):
        super().__init__()
        self.norm = nn.RMSNorm(hidden)
        self.qkv = nn.Linear(hidden, hidden)
        self.gate, self.up = nn.Linear(hidden, inner, bias=False), nn.Linear(hidden, inner, bias=False)
        self.down = nn.Linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        h = ops.linear(x, self.qkv.weight, self.qkv.bias, activation="gelu")
        h, stream = ops.rms_norm(h, self.norm.weight, residual=x)
        h = ops.gated_linear(h, self.gate.weight, self.up.weight)
        return ops.linear(h, self.down.weight, self.down.bias, residual=stream)
