"""Ranks: communicators over shared memory or torch.distributed, and the differentiable collectives on top of them."""

from tpmp_kernels.comm import backend
from tpmp_kernels.comm.alone import SelfCommunicator
from tpmp_kernels.comm.communicator import Communicator, Work
from tpmp_kernels.comm.emulated import EmulatedLink
from tpmp_kernels.comm.factory import communicator

backend.register()  # torch.distributed's "tpmp"

__all__ = ["Communicator", "EmulatedLink", "SelfCommunicator", "Work", "communicator"]
