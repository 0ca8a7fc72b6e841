"""Path-Drop Guidance in pipelines of diffusers, for wrapped transformers.

Three kinds of pipelines. Those that call the transformer once per branch announce each call, `cache_context("uncond")`,
and those that run both branches in one batch do not: `path_drop_guidance` serves both, the pipeline unmodified. Modular
pipelines take a guider: `PathDropGuidance`. The guidance scale is the pipeline's or the guider's own, with w = 1 off.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

from diffusers.guiders.classifier_free_guidance import ClassifierFreeGuidance

from sprint.hosts.wrapping import SprintState, path, state_of


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
    state.weak_half, state.weak_ran = weak_half, False
    try:
        with _announced(transformer, state) if weak_half is None else nullcontext():
            yield
    finally:
        state.weak_half = None
    if not state.weak_ran:
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

    def prepare_models(self, denoiser: Any) -> None:
        """Before each call: send the unconditional one along the shallow path."""
        _end_guider_path(denoiser)  # of a call that failed
        super().prepare_models(denoiser)
        if self._is_cfg_enabled() and self.is_unconditional:
            state_of(denoiser).guider_path = path(denoiser, "shallow")

    def cleanup_models(self, denoiser: Any) -> None:
        """After each call: back to the path before."""
        _end_guider_path(denoiser)
        super().cleanup_models(denoiser)


def _end_guider_path(denoiser: Any) -> None:
    state = state_of(denoiser)
    if state.guider_path is not None:
        state.guider_path.__exit__()
        state.guider_path = None
