"""A run: the whole step, the optimizer, the average, both stages, the order of the data, checkpoints, several processes.

`TrainStep` is one call; the others are for loops of your own.
"""

from sprint.training.optim import AdamW
from sprint.training.order import Batches, DataOrder, seed_of
from sprint.training.parallel import distribute, full_state, leave, load_full_state
from sprint.training.runs import RunFolder
from sprint.training.schedule import Moment, Stage, TwoStage
from sprint.training.step import StepOutput, TrainStep

__all__ = [
    "AdamW",
    "Batches",
    "DataOrder",
    "Moment",
    "RunFolder",
    "Stage",
    "StepOutput",
    "TrainStep",
    "TwoStage",
    "distribute",
    "full_state",
    "leave",
    "load_full_state",
    "seed_of",
]
