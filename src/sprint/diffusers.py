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
from diffusers.utils.constants import SAFETENSORS_WEIGHTS_NAME

from sprint.checkpoint import PathLike, load_weights, read_tensors
from sprint.drop import Drop
from sprint.hosts.wrapping import OPTIONS_FILE, SprintState, path, state_of, wrap

_IGNORED = "_keys_to_ignore_on_load_unexpected"


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


def from_pretrained(model_class: Any, folder: PathLike, *, drop: Drop | None = None, **options: Any) -> Any:
    """Load a wrapped model that was saved with its `save_pretrained`: host, wrapping and fusion.

    Args:
        model_class: class of the host, such as `SD3Transformer2DModel`.
        folder: local folder.
        drop: drop sampler of the sparse path (not in the file).
        **options: of `model_class.from_pretrained`, such as `variant`, `subfolder` and `torch_dtype`.

    Raises:
        FileNotFoundError: the folder holds no wrapped model, or its weights are not in safetensors files of this variant.
        ValueError: its tensors do not fit.
    """
    source = Path(folder, options.get("subfolder") or "")
    if not (source / OPTIONS_FILE).is_file():
        raise FileNotFoundError(
            f"{source} has no {OPTIONS_FILE}, so no wrapped model was saved there: load it with "
            f"{model_class.__name__}.from_pretrained and wrap it"
        )
    saved = json.loads((source / OPTIONS_FILE).read_text(encoding="utf-8"))
    if saved["grid"] is not None:
        saved["grid"] = tuple(saved["grid"])
    files = _weight_files(source, options.get("variant"))
    with _fusion_expected(model_class):
        model = wrap(model_class.from_pretrained(folder, **options), drop=drop, **saved)
    fusion = {
        name.removeprefix("sprint."): tensor
        for file in files
        for name, tensor in read_tensors(file)[0].items()
        if name.startswith("sprint.")
    }
    load_weights(model.sprint, fusion, source=str(source))
    return model


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The files that `save_pretrained` wrote with this variant, one or as many as its index names."""
    suffix = f".{variant}" if variant else ""
    index = folder / f"{SAFETENSORS_WEIGHTS_NAME}.index{suffix}.json"
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(names))]
    stem, extension = SAFETENSORS_WEIGHTS_NAME.rsplit(".", 1)
    file = folder / f"{stem}{suffix}.{extension}"
    if not file.is_file():
        there = ", ".join(sorted(path.name for path in folder.iterdir() if path.suffix != ".json")) or "nothing"
        raise FileNotFoundError(
            f"{folder} has no {file.name}, there is {there}: choose the variant that was saved, and save weights with "
            "save_pretrained(..., safe_serialization=True)"
        )
    return [file]


@contextmanager
def _fusion_expected(model_class: Any) -> Iterator[None]:
    """diffusers does not warn of the fusion's tensors, which are loaded after it."""
    own = [vars(model_class)[_IGNORED]] if _IGNORED in vars(model_class) else []
    setattr(model_class, _IGNORED, [*(getattr(model_class, _IGNORED, None) or ()), r"^sprint\."])
    try:
        yield
    finally:
        if own:
            setattr(model_class, _IGNORED, own[0])
        else:
            delattr(model_class, _IGNORED)
