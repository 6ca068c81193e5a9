"""Linear layers cut along one axis of the weight, W [N, K], Y = X @ W^T.

| layer  | weight             | input               | output              | forward            | backward            |
| ------ | ------------------ | ------------------- | ------------------- | ------------------ | ------------------- |
| column | W_shard_n [N/R, K] | X [.., K]           | Y_shard_n [.., N/R] |                    | dX all-reduced      |
| row    | W_shard_k [N, K/R] | X_shard_k [.., K/R] | Y [.., N]           | Y all-reduced      |                     |
| column | W_shard_n [N/R, K] | X_shard_m [M/R, K]  | Y_shard_n [M, N/R]  | X gathered         | dX reduce-scattered |
| row    | W_shard_k [N, K/R] | X_shard_k [M, K/R]  | Y_shard_m [M/R, N]  | Y reduce-scattered | dY gathered         |

The lower two are those of sequence parallelism: what lies between the pairs is cut along the flattened tokens.
A column layer followed by a row layer needs one all-reduce forward and one backward for the pair (Megatron-LM, arXiv
1909.08053); under sequence parallelism the same bytes move, and norms, dropout and residuals between the pairs take 1/R
of the time and memory (arXiv 2205.05198). Layers that read the same X are called together: see column.py.

overlap of a layer: "none", "chunked" or "auto", what its collective does under its GEMM (comm/overlap, which `rates`,
those of overlap.calibrate, tell how fast things are). Chunked products have other shapes and may round differently.
"""

from torch import Tensor, nn

from tpmp_kernels import ops
from tpmp_kernels.comm import autograd, overlap
from tpmp_kernels.comm.communicator import Communicator
from tpmp_kernels.comm.overlap import Rates
from tpmp_kernels.tensor_parallel.column import column_linears, gathered_output
from tpmp_kernels.tensor_parallel.shard import ShardedModule, shard_parameter


class ColumnParallelLinear(ShardedModule):
    """Y_shard_n [.., N/R] = act(X [.., K] @ W_shard_n^T + b_shard_n). ValueError where R does not divide N.

    gather_output: return Y [.., N]. input_is_copied: x comes whole from a copy or gather that the caller put in front,
    which also sums its gradient. replicas: neighbouring ranks that hold the same columns, of N / (R / replicas); their
    gradients are partial sums, see gradients.py. overlap "chunked": ValueError with an activation, which would lose its
    place in the GEMM's epilogue ("auto" is then "none"), and with input_is_copied.
    """

    overlap, rates = "none", None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        comm: Communicator,
        *,
        bias: bool = False,
        activation: str | None = None,
        gather_output: bool = False,
        input_is_copied: bool = False,
        sequence_parallel: bool = False,
        replicas: int = 1,
        overlap: str = "none",
        rates: Rates | None = None,
        dtype=None,
        device=None,
    ):
        super().__init__()
        _check_overlap("ColumnParallelLinear", overlap)
        if overlap == "chunked" and (activation is not None or input_is_copied):
            raise ValueError(
                'ColumnParallelLinear: overlap "chunked" cannot have an activation in the GEMM\'s epilogue, nor a copy '
                "made by the caller; put the activation behind the layer, or use overlap auto or none"
            )
        if gather_output and replicas > 1:
            raise ValueError(
                f"ColumnParallelLinear: gather_output would repeat columns that {replicas} ranks share; keep the "
                "output sharded, or use replicas=1"
            )
        self.comm, self.activation, self.gather_output = comm, activation, gather_output
        self.input_is_copied, self.sequence_parallel = input_is_copied, sequence_parallel
        self.overlap, self.rates = overlap, rates
        cut = {"axis": "out_features", "replicas": replicas, "dtype": dtype, "device": device}
        self.weight = shard_parameter((out_features, in_features), 0, comm, **cut)
        self.bias = shard_parameter((out_features,), 0, comm, **cut) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if not self.input_is_copied:
            return column_linears(x, [self])[0]
        return gathered_output(ops.linear(x, self.weight, self.bias, activation=self.activation), self)


class RowParallelLinear(ShardedModule):
    """Y [.., N] = sum over ranks of X_shard_k [.., K/R] @ W_shard_k^T, plus b. ValueError where R does not divide K.

    input_is_parallel: x is X_shard_k; otherwise it is the whole X, of which each rank takes its shard.
    sequence_parallel: return Y_shard_m [M/R, N]; ValueError where R does not divide the M tokens of x.
    """

    overlap, rates = "none", None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        comm: Communicator,
        *,
        bias: bool = False,
        input_is_parallel: bool = True,
        sequence_parallel: bool = False,
        overlap: str = "none",
        rates: Rates | None = None,
        dtype=None,
        device=None,
    ):
        super().__init__()
        _check_overlap("RowParallelLinear", overlap)
        self.overlap, self.rates = overlap, rates
        self.comm, self.input_is_parallel, self.sequence_parallel = comm, input_is_parallel, sequence_parallel
        cut = {"axis": "in_features", "dtype": dtype, "device": device}
        self.weight = shard_parameter((out_features, in_features), 1, comm, **cut)
        self.bias = nn.Parameter(self.weight.new_empty(out_features)) if bias else None
        if bias and sequence_parallel:
            self.bias.tp_partial_grad = comm.size

    def forward(self, x: Tensor) -> Tensor:
        if not self.input_is_parallel:
            x = autograd.split(x, self.comm, dim=-1, tag="row.input")
        y = self._reduced(x)
        # Behind the reduction: added in front of it the bias would count once for every rank.
        return y if self.bias is None else y + self.bias

    def _reduced(self, x: Tensor) -> Tensor:
        if self.overlap == "none":
            return reduce_output(ops.linear(x, self.weight), self.comm, self.sequence_parallel, tag="RowParallelLinear")
        how = {"mode": self.overlap, "rates": self.rates, "tag": "RowParallelLinear"}
        if not self.sequence_parallel:
            return overlap.linear_all_reduce(x, self.weight, self.comm, **how)
        return overlap.linear_reduce_scatter(x.flatten(0, -2), self.weight, self.comm, **how)


def _check_overlap(layer: str, mode: str) -> None:
    if mode not in overlap.MODES:
        raise ValueError(f"{layer}: overlap is {mode!r}; pass one of {', '.join(overlap.MODES)}")


def reduce_output(y: Tensor, comm: Communicator, sequence_parallel: bool, *, tag: str) -> Tensor:
    """The sum of y [.., N] over the ranks, or under sequence parallelism this rank's tokens of it, [M/R, N]."""
    if not sequence_parallel:
        return autograd.all_reduce(y, comm, tag=tag)
    y = y.reshape(y.shape[:-1].numel(), y.shape[-1])
    if len(y) % comm.size:
        raise ValueError(
            f"{tag}: {len(y)} tokens cannot be cut over tp={comm.size} by sequence parallelism; pad the batch to "
            f"{-(-len(y) // comm.size) * comm.size} tokens, or make the layer without sequence_parallel"
        )
    return autograd.reduce_scatter(y, comm, tag=tag)
