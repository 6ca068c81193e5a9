"""What ops allocate, those of this library looked into: a dispatch mode that counts elements."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class Allocations(TorchDispatchMode):
    """`largest`: elements of the largest result of any op; `peak`: of the results that were alive at one time.

    Memory of the tensors `before` does not count.
    """

    def __init__(self, *before: torch.Tensor):
        super().__init__()
        self.largest = self.peak = 0
        self._before = {t.untyped_storage().data_ptr() for t in before}
        self._results: list[weakref.ref] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "tpmp_kernels":
            with self:  # off within its own handler, and so for all that the op calls
                result = func.redispatch(_CPU, *args, **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        self._results += [weakref.ref(t) for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self._count()
        return result

    def _count(self) -> None:
        self._results = [each for each in self._results if each() is not None]
        sizes = {}
        for t in (each() for each in self._results):
            storage = t.untyped_storage()
            if storage.data_ptr() not in self._before:
                sizes[storage.data_ptr()] = storage.nbytes() // t.element_size()
        self.largest = max(self.largest, *sizes.values(), 0)
        self.peak = max(self.peak, sum(sizes.values()))
