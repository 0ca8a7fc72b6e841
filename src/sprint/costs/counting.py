"""What a forward and a backward pass ask of a device: products, memory traffic, operations, kept activations.

Everything is counted in one look at the operations that PyTorch dispatches, on tensors with or without data.
"""

import contextlib
import functools
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
RENAMED = ("detach", "_unsafe_view", "lift_fresh")  # the same memory under another name, as with views


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
    traffic: float = 0.0
    """Bytes that the operations other than products read and write, forward and backward."""

    @property
    def training(self) -> float:
        """FLOPs of forward and backward."""
        return self.forward + self.backward

    def __add__(self, other: "PathCost") -> "PathCost":
        return PathCost(*map(operator.add, astuple(self), astuple(other)))

    def __sub__(self, other: "PathCost") -> "PathCost":
        return PathCost(*map(operator.sub, astuple(self), astuple(other)))

    def __rmul__(self, times: int) -> "PathCost":
        return PathCost(*(times * value for value in astuple(self)))


def count(
    model: nn.Module, forward: Callable[[], Tensor], *, backward: bool = True, weights: Iterable[Tensor] | None = None
) -> PathCost:
    """Run forward and backward, and count.

    Args:
        model: whose parameters are not activations, and whose gradients are left as they were.
        forward: runs the model and returns a tensor to differentiate.
        backward: without it, the forward pass alone is counted.
        weights: what stands for the parameters where fake tensors take their place.
    """
    kept: dict[int, Any] = {}
    own = {weight.untyped_storage()._cdata for weight in weights or model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that no other storage takes its place
        return tensor

    # The plain form of attention has exactly the products of the method; fused kernels differ in what they recompute.
    with sdpa_kernel(SDPBackend.MATH), _Counter() as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = forward()
        done = counter.flops
        activations = sum(storage.nbytes() for storage in kept.values())
        with _gradients_apart(model):
            if backward and output.requires_grad:
                output.float().sum().backward()
    return PathCost(done, counter.flops - done, activations, counter.operations, float(counter.traffic))


class _Counter(TorchDispatchMode):
    """Counts the operations that launch a kernel, the FLOPs of products and the bytes that all others move."""

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.operations, self.traffic = 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Compiled code is an operator of higher order, whose parts are seen on their own.
        kind = _kind(func) if isinstance(func, torch._ops.OpOverload) else "nothing"
        if kind == "parts":
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        if kind != "nothing":
            self.operations += 1
        if kind == "product":
            self.flops += flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)
        elif kind == "other":
            self.traffic += _bytes(args) + _bytes(result)
        return result


@functools.cache
def _kind(func: Any) -> Literal["nothing", "parts", "product", "other"]:
    """What a device does for an operation: nothing for views, allocations, and questions about shapes or devices."""
    name, schema = func.overloadpacket.__name__, func._schema
    results = any("Tensor" in str(value.type) for value in schema.returns)
    if func.namespace == "prim" or func.is_view or name in (*ALLOCATIONS, *RENAMED) or not (results or schema.is_mutable):
        return "nothing"
    if func.overloadpacket in flop_registry:
        return "product"
    # Linear layers in inference mode, for example, come whole.
    whole = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CPU")
    return "parts" if func._can_decompose() and not whole else "other"


def _bytes(values: Any) -> int:
    if isinstance(values, Tensor):
        return values.numel() * values.element_size()
    return sum(map(_bytes, values)) if isinstance(values, tuple | list) else 0


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
