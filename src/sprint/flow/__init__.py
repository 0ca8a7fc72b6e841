"""Flow matching: interpolants between data and noise, the training loss, guidance, and samplers.

Everything takes a model as `model(x, t, y)`, with t = 0 at the data and t = 1 at the noise; `Velocity` makes one of
models of other conventions.
"""

from sprint.flow.guidance import ClassifierFreeGuidance, PathDropGuidance, SparseGuidance
from sprint.flow.interpolants import CosineInterpolant, DDPMInterpolant, Interpolant, LinearInterpolant
from sprint.flow.loss import FlowMatchingLoss, LogNormalTime, LossOutput, ShiftedTime, UniformTime, repa_loss
from sprint.flow.sampling import Euler, EulerMaruyama, Heun, Solver, State, sample, trajectory
from sprint.flow.velocity import Velocity

__all__ = [
    "ClassifierFreeGuidance",
    "CosineInterpolant",
    "DDPMInterpolant",
    "Euler",
    "EulerMaruyama",
    "FlowMatchingLoss",
    "Heun",
    "Interpolant",
    "LinearInterpolant",
    "LogNormalTime",
    "LossOutput",
    "PathDropGuidance",
    "ShiftedTime",
    "Solver",
    "SparseGuidance",
    "State",
    "UniformTime",
    "Velocity",
    "repa_loss",
    "sample",
    "trajectory",
]
