"""A stand-in for CUDA graphs on any device: it records operations, and replays them on the same memory.

Like a CUDA graph, a capture changes nothing, and a replay runs no Python: numbers that Python computed are built in, random
numbers advance, and reading a value on the host is an error while recording. Memory that was allocated within the capture
is the graph's, and holds nothing of use before a replay (here nan); memory from outside is read and written where it was,
and if it is freed meanwhile, a replay is an error here (and silent damage on a GPU).
"""

from dataclasses import dataclass

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


@dataclass
class _Outside:
    """A tensor whose memory is not the graph's."""

    storage: StorageWeakRef
    dtype: torch.dtype
    place: tuple

    @classmethod
    def of(cls, tensor):
        place = tensor.storage_offset(), tensor.shape, tensor.stride()
        return cls(StorageWeakRef(tensor.untyped_storage()), tensor.dtype, place)

    def tensor(self):
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            raise RuntimeError("the graph uses memory that was freed")
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.place)


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = []
        self.inside = {}  # storages allocated within the capture, kept
        self.before = {}  # of those outside that were written to: a copy

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        if func is torch.ops.aten.lift_fresh.default:  # a constant of the program
            self.inside[args[0].untyped_storage()._cdata] = args[0].untyped_storage()
            return func(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        memory = {tensor.untyped_storage()._cdata for tensor in given}
        if func._schema.is_mutable:
            for tensor in given:
                storage = tensor.untyped_storage()
                if storage._cdata not in self.inside and storage._cdata not in self.before:
                    self.before[storage._cdata] = storage, storage.clone()
        described = tree_map_only(torch.Tensor, self.described, (args, kwargs))
        output = func(*args, **kwargs)
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in memory:
                self.inside[leaf.untyped_storage()._cdata] = leaf.untyped_storage()
        if not func.is_view:  # a view's memory is its base's: nothing to do again
            self.operations.append((func, *described, tree_map_only(torch.Tensor, self.described, output)))
        return output

    def described(self, tensor):
        return tensor.detach() if tensor.untyped_storage()._cdata in self.inside else _Outside.of(tensor)


class RecordedGraph:
    """See the module."""

    made = 0

    def __init__(self):
        type(self).made += 1

    def capture(self, function, generators):
        states = torch.get_rng_state(), [generator.get_state() for generator in generators]
        recorder = _Recorder()
        try:
            with recorder:
                self.output = function()
        finally:
            for storage, copy in recorder.before.values():
                storage.copy_(copy)
            torch.set_rng_state(states[0])
            for generator, state in zip(generators, states[1], strict=True):
                generator.set_state(state)
        self.operations, self.inside = recorder.operations, list(recorder.inside.values())
        with torch.no_grad():
            for _, _, _, output in self.operations:
                for leaf in tree_leaves(output):
                    if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                        leaf.fill_(float("nan"))
        return self.output

    def replay(self):
        with torch.no_grad():
            for func, *described in self.operations:
                args, kwargs, output = tree_map_only(_Outside, _Outside.tensor, tuple(described))
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(output), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old is not new and old.data_ptr() != new.data_ptr():
                        old.copy_(new)
        return self.output
