"""Path-Drop Guidance in pipelines of diffusers, for wrapped transformers; import it as `sprint.diffusers`.

Three kinds of pipelines. Those that call the transformer once per branch announce each call, `cache_context("uncond")`,
and those that run both branches in one batch do not: `path_drop_guidance` serves both, the pipeline unmodified. Modular
pipelines take a guider: `PathDropGuidance`. The guidance scale is the pipeline's or the guider's own, with w = 1 off.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

from diffusers.guiders.classifier_free_guidance import ClassifierFreeGuidance

from sprint.checkpoint import PathLike, load_weights, read_tensors
from sprint.drop import Drop
from sprint.hosts.wrapping import OPTIONS_FILE, SprintState, path, state_of, wrap


@contextmanager
def path_drop_guidance(transformer: Any, *, weak_half: Literal["first", "second"] | None = None) -> Iterator[None]:
    """Within the `with` block, a pipeline's unconditional prediction takes the shallow path: the middle never runs for it.

    Args:
        transformer: wrapped, as the pipeline holds it: `with path_drop_guidance(pipe.transformer): pipe(...)`.
        weak_half: for pipelines that run both branches in one batch, the half that is unconditional: "first" in most of
            them (SD3, PixArt, Sana, AuraFlow), "second" in DiTPipeline. None: one call per branch.

    Raises:
        ValueError: the transformer is not wrapped, or is no model of diffusers that announces its calls.
        RuntimeError: on leaving, when no unconditional prediction was seen: guidance was off, or the pipeline is of the
            other kind.
    """
    state = state_of(transformer)
    if weak_half not in (None, "first", "second"):
        raise ValueError(f"weak_half must be 'first' or 'second', or None for pipelines of two calls, got {weak_half!r}")
    seen = state.split_calls
    state.weak_half = weak_half
    try:
        with _announced(transformer, state) if weak_half is None else nullcontext():
            yield
    finally:
        state.weak_half = None
    if state.split_calls == seen:
        raise RuntimeError(
            "no unconditional prediction was seen, so nothing was guided by the shallow path: set a guidance scale "
            "above 1; for a pipeline that runs both branches in one batch, pass weak_half"
        )


@contextmanager
def _announced(transformer: Any, state: SprintState) -> Iterator[None]:
    """Calls that are announced as unconditional take the shallow path."""
    host = getattr(transformer, "cache_context", None)
    if host is None:
        raise ValueError(
            f"{type(transformer).__name__} has no cache_context, so no pipeline announces its calls: pass "
            f"weak_half for a pipeline "
            "that runs both branches in one batch, or guide it with sprint.PathDropGuidance and sprint.sample"
        )

    @contextmanager
    def announced(name: str, **kwargs: Any) -> Iterator[None]:
        with host(name, **kwargs):
            if name != "uncond":
                yield
                return
            state.split_calls += 1
            with path(transformer, "shallow"):
                yield

    transformer.__dict__["cache_context"] = announced
    try:
        yield
    finally:
        del transformer.__dict__["cache_context"]


class PathDropGuidance(ClassifierFreeGuidance):
    """Guider for modular pipelines: classifier-free guidance whose unconditional prediction takes the shallow path.

    Arguments, saving and loading are those of `ClassifierFreeGuidance`; `guidance_scale` is w.
    """

    _route: path | None = None

    def prepare_models(self, denoiser: Any) -> None:
        """Before each call: send the unconditional one along the shallow path."""
        super().prepare_models(denoiser)
        if self._is_cfg_enabled() and self.is_unconditional:
            self._route = path(denoiser, "shallow")

    def cleanup_models(self, denoiser: Any) -> None:
        """After each call: back to the path before."""
        if self._route is not None:
            self._route.__exit__()
            self._route = None
        super().cleanup_models(denoiser)


def from_pretrained(model_class: Any, folder: PathLike, *, drop: Drop | None = None, **options: Any) -> Any:
    """Load a wrapped model that was saved with its `save_pretrained`: host, wrapping and fusion.

    Args:
        model_class: class of the host, such as `SD3Transformer2DModel`.
        folder: local folder.
        drop: drop sampler of the sparse path (not in the file).
        **options: of `model_class.from_pretrained`.

    Raises:
        FileNotFoundError: the folder holds no wrapped model.
        ValueError: its tensors do not fit.
    """
    source = Path(folder)
    if not (source / OPTIONS_FILE).is_file():
        raise FileNotFoundError(
            f"{source} has no {OPTIONS_FILE}, so no wrapped model was saved there: load it with "
            f"{model_class.__name__}.from_pretrained and wrap it"
        )
    saved = json.loads((source / OPTIONS_FILE).read_text(encoding="utf-8"))
    if saved["grid"] is not None:
        saved["grid"] = tuple(saved["grid"])
    model = wrap(model_class.from_pretrained(source, **options), drop=drop, **saved)
    fusion = {
        name.removeprefix("sprint."): tensor
        for file in source.glob("*.safetensors")
        for name, tensor in read_tensors(file)[0].items()
        if name.startswith("sprint.")
    }
    load_weights(model.sprint, fusion, source=str(source))
    return model
