"""A stand-in for CUDA graphs on any device: it records operations, and replays them on the same memory.

Like a CUDA graph, a replay runs no Python: numbers that Python computed are built in, tensors are read and written where
they were, random numbers advance, and reading a value on the host is an error while recording.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        output = func(*args, **kwargs)
        if not func.is_view:  # a view's memory is its base's: nothing to do again
            self.operations.append((func, args, kwargs, output))
        return output


class RecordedGraph:
    """See the module. Recording has to run the operations for real, so that the first replay does nothing."""

    made = 0

    def __init__(self):
        type(self).made += 1
        self.fresh = True

    def capture(self, function, generators):
        recorder = _Recorder()
        with recorder:
            self.output = function()
        self.operations = recorder.operations

    def replay(self):
        if self.fresh:
            self.fresh = False
            return self.output
        with torch.no_grad():
            for func, args, kwargs, output in self.operations:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(output), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old is not new and old.data_ptr() != new.data_ptr():
                        old.copy_(new)
        return self.output
