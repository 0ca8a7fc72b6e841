"""CUDA graphs: recording a call once and replaying it, without waiting for launches.

`CapturedModel` does it for sampling; `TrainStep` uses the same parts for a whole training step.
"""

from sprint.capture.compiling import blocks_of, compile_blocks
from sprint.capture.model import CapturedModel

__all__ = ["CapturedModel", "blocks_of", "compile_blocks"]
