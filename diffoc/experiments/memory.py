"""How much memory, activations included, and time a computation takes on every device."""

import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of the tensors made while it is active that are still alive.

    Activations that autograd keeps count, what a kernel allocates for itself does not. It works on
    every device. `live` and `peak` are the bytes now, and at most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(s) for s in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if id(storage) not in before | self._alive:
                self._alive.add(id(storage))
                self.live += storage.nbytes()
                weakref.finalize(storage, self._forget, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _forget(self, key: int, size: int) -> None:
        self._alive.remove(key)
        self.live -= size


def _storages(tree: object) -> list[torch.UntypedStorage]:
    return [t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, Tensor)]


def peak_memory(run: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """Returns the most bytes in use during `run`, and those that its result keeps beyond.

    On a CUDA device as its allocator counts them, elsewhere those of :class:`LiveTensors`.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = run()
        most = torch.cuda.max_memory_allocated(device) - before
        after = torch.cuda.memory_allocated(device) - before
    else:
        with LiveTensors() as tensors:
            result = run()
        most, after = tensors.peak, tensors.live
    del result  # was alive until here
    return most, after


def clock(device: torch.device | str) -> float:
    """Returns seconds, once a device has done what it was asked for; differences count."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
