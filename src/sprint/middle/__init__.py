"""The method itself: which tokens the middle blocks see, how these run, and how dense and sparse tokens are joined.

Here is the line to change for another drop sampler or another fusion; nothing here knows a model.
"""

from sprint.middle.drop import Drop, RandomDrop, StructuredDrop
from sprint.middle.fusion import Fusion, MaskRestore, SparseDenseResidual, TokenRouting
from sprint.middle.sparse import SparseMiddle
from sprint.middle.tokens import TokenSubset

__all__ = [
    "Drop",
    "Fusion",
    "MaskRestore",
    "RandomDrop",
    "SparseDenseResidual",
    "SparseMiddle",
    "StructuredDrop",
    "TokenRouting",
    "TokenSubset",
]
