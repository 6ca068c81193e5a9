"""Triton kernels and their launchers: Tensor -> Tensor, no autograd, no ranks. Importing this needs no Triton."""
