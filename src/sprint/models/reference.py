"""The checkpoint layout of the SPRINT authors: names, sizes and options read off their tensors, and written back.

The layout is that of the released checkpoints (256, 256 with REPA, 512), as far as its names and shapes go:
`encoder_blocks`, `middle_blocks`, `decoder_blocks`, `renoise_linear` (the fusion) and `mask_token`; the rest is named alike.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sprint.models.config import SiTConfig

_NAMES = (  # theirs, ours
    ("encoder_blocks.", "encoder."),
    ("middle_blocks.", "middle.blocks."),
    ("decoder_blocks.", "decoder."),
    ("renoise_linear.", "middle.fusion.proj."),
    ("mask_token", "middle.fusion.mask_token"),
)
_MARK = "renoise_linear.weight"  # the tensor that every SPRINT checkpoint has
_CONFIG = "config"  # metadata key, JSON


def to_ours(tensors: Mapping[str, Tensor], *, prefix: str | None, source: str) -> dict[str, Tensor]:
    """Rename the tensors of one model in a reference checkpoint to our names.

    Args:
        tensors: the whole checkpoint.
        prefix: of the model's keys; None finds it.
        source: what errors call the checkpoint.

    Raises:
        ValueError: no model under the prefix, or several to choose from.
    """
    found = sorted(name.removesuffix(_MARK) for name in tensors if name.endswith(_MARK))
    if prefix is None:
        if len(found) > 1:
            raise ValueError(f"{source} holds several models, under the prefixes {found}: choose one with prefix=…")
        prefix = found[0] if found else ""
    if prefix not in found:
        raise ValueError(
            f"{source} holds no SPRINT model under the prefix {prefix!r} (no tensor {prefix + _MARK!r}); it has "
            f"{', '.join(sorted(tensors)[:3])}, …: expected the authors' key names; our own checkpoints load with SiT.load"
        )
    return {
        _rename(name.removeprefix(prefix), _NAMES): tensor for name, tensor in tensors.items() if name.startswith(prefix)
    }


def to_theirs(tensors: Mapping[str, Tensor], config: SiTConfig) -> dict[str, Tensor]:
    """Rename our tensors to the reference's names.

    Raises:
        ValueError: the model has options that the layout cannot express.
    """
    if config.num_classes is None or config.sources != "both" or config.positions != "rope" or not config.qk_norm:
        raise ValueError(
            "the reference layout holds class-conditional models with sources='both', rotary positions and qk_norm, got "
            f"num_classes={config.num_classes}, sources={config.sources!r}, positions={config.positions!r}, "
            f"qk_norm={config.qk_norm}: use SiT.save"
        )
    return {_rename(name, [(ours, theirs) for theirs, ours in _NAMES]): tensor for name, tensor in tensors.items()}


def infer_config(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    patch_size: int | None,
    repa_depth: int | None,
    source: str,
) -> SiTConfig:
    """Read all sizes off the tensors (under our names), and what they cannot tell off the metadata.

    Raises:
        ValueError: a tensor that tells a size is missing, or the sizes contradict each other.
    """
    try:
        said = json.loads(metadata.get(_CONFIG, "{}"))
        told = {name: int(said[name]) for name in ("patch_size", "representation_depth") if name in said}
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{source} holds options that cannot be read ({error}): pass patch_size=…") from error

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors:
            raise ValueError(f"{source} is no whole SPRINT checkpoint: it has no tensor {name}")
        return tuple(tensors[name].shape)

    def depth(blocks: str) -> int:
        numbers = {int(found[1]) for name in tensors if (found := re.match(rf"{re.escape(blocks)}\.(\d{{1,9}})\.", name))}
        if numbers != set(range(len(numbers))):
            raise ValueError(f"{source} has {len(numbers)} blocks of {blocks}, which are not numbered from 0 on")
        return len(numbers)

    dim, patch_dim = shape("x_embedder.proj.weight")
    first = next(
        blocks for blocks in ("encoder.0", "middle.blocks.0", "decoder.0") if depth(blocks[:-2]) or blocks == "decoder.0"
    )
    if patch_size is None:
        patch_size = told.get("patch_size", 2)
    if patch_size < 1 or patch_dim % patch_size**2:
        raise ValueError(
            f"{source} has patch vectors of {patch_dim} values, no multiple of {patch_size}²: pass patch_size=…"
        )
    repa: dict[str, Any] = {}
    if "projectors.4.weight" in tensors:
        repa_dim, repa_hidden = shape("projectors.4.weight")
        if repa_depth is None and "representation_depth" in told:
            repa_depth = told["representation_depth"] - 1  # theirs counts from 1, ours the blocks that have run
        repa = {"repa_dim": repa_dim, "repa_hidden": repa_hidden}
    return SiTConfig(
        dim=dim,
        heads=dim // shape(f"{first}.attn.q_norm.weight")[0],
        encoder_depth=depth("encoder"),
        middle_depth=depth("middle.blocks"),
        decoder_depth=depth("decoder"),
        patch_size=patch_size,
        in_channels=patch_dim // patch_size**2,
        mlp_ratio=shape(f"{first}.mlp.fc1.weight")[0] / dim,
        num_classes=shape("y_embedder.embedding_table.weight")[0] - 1,
        repa_depth=repa_depth,
        **repa,
    )


def metadata(config: SiTConfig) -> dict[str, str]:
    """What the tensors cannot tell, under the reference's option names."""
    said: dict[str, Any] = {
        "hidden_size": config.dim,
        "num_heads": config.heads,
        "patch_size": config.patch_size,
        "in_channels": config.in_channels,
        "encoder_depth": config.encoder_depth,
        "middle_depth": config.middle_depth,
        "decoder_depth": config.decoder_depth,
        "mlp_ratio": config.mlp_ratio,
        "num_classes": config.num_classes,
        "representation_align": config.repa_dim is not None,
    }
    if config.repa_depth is not None:
        said["representation_depth"] = config.repa_depth + 1
    return {_CONFIG: json.dumps(said)}


def _rename(name: str, names: Any) -> str:
    for old, new in names:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
