"""`cost`: what a model costs on each path, before a GPU is rented.

The model runs on tensors without data (torch's meta or fake tensors), forward and backward, while floating-point operations
are counted, and the bytes that autograd keeps. Nothing is computed, and a preset needs no memory.

FLOPs are not seconds. `Cost.estimate` sets them against a device's measured rates and its time to launch a kernel, and
`Cost.notes` says plainly where dropping tokens will not pay.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sprint.drop import Drop, StructuredDrop
from sprint.guidance import unwrapped
from sprint.hosts.check import first_tensor
from sprint.hosts.wrapping import SprintState, path, state_of
from sprint.layers import Block
from sprint.sit import SiT

PAYS = 1.2  # an estimated gain below this is not worth a method


@dataclass(frozen=True)
class Hardware:
    """Rates of a device, as measured on whole training steps rather than read off a data sheet.

    Args:
        name: for tables.
        flops: floating-point operations per second that the products of a training step reach.
        update: seconds per parameter of what a step does whatever its batch: clip, AdamW, casts of weights and gradients.
        launch: seconds that eager PyTorch takes to launch one operation.
    """

    name: str
    flops: float
    update: float
    launch: float


H100 = Hardware("H100", flops=380e12, update=24e-12, launch=8e-6)
"""Rates that fit the bf16 training steps of XL/2 which the project's owner measured with a prototype of this library,
captured in a CUDA graph, to 6 % (256 px at batch 32 and 64 and 512 px at batch 16: sparse 39.9, 61.5 and 63.7 ms,
dense 75.7, 135.2 and 152 ms). The time to launch an operation is an assumption. Not yet measured with this library."""


@dataclass(frozen=True)
class PathCost:
    """One path, for the whole batch."""

    forward: float
    """FLOPs of a forward pass (a multiply-add counts two)."""
    backward: float
    """FLOPs of a backward pass."""
    activations: int
    """Bytes that eager autograd keeps for the backward pass."""
    operations: int
    """Operations that eager PyTorch launches, forward and backward."""

    @property
    def training(self) -> float:
        """FLOPs of forward and backward."""
        return self.forward + self.backward


@dataclass(frozen=True)
class Cost:
    """What `cost` found; prints as a table."""

    model: str
    parameters: int
    batch: int
    full: PathCost
    sparse: PathCost
    shallow: PathCost
    shared: float | None = None
    """FLOPs of one step of PDG whose two predictions share the encoder (`weak="same"`); None where that is not possible."""
    hardware: Hardware = field(default=H100, repr=False)

    @property
    def sparse_ratio(self) -> float:
        """FLOPs of a training step on all tokens over those of a sparse one: the limit of the gain."""
        return self.full.training / self.sparse.training

    @property
    def guidance_ratio(self) -> float:
        """FLOPs of a step of CFG over those of one of PDG."""
        return 2 * self.full.forward / (self.full.forward + self.shallow.forward)

    @property
    def shared_ratio(self) -> float | None:
        """FLOPs of a step of CFG over those of one of PDG with a shared encoder."""
        return None if self.shared is None else 2 * self.full.forward / self.shared

    def estimate(self, hardware: Hardware | None = None) -> dict[str, float]:
        """Seconds of a training step (AdamW, bf16), by "path, launching".

        "captured" has no launches to wait for (a CUDA graph), "eager" takes at least the launches of all its operations.
        A model of three terms: products, what each step does once for every parameter, and launches. Take it for an order
        of magnitude and for ratios.
        """
        h = hardware or self.hardware
        update = h.update * self.parameters
        seconds = {}
        for name, cost in (("full", self.full), ("sparse", self.sparse)):
            captured = cost.training / h.flops + update
            seconds[f"{name}, captured"] = captured
            seconds[f"{name}, eager"] = max(captured, cost.operations * h.launch + update)
        return seconds

    @property
    def notes(self) -> list[str]:
        """Where dropping tokens will not pay, in words; empty where nothing speaks against it."""
        seconds, h, notes = self.estimate(), self.hardware, []
        eager, captured = (seconds[f"full, {kind}"] / seconds[f"sparse, {kind}"] for kind in ("eager", "captured"))
        if self.sparse_ratio < PAYS:
            notes.append(
                f"a sparse step has only {self.sparse_ratio:.2f}x fewer FLOPs: more middle blocks or a higher drop ratio"
            )
        if eager < PAYS:
            notes.append(
                f"in eager PyTorch on {h.name} dropping tokens will not pay ({eager:.2f}x): launching "
                f"{self.sparse.operations} operations takes {1e3 * self.sparse.operations * h.launch:.0f} ms, their "
                f"products {1e3 * self.sparse.training / h.flops:.0f} ms: capture the step (sprint.TrainStep), or "
                "use a larger batch"
            )
        if captured < PAYS <= self.sparse_ratio:
            notes.append(
                f"even captured it will hardly pay ({captured:.2f}x): the update of {self.parameters / 1e6:.0f} M "
                "parameters takes longer than the products of so few tokens: use a larger batch"
            )
        return notes

    def __str__(self) -> str:
        scale, unit = (1e9, "G") if self.full.forward > 1e9 else (1e6, "M")
        head = f"{self.model}: {self.parameters / 1e6:.1f} M parameters, batch {self.batch}"
        lines = [head, f"  {'':<10}{'forward':>14}{'fwd + bwd':>14}{'activations':>14}{'operations':>12}"]
        for name in ("full", "sparse", "shallow"):
            p: PathCost = getattr(self, name)
            lines.append(
                f"  {name:<10}{p.forward / scale:>8.1f} {unit}FLOP{p.training / scale:>8.1f} {unit}FLOP"
                f"{p.activations / 2**30:>10.2f} GiB{p.operations:>12}"
            )
        shared = "" if self.shared_ratio is None else f", {self.shared_ratio:.2f}x with a shared encoder"
        lines.append(
            f"  FLOPs: sparse {self.sparse_ratio:.2f}x fewer, PDG {self.guidance_ratio:.2f}x fewer than CFG{shared}"
        )
        seconds = ", ".join(f"{name} {1e3 * s:.0f} ms" for name, s in self.estimate().items())
        lines.append(f"  estimated training step on {self.hardware.name}: {seconds}")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def cost(
    model: nn.Module | str,
    *args: Any,
    grid: tuple[int, int] | None = None,
    drop: Drop | None = None,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    hardware: Hardware = H100,
    **kwargs: Any,
) -> Cost:
    """Count what a model costs on each path.

    Args:
        model: a preset's name ("S/2", "B/2", "L/2", "XL/2"), a `SiT`, or a wrapped model; frozen parameters and activation
            checkpointing count.
        *args: for a wrapped model, arguments of its forward.
        grid: for a SiT, the token grid: (16, 16) for 256 px, (32, 32) for 512 px.
        drop: drop sampler of the sparse path; by default `StructuredDrop(0.75)`, or the wrapped model's own.
        batch: for a SiT.
        dtype: for a SiT, of its activations (their bytes).
        hardware: rates for the estimates.
        **kwargs: for a wrapped model, arguments of its forward.

    Raises:
        ValueError: no grid for a SiT, no arguments or no drop sampler for a wrapped model, or a model that is neither.
        TypeError: a model or drop sampler that is none.

    Examples:
        >>> c = cost("XL/2", grid=(16, 16), batch=32)
        >>> c.parameters, round(c.sparse_ratio, 2), round(c.guidance_ratio, 2)
        (677476816, 2.82, 1.75)
    """
    if isinstance(model, str):
        with torch.device("meta"):
            model = SiT.preset(model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a preset's name, a SiT or a wrapped model, got {type(model).__name__}")
    if drop is not None and not hasattr(drop, "sample"):
        raise TypeError(f"drop must be a sampler such as sprint.StructuredDrop(0.75), got {drop!r}")
    with torch.inference_mode(False), torch.enable_grad():
        if isinstance(host := unwrapped(model), SiT):
            if grid is None or args or kwargs:
                raise ValueError("give the token grid of a SiT, and nothing else: cost(model, grid=(16, 16), batch=32)")
            if not isinstance(grid, tuple | list) or len(grid) != 2 or not all(_is_count(n) for n in (*grid, batch)):
                raise ValueError(
                    f"grid must be (rows, columns) of tokens and batch at least 1, whole numbers, got {grid!r} and {batch!r}"
                )
            return _of_sit(
                host, (grid[0], grid[1]), drop or StructuredDrop(0.75), batch=batch, dtype=dtype, hardware=hardware
            )
        return _of_wrapped(model, args, kwargs, drop, hardware)


def _is_count(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 1


def _of_sit(like: SiT, grid: tuple[int, int], drop: Drop, *, batch: int, dtype: torch.dtype, hardware: Hardware) -> Cost:
    config = like.config
    with torch.device("meta"):
        model = SiT(config).to(dtype)
        for ours, theirs in zip(model.modules(), like.modules(), strict=True):
            if isinstance(ours, Block) and isinstance(theirs, Block):
                ours.recompute = theirs.recompute
        for ours, theirs in zip(model.parameters(), like.parameters(), strict=True):
            ours.requires_grad_(theirs.requires_grad)
        x = torch.empty(batch, config.in_channels, *(config.patch_size * side for side in grid), dtype=dtype)
        y = None
        if config.num_classes is not None:
            y = torch.empty(batch, dtype=torch.int64)
        elif config.cond_dim is not None:
            y = torch.empty(batch, config.cond_dim, dtype=dtype)
        t, subset = torch.empty(batch), drop.sample(batch, grid)
        paths = {
            "full": _count(model, lambda: model(x, t, y)),
            "sparse": _count(model, lambda: model(x, t, y, subset=subset)),
            "shallow": _count(model, lambda: model(x, t, y, path="shallow")),
        }
        shared = _count(model, lambda: torch.stack(model(x, t, y, path="both"))).forward
    name = f"SiT {config.dim}x{config.depth}"
    return Cost(name, _parameters(model), batch, **paths, shared=shared, hardware=hardware)


def _of_wrapped(model: nn.Module, args: tuple, kwargs: dict[str, Any], drop: Drop | None, hardware: Hardware) -> Cost:
    state = state_of(model)
    if not args and not kwargs:
        raise ValueError("give example arguments of the wrapped model's forward: cost(model, x, t)")
    if drop is None and state.drop is None:
        raise ValueError("the sparse path needs a drop sampler: cost(model, …, drop=sprint.StructuredDrop(0.75))")

    def run(name: Any) -> Tensor:
        with path(model, name, drop=drop if name == "sparse" else None):
            return first_tensor(model(*args, **kwargs))

    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _remembered(state):
            paths = {name: _count(model, lambda name=name: run(name)) for name in ("full", "sparse", "shallow")}
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException):
        # A host that reads values, such as the lengths of captions, has to compute them.
        paths = {name: _count(model, lambda name=name: run(name)) for name in ("full", "sparse", "shallow")}
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim]
    batch = len(tensors[0]) if tensors else 1
    full, sparse, shallow = paths.values()
    return Cost(type(model).__name__, _parameters(model), batch, full, sparse, shallow, hardware=hardware)


def _count(model: nn.Module, forward: Callable[[], Tensor]) -> PathCost:
    kept: dict[int, Any] = {}
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that no other storage takes its place
        return tensor

    # The plain form of attention has exactly the products of the method; fused kernels differ in what they recompute.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops, _Operations() as operations:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = forward()
        done = flops.get_total_flops()
        activations = sum(storage.nbytes() for storage in kept.values())
        with _gradients_apart(model):
            if output.requires_grad:
                output.float().sum().backward()
        return PathCost(done, flops.get_total_flops() - done, activations, operations.count)


class _Operations(TorchDispatchMode):
    """Counts operations that launch a kernel: all but views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        is_view = getattr(func, "is_view", False) or func.overloadpacket.__name__ in ("empty", "detach", "_unsafe_view")
        self.count += not is_view
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _gradients_apart(model: nn.Module) -> Iterator[None]:
    """The gradients of the `with` block are not the model's."""
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, grad in before:
            parameter.grad = grad


@contextlib.contextmanager
def _remembered(state: SprintState) -> Iterator[None]:
    route, grid = state.route, state.grid
    try:
        yield
    finally:
        state.route, state.grid = route, grid


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
