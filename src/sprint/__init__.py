"""SPRINT: train and sample diffusion transformers with most tokens dropped (arXiv 2510.21986).

drop = sprint.StructuredDrop(0.75)                                # which tokens the middle blocks see
out = sprint.FlowMatchingLoss()(model, images, y=labels, drop=drop)
images = sprint.sample(model, noise, y=labels, guidance=sprint.PathDropGuidance(2.0))

These names are what users compose. The rest is reached through its room: `sprint.data.LatentDataset`,
`sprint.training.RunFolder`, `sprint.diffusers.from_pretrained`.
"""

from typing import TYPE_CHECKING, Any

from sprint import capture, checkpoint, costs, data, flow, hosts, kernels, middle, models, random, training
from sprint.capture import CapturedModel
from sprint.checkpoint import load_state, save_state
from sprint.costs import Hardware, cost
from sprint.flow import (
    ClassifierFreeGuidance,
    CosineInterpolant,
    DDPMInterpolant,
    Euler,
    EulerMaruyama,
    FlowMatchingLoss,
    Heun,
    Interpolant,
    LinearInterpolant,
    LogNormalTime,
    PathDropGuidance,
    ShiftedTime,
    SparseGuidance,
    UniformTime,
    Velocity,
    repa_loss,
    sample,
    trajectory,
)
from sprint.hosts import Blocks, Host, Table, check, path, register, unwrap, wrap
from sprint.middle import (
    Drop,
    MaskRestore,
    RandomDrop,
    SparseDenseResidual,
    SparseMiddle,
    StructuredDrop,
    TokenRouting,
    TokenSubset,
)
from sprint.models import SiT, SiTConfig
from sprint.training import AdamW, TrainStep

if TYPE_CHECKING:
    from sprint import diffusers

__version__ = "0.1.0"

__all__ = [
    "AdamW",
    "Blocks",
    "CapturedModel",
    "ClassifierFreeGuidance",
    "CosineInterpolant",
    "DDPMInterpolant",
    "Drop",
    "Euler",
    "EulerMaruyama",
    "FlowMatchingLoss",
    "Hardware",
    "Heun",
    "Host",
    "Interpolant",
    "LinearInterpolant",
    "LogNormalTime",
    "MaskRestore",
    "PathDropGuidance",
    "RandomDrop",
    "ShiftedTime",
    "SiT",
    "SiTConfig",
    "SparseDenseResidual",
    "SparseGuidance",
    "SparseMiddle",
    "StructuredDrop",
    "Table",
    "TokenRouting",
    "TokenSubset",
    "TrainStep",
    "UniformTime",
    "Velocity",
    "capture",
    "check",
    "checkpoint",
    "cost",
    "costs",
    "data",
    "diffusers",
    "flow",
    "hosts",
    "kernels",
    "load_state",
    "middle",
    "models",
    "path",
    "random",
    "register",
    "repa_loss",
    "sample",
    "save_state",
    "training",
    "trajectory",
    "unwrap",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name == "diffusers":  # an extra, loaded when it is used
        import importlib

        return importlib.import_module("sprint.diffusers")
    raise AttributeError(f"module 'sprint' has no attribute {name!r}")
