"""Our transformer, `SiT`, with the sparse middle built in; its sizes, and the checkpoints of others.

Layers are in `layers`, sizes in `config`; `reference` and `original` read what the authors of SPRINT, SiT, DiT and REPA
wrote, `loading` any of ours and the former.
"""

from sprint.models.config import PRESETS, SiTConfig
from sprint.models.loading import load_model
from sprint.models.original import from_original, to_original
from sprint.models.recipe import Recipe
from sprint.models.sit import SiT

__all__ = ["PRESETS", "Recipe", "SiT", "SiTConfig", "from_original", "load_model", "to_original"]
