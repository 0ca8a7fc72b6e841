"""Capture repeated work in CUDA graphs: launched once, replayed without Python and without launches to wait for.

A graph replays the same kernels on the same memory, so that each signature (shapes, dtypes and every value that is not a
tensor) has its own. Inputs are copied into the graph's buffers, and outputs out of them. Random numbers advance with each
replay as they would have without a graph.

Before a signature is captured it runs `warmup` times as plain code, which is real work and not a rehearsal: no step is
run twice. What cannot be captured stays plain code, and says so once, with the reason.
"""

import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

WARMUP = 3  # compilation, allocation of optimizer states, and the library's own warm-up happen before a capture
LIMIT = 8  # graphs kept: each holds the activations of its shape
MEMORY = 64  # signatures remembered


class Graph(Protocol):
    """What records and replays a call: `CudaGraph`, or a stand-in for tests."""

    def capture(self, function: Callable[[], Any], generators: list[torch.Generator]) -> None:
        """Record what `function` does."""
        ...

    def replay(self) -> Any:
        """Do it again; returns what `function` returned, in the same memory as every time."""
        ...


class CudaGraph:
    """A `torch.cuda.CUDAGraph`; all of them share one pool of memory, since only one runs at a time."""

    _pool: Any = None

    def __init__(self, stream: Any) -> None:
        self.graph, self.stream, self.output = torch.cuda.CUDAGraph(), stream, None

    def capture(self, function: Callable[[], Any], generators: list[torch.Generator]) -> None:
        """Record what `function` launches; nothing runs yet."""
        if CudaGraph._pool is None:
            CudaGraph._pool = torch.cuda.graph_pool_handle()
        for generator in generators:
            self.graph.register_generator_state(generator)
        # Other threads (a data loader's) may use the device meanwhile.
        with torch.cuda.graph(self.graph, pool=CudaGraph._pool, stream=self.stream, capture_error_mode="thread_local"):
            self.output = function()

    def replay(self) -> Any:
        """Launch the graph."""
        self.graph.replay()
        return self.output


@dataclass
class _Entry:
    calls: int = 0
    graph: Graph | None = None
    inputs: list[Tensor] | None = None
    plain: bool = False


class Graphs:
    """A function that is captured by and by, one graph for each signature.

    Args:
        function: takes and returns tensors (in tuples, lists, dictionaries); its other arguments must be hashable.
        device: where its tensors are; graphs exist on CUDA devices.
        state: gives whatever else the work depends on; when that changes, it is captured anew.
        before: called before a capture.
        warmup: plain calls before a signature is captured.
        limit: signatures captured at most; more stay plain.
        make_graph: gives an empty graph; for tests.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        device: torch.device,
        state: Callable[[], Hashable] = lambda: None,
        before: Callable[[], None] = lambda: None,
        warmup: int = WARMUP,
        limit: int = LIMIT,
        make_graph: Callable[[], Graph] | None = None,
    ) -> None:
        self.function, self.device, self.state, self.before = function, device, state, before
        self.warmup, self.limit = warmup, limit
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.make_graph = make_graph or (lambda: CudaGraph(self.stream))
        self.entries: dict[Hashable, _Entry] = {}
        self._said: set[str] = set()

    @property
    def captured(self) -> int:
        """Signatures captured so far."""
        return sum(entry.graph is not None for entry in self.entries.values())

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, bool]:
        """Call the function; returns its output, and whether a graph did it."""
        leaves, structure = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        signature = (str(structure), *(_of(leaf) for leaf in leaves), self.state())
        try:
            entry = self.entries.setdefault(signature, _Entry())
            self._forget()
        except TypeError:
            names = [type(leaf).__name__ for leaf in leaves if not isinstance(leaf, Hashable)]
            self.say(f"an argument is neither a tensor nor hashable ({', '.join(names)})")
            return self._plainly(args, kwargs), False
        entry.calls += 1
        if entry.plain or entry.calls <= self.warmup:
            return self._plainly(args, kwargs), False
        if entry.graph is None:
            self._capture(entry, leaves, structure)
        if entry.graph is None or entry.inputs is None:
            return self._plainly(args, kwargs), False
        for buffer, tensor in zip(entry.inputs, tensors, strict=True):
            buffer.copy_(tensor, non_blocking=True)
        output = entry.graph.replay()
        return pytree.tree_map_only(Tensor, torch.clone, output), True  # the next replay overwrites it

    def say(self, reason: str) -> None:
        """Warn once that something stays plain code."""
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(f"not captured in a CUDA graph, runs as plain code: {reason}", RuntimeWarning, stacklevel=4)

    def _capture(self, entry: _Entry, leaves: list[Any], structure: Any) -> None:
        if self.captured >= self.limit:
            entry.plain = True
            self.say(f"{self.limit} shapes or options are captured already, and each graph holds memory: raise the limit")
            return
        inputs = [leaf.detach().clone() for leaf in leaves if isinstance(leaf, Tensor)]
        buffers = iter(inputs)
        static = [next(buffers) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(static, structure)
        generators = [leaf for leaf in leaves if isinstance(leaf, torch.Generator) and leaf.device == self.device]
        graph = self.make_graph()
        self.before()
        try:
            graph.capture(lambda: self.function(*args, **kwargs), generators)
        except Exception as error:  # whatever the user's code does that a graph cannot
            entry.plain = True
            self.before()
            self.say(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else 'no message'}")
            return
        entry.graph, entry.inputs = graph, inputs

    def _forget(self) -> None:
        """Signatures that never come back (an argument or a path with a new object in it at each call) must not pile up."""
        if len(self.entries) > MEMORY:
            self.say(f"{MEMORY} signatures so far, most of which did not come back: pass what changes as a tensor")
            waiting = [signature for signature, entry in self.entries.items() if entry.graph is None]
            for signature in waiting[: len(self.entries) - MEMORY]:
                del self.entries[signature]

    def _plainly(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.stream is None:
            return self.function(*args, **kwargs)
        # On the stream of the captures: autograd remembers the stream on which it first met a parameter.
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            output = self.function(*args, **kwargs)
        current.wait_stream(self.stream)
        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, Tensor):
                leaf.record_stream(current)
        return output


class ModelState:
    """What a captured pass through a model has built in: its mode, the path it was told to take, where its weights are."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.names = ("route", "_route", "grid", "weak_half")  # of a SparseMiddle, and of what `wrap` adds
        self.parts = [module for module in model.modules() if any(hasattr(module, name) for name in self.names[:2])]
        parameters = list(model.parameters())
        self.ends = (parameters[0], parameters[-1]) if parameters else ()

    def __call__(self) -> Hashable:
        """A value that differs when a graph no longer holds."""
        routes = tuple(getattr(part, name, None) for part in self.parts for name in self.names)
        return self.model.training, routes, tuple(parameter.data_ptr() for parameter in self.ends)


def _of(leaf: Any) -> Hashable:
    return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf
