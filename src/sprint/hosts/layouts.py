"""Where a model's image tokens stand, read from the arguments of its `forward`: their grid, how many they are, where they
begin.

Most of it is read off shapes. Where only the values of a small tensor tell it, such as `img_ids`, that tensor is copied to
the host, once for as long as it lives. It cannot be while torch.compile traces or a CUDA graph is captured: then nothing is
found, and a grid that the user gave stands.
"""

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sprint.hosts.declare import Arguments

Grid = tuple[int, ...]
_READ = WeakTensorKeyDictionary()  # by tensor: its version, and what was found in it, by what was asked


def of_latents(model: Any, arguments: Arguments) -> Grid:
    """Grid of x (B, C, F, H, W), or (B, C, H, W)."""
    return _patched(model, arguments["hidden_states"].shape[2:])


def of_frames_first(model: Any, arguments: Arguments) -> Grid:
    """Grid of x (B, F, C, H, W)."""
    frames, _, *sides = arguments["hidden_states"].shape[1:]
    return _patched(model, (frames, *sides))


def of_channels_last(model: Any, arguments: Arguments) -> Grid:
    """Grid of x (B, F, H, W, C)."""
    return _patched(model, arguments["hidden_states"].shape[1:4])


def of_items(model: Any, arguments: Arguments) -> Grid:
    """Grid of x (B, C, F, H, W), or of one of the items in x (B, items, C, F, H, W)."""
    return _patched(model, arguments["hidden_states"].shape[-3:])


def of_later_frames(model: Any, arguments: Arguments) -> Grid:
    """Grid of a video whose first frame, in image-to-video by token replacement, the blocks treat by itself."""
    frames, rows, columns = of_latents(model, arguments)
    return frames - (getattr(model.config, "image_condition_type", None) == "token_replace"), rows, columns


def of_sides(model: Any, arguments: Arguments) -> Grid | None:
    """Grid of packed tokens whose sides are arguments."""
    sides = tuple(arguments.get(name) for name in ("num_frames", "height", "width"))
    return None if None in sides else sides  # pyright: ignore[reportReturnType]


def of_list(model: Any, arguments: Arguments) -> Grid:
    """Grid of a Z-Image batch, a list of x (C, F, H, W)."""
    frames, side = arguments.get("f_patch_size", 1), arguments.get("patch_size", 2)
    return _common([(x.shape[1] // frames, x.shape[2] // side, x.shape[3] // side) for x in arguments["x"]])


def of_shapes(model: Any, arguments: Arguments) -> Grid:
    """Grid of packed tokens with the shapes of the image and then of its references, [[(frames, rows, columns), …], …]."""
    samples = arguments["img_shapes"] if "img_shapes" in arguments else arguments["shape_list"]
    return _common([tuple(sample[0] if isinstance(sample, list) else sample) for sample in samples])


def of_last_shape(model: Any, arguments: Arguments) -> Grid:
    """Grid of a Qwen-Image 2.1 target, behind the shapes of its condition images."""
    return tuple(arguments["img_shapes"][0][-1])


def of_ids(model: Any, arguments: Arguments) -> Grid | None:
    """Grid of packed tokens with the place of each, `img_ids` (N, axes), (time, row, column, …); references that come behind
    have another time."""
    ids = arguments["img_ids"] if "img_ids" in arguments else arguments["position_ids"]
    return _read(_first_image, ids[0] if ids.ndim == 3 else ids, arguments["hidden_states"].shape[1])


def of_last_rows(model: Any, arguments: Arguments) -> Grid | None:
    """Grid of the image or video at the end of a stream, by the (time, row, column) of each of its tokens."""
    ids, rows = arguments["position_ids"], _last_rows(arguments)
    return None if rows is None else _read(_lattice, ids[0] if ids.ndim == 3 else ids, rows)


def last_rows(model: Any, arguments: Arguments, length: int) -> int:
    """How many tokens at the end of a stream are those of the image or video that is made."""
    rows = _last_rows(arguments)
    if rows is None and model.sprint.grid is None:
        raise ValueError(
            f"{type(model).__name__} tells where its image is by the values of its arguments, which cannot be read while "
            "torch.compile traces it, nor in a CUDA graph: give its grid, sprint.wrap(…, grid=(rows, columns))"
        )
    return math.prod(model.sprint.grid) if rows is None else rows


def all_before_decoder(model: Any, arguments: Arguments, length: int) -> int:
    """All tokens of a Motif video, whose last blocks, a decoder, work on others: the middle must end before them."""
    layers = model.config.num_decoder_layers
    if model.sprint.options["decoder_depth"] < layers:
        raise ValueError(
            f"the last {layers} blocks of {type(model).__name__} work on other tokens than those before: wrap it with "
            f"decoder_depth={layers} or more"
        )
    return length


def with_context(model: Any, arguments: Arguments, length: int) -> int:
    """How many tokens the image and the condition images behind it have, in Bria Fibo 2."""
    images = (arguments["hidden_states"], *(arguments.get("context_latents") or ()))
    return sum(math.prod(_patched(model, image.shape[2:])) for image in images)


def gist_starts(model: Any, arguments: Arguments) -> Tensor | None:
    """Where a Bria Fibo 2 image begins: behind its gist tokens, but before them where samples have not as many."""
    mask, c = arguments.get("encoder_attention_mask"), model.config
    if mask is None:
        return None
    lengths = mask.sum(dim=1).tolist()
    limits = (c.min_num_gist_tokens, c.max_num_gist_tokens, c.gist_step, c.gist_min_text_len, c.gist_max_text_len)
    counts = sys.modules[type(model).__module__].compute_gist_count(lengths, *limits)
    return None if len({*counts}) == 1 else torch.zeros(len(lengths), dtype=torch.long)


def _patched(model: Any, lengths: Sequence[int]) -> Grid:
    patch = model.config.patch_size
    sides = patch if isinstance(patch, (tuple, list)) else (getattr(model.config, "patch_size_t", None) or 1, patch, patch)
    return tuple(length // side for length, side in zip(lengths, sides[-len(lengths) :], strict=True))


def _common(shapes: Sequence[Grid]) -> Grid:
    """The one shape of all samples; only its length where they differ in sides."""
    lengths = {math.prod(shape) for shape in shapes}
    if len(lengths) != 1:
        raise ValueError(
            f"images of {sorted(lengths)} tokens in one batch: tokens can be dropped where all samples have as many"
        )
    return shapes[0] if len(set(shapes)) == 1 else (*lengths,)


def _read(function: Callable[..., Any], tensor: Tensor, *args: int) -> Any:
    """What the function finds in a tensor's values; None where they cannot be read."""
    if torch.compiler.is_compiling():
        return None
    if tensor.is_inference():
        return function(tensor.cpu(), *args)
    if tensor not in _READ or _READ[tensor][0] != tensor._version:
        _READ[tensor] = (tensor._version, {})
    _, found = _READ[tensor]
    if (function, args) not in found:
        if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        found[function, args] = function(tensor.cpu(), *args)
    return found[function, args]


def _first_image(ids: Tensor, length: int) -> Grid:
    """Of the last `length` places, those up to the first of another time."""
    ids = ids[ids.shape[0] - length :]
    others = (ids[:, 0] != ids[0, 0]).nonzero()
    return _lattice(ids[: int(others[0]) if len(others) else None, 1:3], length)


def _lattice(ids: Tensor, length: int) -> Grid:
    """Sides of a grid that the last places (N, axes) name row by row; (N,) if they name none."""
    ids = ids[-length:]
    sides = tuple(len(axis.unique()) for axis in ids.unbind(dim=1))
    if math.prod(sides) != len(ids):
        return (len(ids),)
    for axis, places in enumerate(ids.unbind(dim=1)):
        lines = places.view(sides).movedim(axis, 0).flatten(1)
        if not (lines == lines[:, :1]).all():
            return (len(ids),)
    return sides


def _last_rows(arguments: Arguments) -> int | None:
    if "indicator" in arguments:
        return _read(_marked, arguments["indicator"])
    return _read(_run, arguments["video_indices"])


def _marked(indicator: Tensor) -> int:
    """How many tokens are Ideogram's image, which ends the stream."""
    image = indicator == 2
    rows = {*image.sum(dim=1).tolist()}
    if len(rows) != 1 or not image[:, -max(rows) :].all():
        raise ValueError(
            f"images of {sorted(rows)} tokens, not all at the end of the stream: tokens can be dropped where all samples of "
            "a batch have as many, there"
        )
    return rows.pop()


def _run(indices: Tensor) -> int:
    """How many consecutive numbers end the indices."""
    breaks = (indices.diff() != 1).nonzero()
    return len(indices) - (int(breaks[-1]) + 1 if len(breaks) else 0)
