"""The nccl transport: a communicator between GPU ranks over NCCL, found at run time (csrc/nccl).

communicator.py is the transport, connect.py makes it, library.py says where NCCL is looked for.
"""

from tpmp_kernels.comm.nccl.communicator import NcclCommunicator
from tpmp_kernels.comm.nccl.connect import connect

__all__ = ["NcclCommunicator", "connect"]
