"""Path-Drop Guidance in pipelines of diffusers, for wrapped transformers; import it as `sprint.diffusers`.

Two ways, by how a pipeline guides. Pipelines that call the transformer twice announce each call with
`cache_context("cond")` and
`cache_context("uncond")`: `path_drop_guidance` sends the second one along the shallow path. Modular pipelines take a guider:
`PathDropGuidance`. In both the guidance scale is the pipeline's or the guider's own, with w = 1 off.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.guiders.classifier_free_guidance import ClassifierFreeGuidance

from sprint.hosts.wrapping import path, state_of


@contextmanager
def path_drop_guidance(transformer: Any) -> Iterator[None]:
    """Within the `with` block, a two-call pipeline's unconditional call takes the shallow path: the middle never runs.

    Args:
        transformer: wrapped, as the pipeline holds it: `with path_drop_guidance(pipe.transformer): pipe(...)`.

    Raises:
        ValueError: the transformer is not wrapped, or is no model of diffusers that announces its calls.
        RuntimeError: on leaving, when no unconditional call was announced: guidance was off, or the pipeline batches both
            calls.
    """
    state_of(transformer)
    host = getattr(transformer, "cache_context", None)
    if host is None:
        raise ValueError(
            f"{type(transformer).__name__} has no cache_context: guide it with sprint.PathDropGuidance and sprint.sample"
        )
    calls = 0

    @contextmanager
    def announced(name: str, **kwargs: Any) -> Iterator[None]:
        nonlocal calls
        with host(name, **kwargs):
            if name != "uncond":
                yield
                return
            calls += 1
            with path(transformer, "shallow"):
                yield

    transformer.__dict__["cache_context"] = announced
    try:
        yield
    finally:
        del transformer.__dict__["cache_context"]
    if calls == 0:
        raise RuntimeError(
            "the pipeline announced no unconditional call, so nothing was guided by the shallow path: set "
            "a guidance scale above 1 and a "
            "negative prompt, or use a pipeline that calls the transformer once for each branch"
        )


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
