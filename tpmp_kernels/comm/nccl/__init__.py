"""The nccl transport: a communicator between GPU ranks over NCCL, found at run time (csrc/nccl).

communicator.py is the transport, work.py its calls under way, connect.py makes it, library.py says where NCCL is
looked for, device.py what must be known of the device.
"""

from tpmp_kernels.comm.nccl.communicator import NcclCommunicator
from tpmp_kernels.comm.nccl.connect import connect

__all__ = ["NcclCommunicator", "connect"]
