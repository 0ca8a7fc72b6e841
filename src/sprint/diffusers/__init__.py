"""SPRINT and diffusers: guidance in its pipelines, loading of wrapped models, and a pipeline of our own.

It needs `pip install 'sprint-diffusion[diffusers]'`, and is loaded when `sprint.diffusers` is first used.
"""

import importlib.util

if importlib.util.find_spec("diffusers") is None:
    raise ModuleNotFoundError("sprint.diffusers needs the package diffusers: pip install diffusers", name="diffusers")

from sprint.diffusers.guidance import PathDropGuidance, path_drop_guidance
from sprint.diffusers.loading import from_pretrained
from sprint.diffusers.pipeline import SprintPipeline

__all__ = ["PathDropGuidance", "SprintPipeline", "from_pretrained", "path_drop_guidance"]
