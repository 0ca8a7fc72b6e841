"""Compile a model block by block: all blocks of one kind share their code, so that each distinct shape is compiled once."""

import torch
from torch import nn

from sprint.hosts.wrapping import SprintState
from sprint.models.layers import Block, FinalLayer

SHAPES = 64  # distinct shapes and options that torch may compile for one kind of block before it gives up


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model: of a `SiT`, a wrapped model, a model of diffusers, or one with lists of equal blocks.

    Raises:
        ValueError: none were found.
    """
    model = next((module for module in model.modules() if isinstance(module._modules.get("sprint"), SprintState)), model)
    state = model._modules.get("sprint")
    repeated = getattr(model, "_repeated_blocks", None) or ()
    found: list[nn.Module]
    if isinstance(state, SprintState):
        runs = (model.get_submodule(place.blocks.name) for place, _ in state.places)
        found = [block for run in runs for block in (run if isinstance(run, nn.ModuleList | nn.Sequential) else [run])]
    elif ours := [module for module in model.modules() if isinstance(module, Block | FinalLayer)]:
        found = [*ours]
    elif repeated:
        found = [module for module in model.modules() if type(module).__name__ in repeated]
    else:
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
        found = [block for run in lists if len(run) > 1 and len({type(b) for b in run}) == 1 for block in run]
    if not found:
        raise ValueError(f"{type(model).__name__} has no list of equal blocks: compile it yourself, with compile=False here")
    return found


def compile_blocks(model: nn.Module) -> None:
    """Compile each block in place, for fixed shapes (faster kernels, and half a minute for XL/2 instead of minutes)."""
    config = torch._dynamo.config
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, name, max(getattr(config, name), SHAPES))
    for block in blocks_of(model):
        if getattr(block, "_compiled_call_impl", None) is None:
            block.compile(dynamic=False)
