"""Wrapped models of diffusers that were saved with their `save_pretrained`, loaded again: host, wrapping and fusion."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers.utils.constants import SAFETENSORS_WEIGHTS_NAME

from sprint.checkpoint import PathLike, load_weights, read_tensors
from sprint.hosts.wrapping import OPTIONS_FILE, wrap
from sprint.middle.drop import Drop

_IGNORED = "_keys_to_ignore_on_load_unexpected"


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
    if not fusion and model.sprint.state_dict():
        raise ValueError(
            f"the weights in {source} hold no fusion, though {OPTIONS_FILE} is there: a model that was not wrapped was saved"
            f" over them. Load it with {model_class.__name__}.from_pretrained, or delete {OPTIONS_FILE} and wrap it anew"
        )
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
