"""The declared architectures, one entry each; see `sprint.hosts.declare` for the words."""

import inspect
import math
from typing import Any

from torch import nn

from sprint.hosts.declare import Arguments, Blocks, Host, Table, declare, pattern

_CONTROL: dict[str, str] = dict.fromkeys(
    ("controlnet_block_samples", "controlnet_single_block_samples", "block_controlnet_hidden_states"),
    "because the model's own loop adds full-length residuals between its blocks",
)
_ROPE = {"image_rotary_emb": Table(dim=0, batched=False)}  # (N, D), no batch
_JOINT_ROPE = {"image_rotary_emb": Table(dim=0, batched=False, stream="text+image")}
_CROSS = ("encoder_hidden_states", "encoder_attention_mask")  # texts that may have as many tokens as the image
_TEXT_FIRST: dict[str, Any] = {"text": "encoder_hidden_states", "returns": ("text", "image")}
_IMAGE_FIRST: dict[str, Any] = {"text": "encoder_hidden_states", "returns": ("image", "text")}


def _patched_video(model: Any, arguments: Arguments) -> tuple[int, ...]:
    """Grid of x (B, C, F, H, W) with patch sizes in the configuration."""
    patch, x = model.config.patch_size, arguments["hidden_states"]
    sides = patch if isinstance(patch, (tuple, list)) else (getattr(model.config, "patch_size_t", None) or 1, patch, patch)
    return tuple(length // side for length, side in zip(x.shape[2:], sides, strict=True))


def _frames_first_video(model: Any, arguments: Arguments) -> tuple[int, ...]:
    """Grid of x (B, F, C, H, W)."""
    x, c = arguments["hidden_states"], model.config
    return x.shape[1] // (c.patch_size_t or 1), x.shape[3] // c.patch_size, x.shape[4] // c.patch_size


def _told_video(model: Any, arguments: Arguments) -> tuple[int, ...] | None:
    """Grid of packed tokens whose sides are arguments."""
    sides = tuple(arguments.get(name) for name in ("num_frames", "height", "width"))
    return None if None in sides else sides  # pyright: ignore[reportReturnType]


def _first_shape(model: Any, arguments: Arguments) -> tuple[int, ...] | None:
    """Grid of packed tokens with img_shapes, [[(frames, rows, columns), references...]]; None when samples differ."""
    shapes = {_shapes_of(sample)[0] for sample in arguments["img_shapes"]}
    return shapes.pop() if len(shapes) == 1 else None


def _references(model: Any, arguments: Arguments) -> tuple[int, int]:
    """Reference images come after the image, and are always kept."""
    counts = {sum(math.prod(shape) for shape in _shapes_of(sample)[1:]) for sample in arguments["img_shapes"]}
    if len(counts) != 1:
        raise ValueError(
            f"reference images of {sorted(counts)} tokens in one batch: tokens can be dropped where all samples have as many"
        )
    return 0, counts.pop()


def _shapes_of(sample: Any) -> list[tuple[int, ...]]:
    return [tuple(shape) for shape in (sample if isinstance(sample, list) else [sample])]


def _first_frame(model: Any, arguments: Arguments) -> tuple[int, int]:
    """Image-to-video by token replacement: the blocks treat the first frame by itself, so that it is always kept."""
    if getattr(model.config, "image_condition_type", None) != "token_replace":
        return 0, 0
    _, rows, columns = _patched_video(model, arguments)
    return rows * columns, 0


def _other_frames(model: Any, arguments: Arguments) -> tuple[int, ...]:
    frames, rows, columns = _patched_video(model, arguments)
    return frames - bool(_first_frame(model, arguments)[0]), rows, columns


def _after_caption(model: Any, arguments: Arguments, length: int) -> int:
    """Image tokens of a Lumina 2 stream, [caption | image | padding]."""
    x, p = arguments["hidden_states"], model.config.patch_size
    return x.shape[2] * x.shape[3] // p**2


def _padded_images(model: Any, arguments: Arguments, length: int) -> int:
    """Image tokens of a Z-Image stream, [image | caption], each image padded to a multiple of 32 tokens."""
    p, pf = arguments.get("patch_size", 2), arguments.get("f_patch_size", 1)
    counts = {(c.shape[1] // pf) * (c.shape[2] // p) * (c.shape[3] // p) for c in arguments["x"]}
    if len(counts) != 1:
        raise ValueError(
            f"images of {sorted(counts)} tokens in one batch: tokens can be dropped in batches of one size only"
        )
    return -(-counts.pop() // 32) * 32


declare(
    "diffusers.DiTTransformer2DModel",
    Host(
        (Blocks("transformer_blocks"),),
        note="its blocks drop labels one by one in training: set the blocks' dropout_prob to 0 and drop labels outside",
    ),
)
declare(
    "diffusers.PixArtTransformer2DModel",
    Host((Blocks("transformer_blocks", tables={"attention_mask": Table(dim=-1)}, others=_CROSS),)),
)
declare("diffusers.SD3Transformer2DModel", Host((Blocks("transformer_blocks", **_TEXT_FIRST),), refused=_CONTROL))
declare(
    "diffusers.FluxTransformer2DModel",
    Host(
        tuple(
            Blocks(name, tables=_JOINT_ROPE, **_TEXT_FIRST) for name in ("transformer_blocks", "single_transformer_blocks")
        ),
        refused=_CONTROL,
    ),
)
declare(
    "diffusers.LongCatImageTransformer2DModel",
    Host(
        tuple(
            Blocks(name, tables=_JOINT_ROPE, **_TEXT_FIRST) for name in ("transformer_blocks", "single_transformer_blocks")
        ),
    ),
)
declare(
    "diffusers.Krea2Transformer2DModel",
    Host(
        (
            Blocks(
                "transformer_blocks",
                stream="text+image",
                tables=_JOINT_ROPE | {"attention_mask": Table(dim=3, stream="text+image")},
            ),
        ),
        image_tokens=lambda model, arguments, length: arguments["hidden_states"].shape[1],
    ),
)
declare(
    "diffusers.ChromaTransformer2DModel",
    Host(
        (
            Blocks("transformer_blocks", tables=_JOINT_ROPE | {"attention_mask": Table(stream="text+image")}, **_TEXT_FIRST),
            Blocks(
                "single_transformer_blocks",
                stream="text+image",
                tables=_JOINT_ROPE | {"attention_mask": Table(stream="text+image")},
            ),
        ),
        refused=_CONTROL,
    ),
)
declare(
    "diffusers.AuraFlowTransformer2DModel",
    Host(
        (
            Blocks("joint_transformer_blocks", **_TEXT_FIRST),
            Blocks("single_transformer_blocks", stream="text+image"),
        )
    ),
)
declare(
    "diffusers.SanaTransformer2DModel",
    Host(
        (Blocks("transformer_blocks", sides=("height", "width"), others=_CROSS),),
        refused=_CONTROL,
        note="its blocks unfold the tokens for a convolution: one token per group can be kept, StructuredDrop(0.75)",
    ),
)
declare(
    "diffusers.Lumina2Transformer2DModel",
    Host(
        (
            Blocks(
                "layers",
                stream="text+image",
                tables={
                    "attention_mask": Table(stream="text+image"),
                    "image_rotary_emb": Table(stream="text+image"),
                },
            ),
        ),
        image_tokens=_after_caption,
        image_starts=lambda model, arguments: arguments["encoder_attention_mask"].sum(dim=1),
    ),
)
declare(
    "diffusers.ZImageTransformer2DModel",
    Host(
        (
            Blocks(
                "layers",
                stream="image+text",
                tables={name: Table(stream="image+text") for name in ("attn_mask", "freqs_cis", "noise_mask")},
            ),
        ),
        image_tokens=_padded_images,
        width="dim",
        refused=_CONTROL
        | dict.fromkeys(("siglip_feats", "image_noise_mask"), "because the captions then come before the images"),
        note="images are padded to a multiple of 32 tokens, which leaves no grid: use RandomDrop",
    ),
)
declare(
    "diffusers.CogVideoXTransformer3DModel",
    Host(
        (Blocks("transformer_blocks", tables=_ROPE, **_IMAGE_FIRST),),
        grid=_frames_first_video,
    ),
)
declare(
    "diffusers.WanTransformer3DModel",
    Host(
        (Blocks("blocks", tables={"rotary_emb": Table(), "temb": Table(ndim=4)}, others=_CROSS),),
        grid=_patched_video,
    ),
)
declare(
    "diffusers.HunyuanVideoTransformer3DModel",
    Host(
        (
            Blocks(
                "transformer_blocks",
                tables={
                    "freqs_cis": Table(dim=0, batched=False),
                    "attention_mask": Table(dim=3, stream="image+text"),
                },
                **_IMAGE_FIRST,
            ),
            Blocks(
                "single_transformer_blocks",
                tables=_ROPE
                | {
                    "attention_mask": Table(dim=3, stream="image+text"),
                },
                **_IMAGE_FIRST,
            ),
        ),
        grid=_other_frames,
        always_kept=_first_frame,
        note="with image-to-video by token replacement the first frame is always kept",
    ),
)
declare(
    "diffusers.LTXVideoTransformer3DModel",
    Host(
        (Blocks("transformer_blocks", tables={"image_rotary_emb": Table(), "temb": Table()}, others=_CROSS),),
        grid=_told_video,
    ),
)
declare(
    "diffusers.QwenImageTransformer2DModel",
    Host(
        (
            Blocks(
                "transformer_blocks",
                tables={
                    "image_rotary_emb": Table(dim=0, batched=False, item=0),
                    "modulate_index": Table(),
                },
                **_TEXT_FIRST,
            ),
        ),
        grid=_first_shape,
        always_kept=_references,
        refused=_CONTROL,
    ),
)
declare(
    "diffusers.PRXTransformer2DModel",
    Host(
        (Blocks("blocks", tables={"image_rotary_emb": Table(dim=2)}, others=(*_CROSS, "attention_mask")),),
        width="hidden_size",
    ),
)
declare(
    "diffusers.HunyuanDiT2DModel",
    Host(
        (Blocks("blocks", tables=_ROPE, others=(*_CROSS, "skip")),),
        refused=_CONTROL,
        note="long skips join block i to the block as far from the end: use as many decoder as encoder blocks",
    ),
)
declare("diffusers.CogView4Transformer2DModel", Host((Blocks("transformer_blocks", tables=_ROPE, **_IMAGE_FIRST),)))
declare(
    "diffusers.MochiTransformer3DModel",
    Host(
        (
            Blocks(
                "transformer_blocks",
                tables={"image_rotary_emb": Table(dim=0, batched=False)},
                **_IMAGE_FIRST,
            ),
        ),
        grid=_patched_video,
    ),
)
declare(
    "diffusers.Flux2Transformer2DModel",
    Host(
        (
            Blocks("transformer_blocks", tables=_JOINT_ROPE, **_TEXT_FIRST),
            Blocks("single_transformer_blocks", stream="text+image", tables=_JOINT_ROPE),
        )
    ),
)
declare(
    "timm.VisionTransformer",
    Host(
        (Blocks("blocks", stream="text+image"),),
        width="embed_dim",
        grid=lambda model, arguments: model.patch_embed.dynamic_feat_size(arguments["x"].shape[-2:]),
        image_tokens=lambda model, arguments, length: length - model.num_prefix_tokens,
        note="class and register tokens are always kept",
    ),
)


@pattern
def _uvit(model: Any) -> Host | None:
    """U-ViT and those built like it: long skips, `extras` tokens (time, label) in front of the image."""
    names = ("in_blocks", "mid_block", "out_blocks")
    if not all(isinstance(getattr(model, name, None), nn.Module) for name in names) or not hasattr(model, "extras"):
        return None
    return Host(
        tuple(Blocks(name, stream="text+image", others=("skip",)) for name in names),
        image_tokens=lambda model, arguments, length: length - model.extras,
        note="long skips join block i to the block as far from the end: use as many decoder as encoder blocks",
    )


@pattern
def _original_flux(model: Any) -> Host | None:
    """Flux as its authors wrote it, and those built like it: double blocks, then single blocks on both streams together."""
    runs = [getattr(model, name, None) for name in ("double_blocks", "single_blocks")]
    if not all(isinstance(run, nn.ModuleList) and len(run) for run in runs):
        return None
    double, single = (set(inspect.signature(run[0].forward).parameters) for run in runs)  # pyright: ignore
    if not {"img", "txt", "pe"} <= double or not {"x", "pe"} <= single:
        return None
    pe = {"pe": Table(dim=2, stream="text+image")}  # (B, 1, text and image, D / 2, 2, 2)
    return Host(
        (
            Blocks("double_blocks", image="img", text="txt", returns=("image", "text"), tables=pe),
            Blocks("single_blocks", image="x", stream="text+image", tables=pe),
        )
    )
