"""Bytes of tensors that are alive, and floating point operations, counted exactly while code runs."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class LiveMemory(TorchDispatchMode):
    """`now` and `peak` [bytes] of the storages made while active, `flops` of the matrix products and convolutions."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.flops = 0
        self.known = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        given = {id(storage_of(t)) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and id(storage_of(tensor)) not in given:
                self._born(storage_of(tensor))
        return out

    def _born(self, storage):
        key = id(storage)
        if key in self.known and self.known[key]() is storage:
            return
        size = storage.nbytes()

        def died(_):
            self.now -= size
            self.known.pop(key, None)

        self.known[key] = weakref.ref(storage, died)
        self.now += size
        self.peak = max(self.peak, self.now)


def storage_of(tensor):
    return tensor.untyped_storage()
