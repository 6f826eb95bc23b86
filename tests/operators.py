"""Modes that record the operators that run within them, and the memory that the operators take."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_WAITING = ("wait_tensor", "_wrap_tensor_autograd")
"""Operators of torch.distributed that send nothing."""


class Operators(TorchDispatchMode):
    """Records the operators by name, and the exchanges with other ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.sent: list[tuple[str, int]] = []
        """The name of each exchange, and the bytes that this rank has put into it."""
        self.largest = 0
        """Elements of the largest tensor that an operator returned."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        self.calls.append(name)
        if func.namespace in ("c10d", "_c10d_functional") and name not in _WAITING:
            self.sent.append((name, sum(x.nbytes for x in tree_leaves(args[0]) if isinstance(x, Tensor))))
        out = func(*args, **(kwargs or {}))
        made = [x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.largest = max(self.largest, *made, 0)
        return out

    @property
    def bytes_sent(self) -> int:
        return sum(n_bytes for _, n_bytes in self.sent)


class Memory(TorchDispatchMode):
    """Records the memory that operators take for the tensors they return, without keeping it alive."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, StorageWeakRef] = {}
        self.peak = 0
        """The most bytes that these tensors held at once."""
        self.largest = 0
        """The bytes of the largest of these tensors."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = self._storages((args, kwargs))
        out = func(*args, **(kwargs or {}))
        made = [storage for key, storage in self._storages(out).items() if key not in given]
        self.storages |= {storage._cdata: StorageWeakRef(storage) for storage in made}
        self.largest = max(self.largest, *(storage.nbytes() for storage in made), 0)
        self.peak = max(self.peak, self.alive())
        return out

    def alive(self) -> int:
        """The bytes that these tensors hold now."""
        self.storages = {
            key: reference for key, reference in self.storages.items() if not reference.expired()
        }
        storages = [torch.UntypedStorage._new_with_weak_ptr(each.cdata) for each in self.storages.values()]
        return sum(storage.nbytes() for storage in storages if storage is not None)

    def _storages(self, tree: Any) -> dict[int, torch.UntypedStorage]:
        tensors = [x for x in tree_leaves(tree) if isinstance(x, Tensor) and not isinstance(x, DTensor)]
        return {storage._cdata: storage for storage in (x.untyped_storage() for x in tensors)}
