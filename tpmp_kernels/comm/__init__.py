"""Ranks: communicators over shared memory or torch.distributed, and the differentiable collectives on top of them."""

from tpmp_kernels.comm.communicator import Communicator, SelfCommunicator, Work
from tpmp_kernels.comm.factory import communicator

__all__ = ["Communicator", "SelfCommunicator", "Work", "communicator"]
