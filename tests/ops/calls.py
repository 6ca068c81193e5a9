"""Which ops of this library run: a dispatch mode that writes down their names."""

from torch.utils._python_dispatch import TorchDispatchMode


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "tpmp_kernels":
            self.names.append(func.name().split("::")[1])
        return func(*args, **(kwargs or {}))
