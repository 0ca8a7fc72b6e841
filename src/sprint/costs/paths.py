"""What a `SiT` and a wrapped model ask of a device on each path, counted on tensors without data.

The blocks of a SiT are equal, so that one of them is counted on all tokens, one on the kept ones, and both are multiplied.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)

from sprint.costs.counting import count
from sprint.hosts.outputs import first_tensor
from sprint.hosts.wrapping import SprintState, path, state_of
from sprint.middle.drop import Drop
from sprint.models.config import SiTConfig
from sprint.models.layers import Block
from sprint.models.sit import SiT


def of_sit(like: SiT, grid: tuple[int, int], drop: Drop, *, batch: int, dtype: torch.dtype) -> dict[str, Any]:
    """The costs "full", "sparse" and "shallow" of a SiT, and the FLOPs "shared" of two predictions with one encoder."""
    depths = ("encoder_depth", "middle_depth", "decoder_depth")
    first, middle, last = (getattr(like.config, name) - 1 for name in depths)
    if min(first, last) < 0 or middle < 1 or not _uniform(like):
        return _of_meta(_empty(like, like.config, dtype), grid, drop, batch=batch)
    # Blocks are equal, so that two models differ by what one block asks for, on all tokens or on the kept ones.
    small = dataclasses.replace(like.config, **dict.fromkeys(depths, 1), repa_dim=None, repa_depth=None)
    one = _of_meta(_empty(like, small, dtype), grid, drop, batch=batch)
    larger = _empty(like, dataclasses.replace(small, middle_depth=2), dtype)
    two = _of_meta(larger, grid, drop, batch=batch, paths=("full", "sparse"))
    block = {name: two[name] - one[name] for name in two}
    return {
        "full": one["full"] + (first + middle + last) * block["full"],
        "sparse": one["sparse"] + (first + last) * block["full"] + middle * block["sparse"],
        "shallow": one["shallow"] + (first + last) * block["full"],
        "shared": one["shared"] + (first + middle + 2 * last) * block["full"].forward,  # the decoder runs twice
    }


def _uniform(model: SiT) -> bool:
    """Whether blocks differ in nothing but the tokens they see: all are trained, and checkpointed alike."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    fresh = set() if model.config.learnable_mask else {"middle.fusion.mask_token"}
    return len({block.recompute for block in blocks}) == 1 and frozen <= fresh


def _empty(like: SiT, config: SiTConfig, dtype: torch.dtype) -> SiT:
    """A model without data, whose blocks are checkpointed and whose parameters are frozen as in another one."""
    with torch.device("meta"):
        model = SiT(config).to(dtype)
    theirs = {name: block.recompute for name, block in like.named_modules() if isinstance(block, Block)}
    trained = {name: parameter.requires_grad for name, parameter in like.named_parameters()}
    for name, ours in model.named_modules():
        if isinstance(ours, Block):
            ours.recompute = theirs[name]
    for name, ours in model.named_parameters():
        ours.requires_grad_(trained[name])
    return model


def _of_meta(
    model: SiT,
    grid: tuple[int, int],
    drop: Drop,
    *,
    batch: int,
    paths: tuple[str, ...] = ("full", "sparse", "shallow", "shared"),
) -> dict[str, Any]:
    config, dtype = model.config, model.dtype
    with torch.device("meta"):
        x = torch.empty(batch, config.in_channels, *(config.patch_size * side for side in grid), dtype=dtype)
        y = None
        if config.num_classes is not None:
            y = torch.empty(batch, dtype=torch.int64)
        elif config.cond_dim is not None:
            y = torch.empty(batch, config.cond_dim, dtype=dtype)
        t, subset = torch.empty(batch), drop.sample(batch, grid)
    counts: dict[str, Callable[[], Any]] = {
        "full": lambda: count(model, lambda: model(x, t, y)),
        "sparse": lambda: count(model, lambda: model(x, t, y, subset=subset)),
        "shallow": lambda: count(model, lambda: model(x, t, y, path="shallow")),
        "shared": lambda: count(model, lambda: torch.stack(model(x, t, y, path="both")), backward=False).forward,
    }
    return {name: counts[name]() for name in paths}


def of_wrapped(model: nn.Module, args: tuple, kwargs: dict[str, Any], drop: Drop | None) -> dict[str, Any]:
    """The costs "full", "sparse" and "shallow" of a wrapped model with these arguments."""
    state = state_of(model)
    if not args and not kwargs:
        raise ValueError("give example arguments of the wrapped model's forward: cost(model, x, t)")
    if drop is None and state.drop is None:
        raise ValueError("the sparse path needs a drop sampler: cost(model, …, drop=sprint.StructuredDrop(0.75))")

    def run(name: Any) -> Tensor:
        with path(model, name, drop=drop if name == "sparse" else None):
            return first_tensor(model(*args, **kwargs))

    def paths(weights: list[Tensor] | None = None) -> dict[str, Any]:
        return {name: count(model, functools.partial(run, name), weights=weights) for name in ("full", "sparse", "shallow")}

    with _untouched(model):
        try:
            with FakeTensorMode(allow_non_fake_inputs=True) as fake, _remembered(state):
                return paths([fake.from_tensor(parameter) for parameter in model.parameters()])
        except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException):
            # A host that reads values, such as the lengths of captions, has to compute them.
            return paths()


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """What a forward pass changes is put back: buffers, such as running means, and random streams."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if not buffer.is_meta]
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    if not torch.equal(buffer, before):
                        buffer.copy_(before)


@contextlib.contextmanager
def _remembered(state: SprintState) -> Iterator[None]:
    route, grid = state.route, state.grid
    try:
        yield
    finally:
        state.route, state.grid = route, grid
