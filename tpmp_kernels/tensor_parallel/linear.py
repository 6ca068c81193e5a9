"""Linear layers cut along one axis of the weight, W [N, K], Y = X @ W^T.

| layer  | weight            | input            | output                      | communication                      |
| ------ | ----------------- | ---------------- | --------------------------- | ---------------------------------- |
| column | W_shard_n [N/R,K] | X [.., K]        | Y_shard_n [.., N/R]         | backward: dX all-reduced           |
| row    | W_shard_k [N,K/R] | X_shard_k [..,K/R] | Y [.., N], whole everywhere | forward: partial Y all-reduced     |

A column layer followed by a row layer needs one all-reduce forward and one backward for the pair (Megatron-LM, arXiv
1909.08053). Layers that read the same X (q, k, v; gate, up) share one `comm.autograd.copy` in front of them, so that
their input gradients are added locally and reduced once: they take `input_is_copied=True`.
"""

from torch import Tensor, nn

from tpmp_kernels import ops
from tpmp_kernels.comm import autograd
from tpmp_kernels.comm.communicator import Communicator
from tpmp_kernels.tensor_parallel.shard import shard_parameter


class ColumnParallelLinear(nn.Module):
    """Y_shard_n [.., N/R] = act(X [.., K] @ W_shard_n^T + b_shard_n). ValueError where R does not divide N."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        comm: Communicator,
        *,
        bias: bool = False,
        activation: str | None = None,
        input_is_copied: bool = False,
        dtype=None,
        device=None,
    ):
        super().__init__()
        self.comm, self.activation, self.input_is_copied = comm, activation, input_is_copied
        cut = {"axis": "out_features", "dtype": dtype, "device": device}
        self.weight = shard_parameter((out_features, in_features), 0, comm, **cut)
        self.bias = shard_parameter((out_features,), 0, comm, **cut) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if not self.input_is_copied:
            x = autograd.copy(x, self.comm, tag="column")
        return ops.linear(x, self.weight, self.bias, activation=self.activation)


class RowParallelLinear(nn.Module):
    """Y [.., N] = sum over ranks of X_shard_k [.., K/R] @ W_shard_k^T, plus b. ValueError where R does not divide K."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        comm: Communicator,
        *,
        bias: bool = False,
        dtype=None,
        device=None,
    ):
        super().__init__()
        self.comm = comm
        cut = {"axis": "in_features", "dtype": dtype, "device": device}
        self.weight = shard_parameter((out_features, in_features), 1, comm, **cut)
        self.bias = nn.Parameter(self.weight.new_empty(out_features)) if bias else None

    def forward(self, x_shard_k: Tensor) -> Tensor:
        y = autograd.all_reduce(ops.linear(x_shard_k, self.weight), self.comm, tag="row")
        # Behind the reduction: added in front of it the bias would count once for every rank.
        return y if self.bias is None else y + self.bias
