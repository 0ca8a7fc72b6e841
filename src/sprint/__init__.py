"""SPRINT: train and sample diffusion transformers with most tokens dropped (arXiv 2510.21986).

drop = sprint.StructuredDrop(0.75)                                # which tokens the middle blocks see
out = sprint.FlowMatchingLoss()(model, images, y=labels, drop=drop)
images = sprint.sample(model, noise, y=labels, guidance=sprint.PathDropGuidance(2.0))
"""

from sprint.checkpoint import load_state, save_state
from sprint.config import SiTConfig
from sprint.costs import Cost, cost
from sprint.counting import PathCost
from sprint.drop import Drop, RandomDrop, StructuredDrop
from sprint.flow import FlowMatchingLoss, LogNormalTime, LossOutput, ShiftedTime, UniformTime, repa_loss
from sprint.fusion import MaskRestore, SparseDenseResidual, TokenRouting
from sprint.guidance import ClassifierFreeGuidance, PathDropGuidance, SparseGuidance
from sprint.hardware import Hardware
from sprint.hosts import Blocks, Host, Report, Table, check, path, register, registered, unwrap, wrap
from sprint.inference import CapturedModel
from sprint.interpolants import CosineInterpolant, DDPMInterpolant, Interpolant, LinearInterpolant
from sprint.latents import LatentDataset, draw_latents
from sprint.middle import SparseMiddle
from sprint.optim import AdamW
from sprint.runs import RunFolder
from sprint.sampling import Euler, EulerMaruyama, Heun, State, sample, trajectory
from sprint.schedule import Stage, TwoStage
from sprint.sit import SiT
from sprint.step import StepOutput, TrainStep
from sprint.tokens import TokenSubset

__version__ = "0.1.0"

__all__ = [
    "AdamW",
    "Blocks",
    "CapturedModel",
    "ClassifierFreeGuidance",
    "CosineInterpolant",
    "Cost",
    "DDPMInterpolant",
    "Drop",
    "Euler",
    "EulerMaruyama",
    "FlowMatchingLoss",
    "Hardware",
    "Heun",
    "Host",
    "Interpolant",
    "LatentDataset",
    "LinearInterpolant",
    "LogNormalTime",
    "LossOutput",
    "MaskRestore",
    "PathCost",
    "PathDropGuidance",
    "RandomDrop",
    "Report",
    "RunFolder",
    "ShiftedTime",
    "SiT",
    "SiTConfig",
    "SparseDenseResidual",
    "SparseGuidance",
    "SparseMiddle",
    "Stage",
    "State",
    "StepOutput",
    "StructuredDrop",
    "Table",
    "TokenRouting",
    "TokenSubset",
    "TrainStep",
    "TwoStage",
    "UniformTime",
    "check",
    "cost",
    "draw_latents",
    "load_state",
    "path",
    "register",
    "registered",
    "repa_loss",
    "sample",
    "save_state",
    "trajectory",
    "unwrap",
    "wrap",
]
