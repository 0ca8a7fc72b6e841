"""What pretrained models of known kinds predict, how they count time, and how they are called.

Sources: the pipelines of diffusers 0.42 for its classes; DiT (arXiv 2212.09748) and SiT (arXiv 2401.08740) for the rest.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from sprint.flow.interpolants import Prediction

Call = Callable[[Any, Tensor, Tensor, Any], Any]


def plain(model: Any, x: Tensor, time: Tensor, y: Any) -> Any:
    """`model(x, time, y)`; a dictionary of conditions by name, and none where there is none."""
    if isinstance(y, Mapping):
        return model(x, time, **y)
    return model(x, time) if y is None else model(x, time, y)


def patches(model: Any, x: Tensor) -> int:
    """Tokens of x (B, C, H, W) or (B, C, F, H, W), by the model's patch size; of packed tokens (B, N, C), as they are."""
    if x.ndim == 3:
        return x.shape[1]
    config = getattr(model, "config", model)
    if (patch := getattr(config, "patch_size", None)) is None:
        raise ValueError(
            f"{type(model).__name__} tells no patch_size, so that its tokens cannot be counted, by which the scheduler "
            "shifts its times: turn use_dynamic_shifting off, or set the shift yourself"
        )
    sides = patch if isinstance(patch, tuple | list) else (getattr(config, "patch_size_t", None) or 1, patch, patch)
    return math.prod(length // side for length, side in zip(x.shape[2:], sides[-(x.ndim - 2) :], strict=True))


def prediction_in(output: Any, model: Any) -> Tensor:
    """The prediction in what a model returns: a tensor, the first of a tuple, or `sample` of an output of diffusers.

    Raises:
        TypeError: none was found.
    """
    output = getattr(output, "sample", output)
    output = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(output, Tensor):
        raise TypeError(
            f"{type(model).__name__} returned {type(output).__name__}, in which no prediction was found: say how it is "
            "called and what of the result is the prediction, "
            "Velocity(model, call=lambda model, x, t, y: model(x, t, y)['x'], …)"
        )
    return output


def in_channels(model: Any) -> int:
    """Channels of x."""
    return getattr(model, "config", model).in_channels


@dataclass(frozen=True)
class Convention:
    """What `Velocity` must know of a model; the fields are its options."""

    prediction: Prediction = "v"
    interpolant: str = "linear"
    time: float | Callable[[Tensor], Tensor] = 1.0
    reverse: bool = False
    channels: Callable[[Any], int] | None = None
    call: Call = plain
    null: Callable[[Any, int], Any] | None = None
    tokens: Callable[[Any, Tensor], int] = patches
    in_channels: Callable[[Any], int] = in_channels
    classes: Callable[[Any], int | None] = lambda model: None


def ddpm_step(t: Tensor) -> Tensor:
    """The step 0 … 999 of DDPM's schedule at time t: step k is t = (k + 1) / 1000."""
    return (1000 * t - 1).clamp(min=0)


def _named(label: str | None = None, **always: Any) -> Call:
    """As diffusers' models are called: by name; a condition that is no dictionary goes to `label`."""

    def call(model: Any, x: Tensor, time: Tensor, y: Any) -> Any:
        if y is not None and not isinstance(y, Mapping):
            if label is None:
                raise TypeError(
                    f"{type(model).__name__} takes several conditions: pass y as a dictionary by the names of its "
                    f"arguments, {{'encoder_hidden_states': …}}, got {type(y).__name__}"
                )
            y = {label: y}
        if reserved := {"hidden_states", "timestep"} & {*(y or {})}:
            raise ValueError(f"y names {', '.join(sorted(reserved))}, which are the state and the time: leave them out of y")
        return model(**{"hidden_states": x, "timestep": time, **always, **(y or {})})

    return call


@lru_cache(maxsize=64)
def _places(rows: int, columns: int, device: torch.device) -> Tensor:
    """`img_ids` of Flux, (N, 3): 0, row, column. Made once, since the grid is read from their values."""
    axes = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(axes[0]), *axes], dim=-1).view(-1, 3).float().to(device)


@lru_cache(maxsize=64)
def _no_places(length: int, device: torch.device) -> Tensor:
    """`txt_ids` of Flux, (L, 3): zeros."""
    return torch.zeros(length, 3, device=device)


def _flux(model: Any, x: Tensor, time: Tensor, y: Any) -> Any:
    """Latents (B, C, H, W) are packed in patches of 2x2, and unpacked; packed ones (B, N, 4 C) pass, with `img_ids` in y."""
    y = dict(y or {})
    if "encoder_hidden_states" in y and y.get("txt_ids") is None:
        y["txt_ids"] = _no_places(y["encoder_hidden_states"].shape[1], x.device)
    if x.ndim == 3:
        return by_name(model, x, time, y)
    if x.ndim != 4 or x.shape[2] % 2 or x.shape[3] % 2:
        raise ValueError(
            f"x must be (B, C, H, W) with even H and W, which are packed in patches of 2x2, got {tuple(x.shape)}"
        )
    rows, columns = x.shape[2] // 2, x.shape[3] // 2
    y.setdefault("img_ids", _places(rows, columns, x.device))
    packed = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
    output = prediction_in(by_name(model, packed, time, y), model)
    return rearrange(output, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, w=columns, p=2, q=2)


def _flux_tokens(model: Any, x: Tensor) -> int:
    return x.shape[1] if x.ndim == 3 else x.shape[2] * x.shape[3] // 4


def _flux_channels(model: Any) -> int:
    return model.config.in_channels // 4


def _row_after_the_last(model: Any, batch: int) -> Tensor:
    device = next(model.parameters()).device
    return torch.full((batch,), _rows(model), device=device)


def _rows(model: Any) -> int:
    return model.config.num_embeds_ada_norm


def _labels(model: Any, batch: int) -> Tensor:
    embedder = model.y_embedder
    return torch.full((batch,), embedder.num_classes, device=embedder.embedding_table.weight.device)


def _classes(model: Any) -> int | None:
    count = getattr(getattr(model, "y_embedder", None), "num_classes", None)
    return count if isinstance(count, int) else None


by_name = _named()
_NO_SIZES = {"resolution": None, "aspect_ratio": None}  # of PixArt's micro-conditions, for models without them
_DDPM: dict[str, Any] = {"prediction": "noise", "interpolant": "ddpm", "time": ddpm_step, "channels": in_channels}

CONVENTIONS: dict[str, Convention] = {
    "DiT": Convention(**_DDPM, null=_labels, classes=_classes),
    "SiT": Convention(reverse=True, null=_labels, classes=_classes),
    "DiTTransformer2DModel": Convention(**_DDPM, call=_named("class_labels"), null=_row_after_the_last, classes=_rows),
    "PixArtTransformer2DModel": Convention(**_DDPM, call=_named(added_cond_kwargs=_NO_SIZES)),
    "SD3Transformer2DModel": Convention(time=1000, call=by_name),
    "FluxTransformer2DModel": Convention(call=_flux, tokens=_flux_tokens, in_channels=_flux_channels),
    "WanTransformer3DModel": Convention(time=1000, call=by_name),
}


def known(model: Any) -> Convention | None:
    """The convention of a model of diffusers; classes of others say too little by their names."""
    for base in type(model).__mro__:
        if base.__module__.startswith("diffusers.") and base.__name__ in CONVENTIONS:
            return CONVENTIONS[base.__name__]
    return None
