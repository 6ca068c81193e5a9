"""Ranks get what the prover imports from their fork server, which imports it once for all of them, if it is not up yet:
DTensor and dynamo behind tensor_parallel take a rank two seconds."""

import multiprocessing

multiprocessing.get_context("forkserver").set_forkserver_preload(
    ["torch", "torch.distributed", "tpmp_kernels.testing", "tpmp_kernels.prover.prove"]
)
