"""Capture repeated work in CUDA graphs: launched once, replayed without Python and without launches to wait for.

A graph replays the same kernels on the same memory, so that each signature (shapes, dtypes and every value that is not a
tensor) has its own. Inputs are copied into the graph's buffers, and outputs out of them. Random numbers advance with each
replay as they would have without a graph.

Before a signature is captured it runs `warmup` times as plain code, which is real work and not a rehearsal: no step is
run twice. When weights or optimizer states have moved in memory, one more plain call follows, and new captures. What
cannot be captured stays plain code, and says so once, with the reason.
"""

import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sprint.capture.state import Part

WARMUP = 3  # compilation, allocation of optimizer states, and the library's own warm-up happen before a capture
LIMIT = 8  # graphs kept: each holds the activations of its shape
MEMORY = 64  # signatures remembered
LOOKS = 3  # plain calls in a row that must have waited for the device, before no capture is tried


class Graph(Protocol):
    """What records and replays a call: `CudaGraph`, or a stand-in for tests."""

    def capture(self, function: Callable[[], Any], generators: list[torch.Generator]) -> Any:
        """Record what `function` does; returns what it returned. Raises what it raised."""
        ...

    def replay(self) -> Any:
        """Do it again; returns what `function` returned, in the same memory as every time."""
        ...


class CudaGraph:
    """A `torch.cuda.CUDAGraph`; all of them share one pool of memory, since only one runs at a time."""

    _pool: ClassVar[Any] = None
    _sharing: ClassVar["weakref.WeakSet[CudaGraph]"] = weakref.WeakSet()

    def __init__(self, stream: Any) -> None:
        self.graph, self.stream, self.output = torch.cuda.CUDAGraph(), stream, None

    def capture(self, function: Callable[[], Any], generators: list[torch.Generator]) -> Any:
        """Record what `function` launches; nothing runs yet."""
        if not CudaGraph._sharing:  # torch takes no capture into a pool whose graphs are all gone
            CudaGraph._pool = torch.cuda.graph_pool_handle()
        for generator in generators:
            self.graph.register_generator_state(generator)
        reason: BaseException | None = None
        try:
            # Where the capture cannot even be ended, torch leaves its stream the current one; the outer context does not.
            # Other threads (a data loader's) may use the device meanwhile.
            with (
                torch.cuda.stream(self.stream),
                torch.cuda.graph(self.graph, pool=CudaGraph._pool, stream=self.stream, capture_error_mode="thread_local"),
            ):
                try:
                    self.output = function()
                except BaseException as error:
                    reason = error
                    raise
        except BaseException:
            CudaGraph._sharing = weakref.WeakSet()  # the pool may count as recording for ever: the next capture makes one
            self.output = None
            _draw_again(self.stream.device)
            if reason is not None:  # rather than what torch says of the broken capture's end
                raise reason from None
            raise
        CudaGraph._sharing.add(self)
        return self.output

    def replay(self) -> Any:
        """Launch the graph."""
        self.graph.replay()
        return self.output


def _draw_again(device: torch.device) -> None:
    """After a failed capture some versions of torch refuse to draw, because their generator still counts as captured."""
    generator = torch.cuda.default_generators[device.index]
    state = generator.get_state()
    try:
        torch.rand(1, device=device)
        generator.set_state(state)
    except RuntimeError:
        generator.graphsafe_set_state(generator.clone_state())


@dataclass
class _Entry:
    calls: int = 0
    graph: Graph | None = None
    inputs: list[Tensor] | None = None
    plain: bool = False
    waited: int = 0


class Graphs:
    """A function that is captured by and by, one graph for each signature.

    Args:
        function: takes and returns tensors (in tuples, lists, dictionaries); its other arguments must be hashable.
        device: where its tensors are; graphs exist on CUDA devices.
        state: whatever else the work depends on.
        recording: context of a capture; told of an exception, it undoes what Python did meanwhile.
        warmup: plain calls before a signature is captured.
        limit: signatures captured at most; more stay plain.
        make_graph: gives an empty graph; for tests.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        device: torch.device,
        state: Part,
        recording: Callable[[], AbstractContextManager[Any]] = nullcontext,
        warmup: int = WARMUP,
        limit: int = LIMIT,
        make_graph: Callable[[], Graph] | None = None,
    ) -> None:
        self.function, self.device, self.state, self.recording = function, device, state, recording
        self.warmup, self.limit = warmup, limit
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.make_graph = make_graph or (lambda: CudaGraph(self.stream))
        self.entries: dict[Hashable, _Entry] = {}
        self.memory: Hashable = None
        self._said: set[str] = set()

    @property
    def captured(self) -> int:
        """Signatures captured so far."""
        return sum(entry.graph is not None for entry in self.entries.values())

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, bool]:
        """Call the function; returns its output, and whether a graph did it."""
        leaves, structure = pytree.tree_flatten((args, kwargs))
        options, memory = self.state.look()
        signature = (str(structure), *[_of(leaf) for leaf in leaves], _modes(self.device), options)
        try:
            entry = self.entries.setdefault(signature, _Entry())
        except TypeError:
            names = [type(leaf).__name__ for leaf in leaves if not isinstance(leaf, Hashable)]
            self.say(f"an argument is neither a tensor nor hashable ({', '.join(names)})")
            return self._on_stream(args, kwargs), False
        self._forget()
        moved = self._moved(memory)
        entry.calls += 1
        if entry.graph is None:
            ready = not moved and not entry.plain and entry.calls > self.warmup
            if not ready or not self._capture(entry, leaves, structure):
                return self._plainly(entry, args, kwargs), False
        assert entry.graph is not None
        assert entry.inputs is not None
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        for buffer, tensor in zip(entry.inputs, tensors, strict=True):
            buffer.copy_(tensor, non_blocking=True)
        output = entry.graph.replay()
        return pytree.tree_map_only(Tensor, torch.clone, output), True  # the next replay overwrites it

    def say(self, reason: str) -> None:
        """Warn once that something stays plain code."""
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(f"not captured in a CUDA graph, runs as plain code: {reason}", RuntimeWarning, stacklevel=5)

    def _moved(self, memory: Hashable) -> bool:
        """Whether something is elsewhere in memory than it was after the last call; then all graphs are dropped."""
        before, self.memory = self.memory, memory
        if before is None or memory == before:
            return False
        self._drop()
        return True

    def _drop(self) -> None:
        if self.stream is not None and self.captured:
            torch.cuda.synchronize(self.device)  # one may still be running
        for entry in self.entries.values():
            entry.graph = entry.inputs = None

    def _capture(self, entry: _Entry, leaves: list[Any], structure: Any) -> bool:
        """Try to; returns whether it worked."""
        if reason := self._obstacle(leaves):
            return self._leave(entry, reason)
        # On the device even where the argument is not: a graph cannot wait for the host to have read its copy.
        inputs = [leaf.detach().to(self.device, copy=True) for leaf in leaves if isinstance(leaf, Tensor)]
        buffers = iter(inputs)
        static = [next(buffers) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(static, structure)
        graph, generators = self.make_graph(), self._generators(leaves)
        try:
            with self.recording():
                output = graph.capture(lambda: self.function(*args, **kwargs), generators)
                if reason := _opaque(output):
                    raise RuntimeError(reason)
                if self.state.look()[1] != self.memory:
                    raise RuntimeError("the call replaces parameters, buffers or optimizer states: change them in place")
        except Exception as error:  # whatever the user's code does that a graph cannot
            self._drop()  # random numbers of earlier graphs may have lost their generator
            text = str(error).strip()
            return self._leave(entry, f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}")
        entry.graph, entry.inputs = graph, inputs
        return True

    def _generators(self, leaves: list[Any]) -> list[torch.Generator]:
        return [*(leaf for leaf in leaves if isinstance(leaf, torch.Generator)), *self.state.generators()]

    def _leave(self, entry: _Entry, reason: str) -> bool:
        entry.plain = True
        self.say(reason)
        return False

    def _obstacle(self, leaves: list[Any]) -> str | None:
        """What is known to be impossible is not tried: a failed capture costs memory and time."""
        if self.captured >= self.limit:
            return f"{self.limit} shapes or options are captured already, and each graph holds memory: raise the limit"
        for generator in self._generators(leaves):
            if generator.device != self.device:
                return f"a generator on {generator.device} draws outside of a graph: torch.Generator({str(self.device)!r})"
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
            return "an argument requires a gradient, which would stay in the graph: pass it detached"
        return self.state.obstacle()

    def _forget(self) -> None:
        """Signatures that never come back (an argument or a path with a new object in it at each call) must not pile up."""
        if len(self.entries) > MEMORY:
            generic = f"{MEMORY} signatures so far, most of which did not come back: pass what changes as a tensor"
            self.say(self.state.restless() or generic)
            waiting = [signature for signature, entry in self.entries.items() if entry.graph is None]
            for signature in waiting[: len(self.entries) - MEMORY]:
                del self.entries[signature]

    def _plainly(self, entry: _Entry, args: tuple, kwargs: dict[str, Any]) -> Any:
        looks = self.stream is not None and not entry.plain and entry.calls >= self.warmup
        with _waits() if looks else nullcontext([]) as waits:
            output = self._on_stream(args, kwargs)
        if waits:  # so it would within a capture, which that breaks; at first it may be the compiler that waits
            entry.waited, entry.calls = entry.waited + 1, entry.calls - 1
            if entry.waited == LOOKS:
                self._leave(entry, f"it waits for the device ({waits[-1]}): keep values there, without .item() or .cpu()")
        if not entry.plain and (reason := _opaque(output)):
            self._leave(entry, reason)
        self._moved(self.state.look()[1])  # optimizer states are made in their first step
        return output

    def _on_stream(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.stream is None:
            return self.function(*args, **kwargs)
        # On the stream of the captures: autograd remembers the stream on which it first met a parameter.
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            output = self.function(*args, **kwargs)
        current.wait_stream(self.stream)
        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.is_cuda:
                leaf.record_stream(current)
        return output


def check_counts(warmup: int, limit: int, *, least: int) -> None:
    """Raise ValueError unless these are numbers of calls and graphs."""
    for name, value, low in (("warmup", warmup, least), ("limit", limit, 1)):
        if value < low:
            raise ValueError(f"{name} must be a whole number, at least {low}, got {value!r}")


def check_autocast(dtype: torch.dtype | None) -> None:
    """Raise TypeError unless this is a dtype for products, or None."""
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"autocast must be a dtype such as torch.bfloat16, or None, got {dtype!r}")


@contextmanager
def _waits() -> Iterator[list[str]]:
    """Places within the `with` block that wait for the device, filled in at its end."""
    found: list[str] = []
    if torch.cuda.get_sync_debug_mode():
        yield found  # the user is looking for them
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "synchronizing CUDA operation" in str(warning.message):
            found.append(f"{Path(warning.filename).name}, line {warning.lineno}")
        elif "ynchronization debug mode" not in str(warning.message):  # what torch says of the mode itself
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _modes(device: torch.device) -> Hashable:
    """What surrounds the call."""
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    return autocast, torch.is_inference_mode_enabled()


def _of(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device, leaf.requires_grad
    if isinstance(leaf, float):
        return float, repr(leaf)  # -0.0 is not 0.0, and nan is nan
    return type(leaf), leaf  # True is not 1


def _opaque(output: Any) -> str | None:
    """Why the tensors of this output cannot be found, if so."""
    for leaf in pytree.tree_leaves(output):
        if not isinstance(leaf, Tensor | int | float | str | torch.dtype | torch.device | None):
            return (
                f"the result has a {type(leaf).__name__}, which torch does not open: return tensors, tuples or dictionaries"
            )
    return None
