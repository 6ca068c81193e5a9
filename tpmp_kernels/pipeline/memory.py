"""What a pass over a schedule holds: the bytes that were allocated in it and are not free yet, behind each step."""

from collections.abc import Iterable

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Meter(TorchDispatchMode):
    """While it is entered it sees every tensor that an operation makes, in forward and backward, and counts storages.

    What was there before, parameters and their gradients among it, is not counted. Off, it costs nothing.
    """

    def __init__(self, on: bool):
        super().__init__()
        self.on = on
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}  # by address of the weak reference's target

    def __enter__(self):
        return super().__enter__() if self.on else self

    def __exit__(self, *error):
        return super().__exit__(*error) if self.on else None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        result = function(*args, **kwargs)
        for tensor in _tensors(result):
            if tensor.untyped_storage()._cdata not in given:
                self.note(tensor)
        return result

    def note(self, tensor: Tensor) -> None:
        """Count a tensor that no operation of torch has made."""
        if self.on:
            storage = tensor.untyped_storage()
            self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()

    def live_bytes(self) -> int:
        self._storages = {key: each for key, each in self._storages.items() if not each[0].expired()}
        return sum(size for _, size in self._storages.values())


def _tensors(values: object) -> Iterable[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
