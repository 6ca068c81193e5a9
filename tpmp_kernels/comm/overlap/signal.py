"""One GEMM whose finished chunks are reduced while it goes on: mode "signal".

The kernel counts the stored tiles of each chunk of rows in device memory (kernels/signal_linear.py); the all-reduce of
a chunk is enqueued behind its counter, on the communicator's own stream. No GEMM is cut.
"""

import torch
from torch import Tensor

from tpmp_kernels.comm.nccl import NcclCommunicator
from tpmp_kernels.comm.overlap.plan import Plan
from tpmp_kernels.kernels.signal_linear import signal_linear

# Multiprocessors left to NCCL, whose kernels would else wait for the whole GEMM: as many as its channels take.
RESERVED_SMS = 16


def signalled(x: Tensor, weight: Tensor, out: Tensor, comm: NcclCommunicator, plan: Plan, tag: str) -> list:
    """out [M, N] = sum over ranks of x [M, K] @ weight^T [N, K]; the works of its chunks, in order."""
    counters = torch.zeros(plan.chunks, dtype=torch.int32, device=x.device)
    mark = comm.mark()  # behind the zeros, and before the GEMM, which must be enqueued before anything waits for it
    reserved = RESERVED_SMS if x.is_cuda else 0
    chunks = signal_linear(x, weight, out, counters, chunks=plan.chunks, reserved_sms=reserved)
    works = []
    for index, (rows, count) in enumerate(chunks):
        with comm.behind(mark, counters, index, count):
            works.append(comm.all_reduce(out[rows], tag=f"{tag}[{index}/{len(chunks)}]", async_op=True))
    return works
