"""`wrap`: SPRINT inside a model that you already have, its own `forward` untouched.

The wrapped model is of a subclass with its class's name; parameters, their names, hooks and configuration stay. While
its `forward` runs, its block lists yield blocks that know their route (`sprint.hosts.mechanism.route`). The only new
parameters are the fusion and the mask token, under `sprint.`.
"""

import inspect
from typing import Any, Literal, TypeVar

from torch import nn

from sprint.arguments import checked
from sprint.hosts.declare import Host, declaration
from sprint.hosts.mechanism.bound import BoundList, kind_of
from sprint.hosts.mechanism.paths import check_drop, check_grid, path
from sprint.hosts.mechanism.places import Place, find_places, placed_as, width_of
from sprint.hosts.mechanism.state import SprintState, find_wrapped, own_state, state_of
from sprint.hosts.mechanism.wrapped import OPTIONS_FILE, Wrapped, class_of_list, class_of_model, unwrapped_class
from sprint.middle.drop import Drop
from sprint.middle.fusion import Fill, Init, MaskRestore, SparseDenseResidual, TokenRouting

__all__ = ["OPTIONS_FILE", "SprintState", "path", "state_of", "unwrap", "wrap"]

Merge = Literal["residual", "routing", "mask"]
Model = TypeVar("Model", bound=nn.Module)


@checked
def wrap(
    model: Model,
    *,
    encoder_depth: int = 2,
    decoder_depth: int = 2,
    drop: Drop | None = None,
    path_drop: float = 0.1,
    merge: Merge = "residual",
    init: Init = "identity",
    learnable_mask: bool | None = None,
    fill: Fill = "mask",
    grid: tuple[int, ...] | None = None,
    checkpoint: bool = False,
    host: Host | None = None,
) -> Model:
    """Give a model SPRINT's three paths, in place.

    It starts on the full path: nothing is dropped until `sprint.path(model, "sparse")` says so.

    Args:
        model: a registered architecture (`sprint.hosts.registered()`), or any model with one list of blocks whose first
            argument and result are the tokens (B, N, C).
        encoder_depth: blocks before the middle, counted over all its lists.
        decoder_depth: blocks after it.
        drop: default drop sampler of the sparse path.
        path_drop: probability of dropping a sample's deep path, in training.
        merge: "residual" (SPRINT), "routing" (TREAD: dropped tokens bypass the middle), or "mask" (mask token only), to
            compare them.
        init: of the residual fusion. "identity" leaves a pretrained model as it is, bit by bit, on the full path;
            "xavier" is the paper's, for training from scratch.
        learnable_mask: train the mask token; by default frozen for "residual", as in the reference, and trained for "mask".
        fill: of the residual fusion, what stands for the deep tokens where the middle did not run: "mask" as in the paper,
            or "shallow", the encoder's tokens, to go on from a pretrained model without a high loss at first.
        grid: token grid, where the model's arguments do not tell it (packed latents).
        checkpoint: recompute each block in the backward pass instead of storing its activations, for models without gradient
            checkpointing of their own; drops and fusion stay outside.
        host: declaration to use instead of a registered one.

    Returns:
        The same model.

    Raises:
        ValueError: wrapped twice, too few blocks, no list of blocks, no width, or parameters on several devices.
        TypeError: an option of another type.
    """
    _check_model(model)
    _check_options(drop, path_drop)
    if fill != "mask" and merge != "residual":
        raise ValueError(f"fill={fill!r} is an option of merge='residual', got merge={merge!r}: leave it out")
    found, declared = (host, True) if host is not None else declaration(model)
    places, depth = find_places(model, found)
    if min(encoder_depth, decoder_depth) < 0 or encoder_depth + decoder_depth >= depth:
        raise ValueError(
            f"encoder_depth={encoder_depth} and decoder_depth={decoder_depth} leave no middle of the {depth} blocks of "
            f"{type(model).__name__}: choose smaller ones"
        )
    device, dtype = placed_as(model, places)
    width = width_of(model, found)
    fusions = {
        "residual": lambda: SparseDenseResidual(
            width, path_drop=path_drop, init=init, learnable_mask=bool(learnable_mask), fill=fill
        ),
        "routing": lambda: TokenRouting(width, path_drop=path_drop),
        "mask": lambda: MaskRestore(width, path_drop=path_drop, learnable_mask=learnable_mask is not False),
    }
    state = SprintState(
        fusions[merge]().to(device=device, dtype=dtype),
        host=found,
        declared=declared,
        parameters=list(inspect.signature(model.forward).parameters),
        path_drop=path_drop,
    )
    state.places, state.drop, state.grid, state.checkpoint = places, drop, check_grid(grid), checkpoint
    state.options = {
        "encoder_depth": encoder_depth,
        "decoder_depth": decoder_depth,
        "path_drop": path_drop,
        "merge": merge,
        "init": init,
        "learnable_mask": learnable_mask,
        "fill": fill,
        "grid": state.grid,
        "checkpoint": checkpoint,
    }
    state.first, state.last = encoder_depth, depth - decoder_depth - 1
    _install(model, state.train(model.training))
    return model


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"wrap takes a model, got {type(model).__name__}: wrap the transformer that it holds")
    if own_state(model) is not None:
        raise ValueError(f"this {type(model).__name__} is wrapped already: sprint.unwrap(model) first")
    if hasattr(model, "get_base_model"):
        raise ValueError(
            f"this is a {type(model).__name__}: wrap the model inside, sprint.wrap(model.get_base_model(), …); path and "
            "guidance then take either"
        )
    for name in ("_orig_mod", "module"):
        if name in model._modules and len(model._modules) == 1:
            raise ValueError(f"wrap the model before {type(model).__name__}: sprint.wrap(model.{name}, …) and make it again")
    if any(base.__name__ == "FSDPModule" for base in type(model).__mro__):
        raise ValueError(
            "this model is sharded already, so that nobody would share out the gradients of its fusion: wrap it before "
            "fully_shard(model) (its blocks may be sharded before)"
        )
    if hasattr(type(model), "sprint") or "sprint" in model._modules:
        raise ValueError(f"{type(model).__name__} has an attribute `sprint` of its own, where wrap keeps its parameters")


def _check_options(drop: Any, path_drop: float) -> None:
    check_drop(drop)
    if not 0 <= path_drop <= 1:
        raise ValueError(f"path_drop is a probability in [0, 1], got {path_drop}")


def _runs(model: nn.Module, places: list[tuple[Place, int]]) -> list[nn.Module]:
    """The block lists."""
    runs = [model.get_submodule(place.blocks.name) for place, _ in places]
    return [run for run in runs if isinstance(run, nn.ModuleList | nn.Sequential)]


def _install(model: nn.Module, state: SprintState) -> None:
    """Change the classes of the model and of its lists; all of it, or nothing."""
    runs = _runs(model, state.places)
    if any(isinstance(run, BoundList) for run in runs):
        raise ValueError(
            f"the blocks of this {type(model).__name__} belong to a wrapped model already: give it blocks of its own"
        )
    for place, _ in state.places:
        run = model.get_submodule(place.blocks.name)
        for block in run if run in runs else [run]:  # pyright: ignore[reportGeneralTypeIssues]
            kind_of(block)
    kind = type(model)
    if issubclass(kind, Wrapped):  # made from a wrapped model's class
        kind = unwrapped_class(kind, Wrapped)
    before = [(module, type(module)) for module in (*runs, model)]
    try:
        model.sprint = state
        for run in runs:
            run.__class__ = class_of_list(type(run))
        model.__class__ = class_of_model(kind, tuple(place.blocks.name for place, _ in state.places))
    except BaseException:
        for module, plain in before:
            module.__class__ = plain
        del model.sprint
        raise


@checked
def unwrap(model: Model) -> Model:
    """Undo `wrap`: the model as it was, without its fusion.

    Raises:
        ValueError: the model is not wrapped, or was changed afterwards by what has to be undone first.
    """
    host, state = find_wrapped(model)
    if host is not model:
        raise ValueError(f"this {type(model).__name__} holds a wrapped {type(host).__name__}: unwrap that one")
    runs = [run for run in _runs(model, state.places) if isinstance(run, BoundList)]
    before: list[tuple[nn.Module, type]] = [(run, unwrapped_class(type(run), BoundList)) for run in runs]
    before.append((model, unwrapped_class(type(model), Wrapped)))
    del model.sprint
    for module, kind in before:
        module.__dict__.pop("_sprint", None)
        module.__class__ = kind
    return model
