"""Calls as the compiled transports take them, and their errors with what only Python knows."""

import torch

from tpmp_kernels.comm._ext import C
from tpmp_kernels.comm.arguments import Collective
from tpmp_kernels.errors import TransportError

DTYPES = {} if C is None else {getattr(torch, name): code for name, code in C.DTYPES.items()}


def collective(call: Collective, stream: int = 0):
    """`stream`: the CUDA stream on which the tensors are ready, as an address."""
    tensor = call.tensor
    return C.Collective(
        C.KINDS[call.kind],
        0 if call.input is None else call.input.data_ptr(),
        0 if call.output is None else call.output.data_ptr(),
        call.numel,
        DTYPES[torch.uint8 if tensor is None else tensor.dtype],
        0 if call.op is None else C.REDUCE_OPS[call.op],
        call.root,
        call.tag,
        call.input_splits,
        call.output_splits,
        stream,
    )


def message(tensor: torch.Tensor, peer: int, tag: str, stream: int = 0):
    return C.Message(tensor.data_ptr(), tensor.numel(), DTYPES[tensor.dtype], peer, tag, stream)


def with_shape(error: TransportError, tensor: torch.Tensor | None) -> TransportError:
    if tensor is None:
        return error
    dtype = str(tensor.dtype).removeprefix("torch.")
    return type(error)(f"{error} | tensor {dtype}{list(tensor.shape)}", error.culprit)
