"""The process_group transport: a communicator over any torch.distributed backend, with calls compared beside the data.

communicator.py is the transport. messages.py carries collectives of CPU tensors on gloo as sealed messages, native.py
those of a backend's own functions, helpers.py posted calls. What the ranks called is compared by comm/out_of_band.
"""

from tpmp_kernels.comm.process_group.communicator import ProcessGroupCommunicator

__all__ = ["ProcessGroupCommunicator"]
