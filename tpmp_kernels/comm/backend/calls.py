"""The calls of c10d in terms of communicator.py: what group.py's group is asked by torch.

torch finds the methods by name from Python and, for those that C++ code calls (DDP, functional collectives), through a
trampoline. torch 2.13 renamed some; both names are here. Whatever the communicator does not carry goes to the group
beside, which holds torch's own backends: CUDA tensors to NCCL, the reductions BAND, BOR and BXOR to gloo, which
refuses PREMUL_SUM by name.
"""

import contextlib
import inspect
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

from tpmp_kernels.comm.backend.work import COMPLETED
from tpmp_kernels.comm.communicator import Communicator, Work
from tpmp_kernels.errors import UsageError

_SUM = dist.ReduceOp.SUM
_OPS = {
    _SUM: "sum",
    dist.ReduceOp.AVG: "avg",
    dist.ReduceOp.MAX: "max",
    dist.ReduceOp.MIN: "min",
    dist.ReduceOp.PRODUCT: "prod",
}
_BOOL_OPS = {"sum": "max", "prod": "min"}  # of bytes that are 0 or 1: or, and
_ALL_TO_ALL = c10d.AllToAllOptions()
_ALLGATHER = c10d.AllgatherOptions()
_ALLREDUCE = c10d.AllreduceOptions()
_ALLREDUCE_COALESCED = c10d.AllreduceCoalescedOptions()
_BARRIER = c10d.BarrierOptions()
_BROADCAST = c10d.BroadcastOptions()
_GATHER = c10d.GatherOptions()
_REDUCE = c10d.ReduceOptions()
_REDUCE_SCATTER = c10d.ReduceScatterOptions()
_SCATTER = c10d.ScatterOptions()
_SEND, _RECV = (inspect.unwrap(function).__code__ for function in (dist.send, dist.recv))


class BackendCalls(dist.ProcessGroup):
    """Every call takes `opts` also as a keyword. Its Work is complete where `opts.asyncOp` is false."""

    comm: Communicator  # carries CPU tensors
    _beside: dist.ProcessGroup  # carries the others

    @abstractmethod
    def _carry(self, opts, tensors: Sequence[torch.Tensor], call: Callable, *args, landed: Callable | None = None):
        """Make `call(*args)` of the communicator, then `landed()`; the Work knows `tensors` as its result."""

    @abstractmethod
    def _carry_all(self, opts, tensors: Sequence[torch.Tensor], call: Callable, calls: Iterable[tuple], landed=None):
        """The same for several calls of one kind under one Work."""

    @abstractmethod
    def _posted(self, posted: list[Work], tensors: Sequence[torch.Tensor], landed=None, lane=..., source=None):
        """The Work of what was posted. The works of a lane complete in order; `source` of a receive."""

    # ---- reductions

    def allreduce(self, tensors, opts=_ALLREDUCE):
        tensor, op = _reducible(_only("allreduce", tensors), opts)
        if op is None:
            return self._beside.allreduce(tensors, opts)
        return self._carry(opts, tensors, self.comm.all_reduce, tensor, op)

    def allreduce_coalesced(self, tensors, opts=_ALLREDUCE_COALESCED):
        calls = [_reducible(tensor, opts) for tensor in tensors]
        if any(op is None for _, op in calls):
            return self._beside.allreduce_coalesced(tensors, opts)
        return self._carry_all(opts, tensors, self.comm.all_reduce, calls)

    def reduce(self, tensors, opts=_REDUCE):
        tensor, op = _reducible(_only("reduce", tensors), opts)
        if op is None:
            return self._beside.reduce(tensors, opts)
        return self._carry(opts, tensors, self.comm.reduce, tensor, opts.rootRank, op)

    def reduce_scatter_single(self, output, input, opts=_REDUCE_SCATTER):
        source, op = _reducible(input, opts)
        if op is None:
            return self._beside._reduce_scatter_base(output, input, opts)
        return self._carry(opts, [output], self.comm.reduce_scatter, _bytes(output), source, op)

    def reduce_scatter(self, outputs, inputs, opts=_REDUCE_SCATTER):
        output, parts = _only("reduce_scatter", outputs), _only("reduce_scatter", inputs)
        if not output.is_cpu or _op(opts) is None:
            return self._beside.reduce_scatter(outputs, inputs, opts)
        source, op = _reducible(_joined("reduce_scatter", parts), opts)
        return self._carry(opts, [output], self.comm.reduce_scatter, _bytes(output), source, op)

    def reduce_scatter_single_coalesced(self, outputs, inputs, opts=_REDUCE_SCATTER):
        sources = [_reducible(tensor, opts) for tensor in inputs]
        if any(op is None for _, op in sources):
            return self._beside.reduce_scatter_tensor_coalesced(outputs, inputs, opts)
        calls = [(_bytes(output), source, op) for output, (source, op) in zip(outputs, sources, strict=True)]
        return self._carry_all(opts, outputs, self.comm.reduce_scatter, calls)

    # ---- movement

    def broadcast(self, tensors, opts=_BROADCAST):
        tensor = _only("broadcast", tensors)
        if not tensor.is_cpu:
            return self._beside.broadcast(tensors, opts)
        return self._carry(opts, tensors, self.comm.broadcast, tensor, opts.rootRank)

    def all_gather_single(self, output, input, opts=_ALLGATHER):
        if not input.is_cpu:
            return self._beside._allgather_base(output, input, opts)
        return self._carry(opts, [output], self.comm.all_gather, output, input)

    def all_gather_single_coalesced(self, outputs, inputs, opts=_ALLGATHER):
        if not all(tensor.is_cpu for tensor in inputs):
            return self._beside.allgather_into_tensor_coalesced(outputs, inputs, opts)
        return self._carry_all(opts, outputs, self.comm.all_gather, zip(outputs, inputs, strict=True))

    def allgather(self, outputs, inputs, opts=_ALLGATHER):
        parts, input = _only("allgather", outputs), _only("allgather", inputs)
        if not input.is_cpu:
            return self._beside.allgather(outputs, inputs, opts)
        flat = _room(self.size(), "allgather", parts, input)
        return self._carry(opts, parts, self.comm.all_gather, flat, input, landed=lambda: _spread(flat, parts))

    def allgather_coalesced(self, outputs, inputs, opts=_ALLGATHER):
        """`outputs[r][i]` takes input i of rank r."""
        if not all(tensor.is_cpu for tensor in inputs):
            return self._beside.allgather_coalesced(outputs, inputs, opts)
        columns = [list(column) for column in zip(*outputs, strict=True)]
        flats = [_room(self.size(), "allgather_coalesced", *pair) for pair in zip(columns, inputs, strict=True)]

        def landed():
            for flat, parts in zip(flats, columns, strict=True):
                _spread(flat, parts)

        tensors = [tensor for parts in outputs for tensor in parts]
        return self._carry_all(opts, tensors, self.comm.all_gather, zip(flats, inputs, strict=True), landed)

    def gather(self, outputs, inputs, opts=_GATHER):
        input = _only("gather", inputs)
        if not input.is_cpu:
            return self._beside.gather(outputs, inputs, opts)
        if self.rank() != opts.rootRank:
            return self._carry(opts, [], self.comm.gather, None, input, opts.rootRank)
        parts = _only("gather", outputs)
        flat = _room(self.size(), "gather", parts, input)
        return self._carry(
            opts, parts, self.comm.gather, flat, input, opts.rootRank, landed=lambda: _spread(flat, parts)
        )

    def scatter(self, outputs, inputs, opts=_SCATTER):
        output = _only("scatter", outputs)
        if not output.is_cpu:
            return self._beside.scatter(outputs, inputs, opts)
        root = self.rank() == opts.rootRank
        flat = _joined("scatter", _only("scatter", inputs)) if root else None
        return self._carry(opts, [output], self.comm.scatter, output, flat, opts.rootRank)

    def all_to_all_single(self, output, input, output_splits, input_splits, opts=_ALL_TO_ALL):
        if not input.is_cpu:
            return self._beside.alltoall_base(output, input, output_splits, input_splits, opts)
        return self._carry(opts, [output], self.comm.all_to_all, output, input, output_splits, input_splits)

    def alltoall(self, outputs, inputs, opts=_ALL_TO_ALL):
        if not all(tensor.is_cpu for tensor in inputs):
            return self._beside.alltoall(outputs, inputs, opts)
        source = _joined("alltoall", inputs)
        flat = source.new_empty(sum(output.numel() for output in outputs))
        splits = [tensor.numel() for tensor in outputs], [tensor.numel() for tensor in inputs]
        return self._carry(
            opts, outputs, self.comm.all_to_all, flat, source, *splits, landed=lambda: _spread(flat, outputs)
        )

    def barrier(self, opts=_BARRIER):
        with self._within(opts.timeout):
            return self._carry(opts, [], self.comm.barrier)

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """A barrier whose timeout names the ranks that did not come, on every rank that did."""
        with self._within(timeout):
            self.comm.barrier(tag="monitored")

    @contextlib.contextmanager
    def _within(self, timeout: timedelta | None):
        """Calls made here take `timeout` for that of the communicator, unless it is none or not positive: unset."""
        usual = self.comm.timeout
        if timeout is not None and timeout > timedelta(0):
            self.comm.timeout = timeout.total_seconds()
        try:
            yield
        finally:
            self.comm.timeout = usual

    # ---- point to point

    def send(self, tensors, dst, tag=0):
        tensor = _only("send", tensors)
        if not tensor.is_cpu:
            return self._beside.send(tensors, dst, tag)
        if _within(_SEND):
            self.comm.send(tensor, dst, tag=str(tag))
            return COMPLETED
        return self._posted([self.comm.isend(tensor, dst, tag=str(tag))], tensors, lane=("send", dst))

    def recv(self, tensors, src, tag=0):
        tensor = _only("recv", tensors)
        if not tensor.is_cpu:
            return self._beside.recv(tensors, src, tag)
        if _within(_RECV):
            self.comm.recv(tensor, src, tag=str(tag))
            return COMPLETED
        return self._posted([self.comm.irecv(tensor, src, tag=str(tag))], tensors, lane=("recv", src), source=src)

    def recv_anysource(self, tensors, tag=0):
        raise UsageError(
            "recv: tpmp does not receive from any source, because a wildcard leaves the order of messages to chance; "
            "pass src"
        )

    # ---- the names of torch 2.11

    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single


def _within(function) -> bool:
    """Whether the call comes from this function of torch's, which waits for its Work at once and asks for it in the
    same way as its posting twin. Carried out inline, a message of 64 KiB costs a third: nobody wakes another thread."""
    frame = sys._getframe(2)
    for _ in range(3):
        if frame is None or frame.f_code is function:
            return frame is not None
        frame = frame.f_back
    return False


def _room(size: int, call: str, parts: Sequence[torch.Tensor], input: torch.Tensor) -> torch.Tensor:
    """A flat tensor for the `input` of every rank, which `parts` are to take."""
    if len(parts) != size or any(p.numel() != input.numel() or p.dtype != input.dtype for p in parts):
        shapes = ", ".join(f"{part.dtype}{list(part.shape)}" for part in parts)
        raise ValueError(
            f"{call}: outputs are {shapes or 'none'} for input {input.dtype}{list(input.shape)} on {size} "
            "ranks; pass one output for each rank, each of the dtype and count of the input"
        )
    return torch.empty(size * input.numel(), dtype=input.dtype)


def _op(opts) -> str | None:
    op = opts.reduceOp
    return "sum" if op == _SUM else _OPS.get(op.op)  # a look-up by torch's enum takes a microsecond


def _reducible(tensor: torch.Tensor, opts) -> tuple[torch.Tensor, str | None]:
    """The tensor and op to give to the communicator; op None where torch's own backends carry the call."""
    op = _op(opts) if tensor.is_cpu else None
    if tensor.dtype is torch.bool and op is not None:
        return tensor.view(torch.uint8), _BOOL_OPS.get(op, op)
    return tensor, op


def _bytes(output: torch.Tensor) -> torch.Tensor:
    return output.view(torch.uint8) if output.dtype is torch.bool else output


def _only(call: str, items: Sequence):
    if len(items) != 1:
        raise UsageError(f"{call}: tpmp takes one tensor of a rank at a time, got {len(items)}; call it for each")
    return items[0]


def _joined(call: str, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    if len({part.dtype for part in parts}) > 1:
        raise ValueError(f"{call}: inputs are of {', '.join(str(part.dtype) for part in parts)}; pass one dtype")
    return torch.cat([part.detach().reshape(-1) for part in parts])


def _spread(flat: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
    for part, piece in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
        part.detach().copy_(piece.view(part.shape))
