"""The declared architectures; see `sprint.hosts.declare` for the words.

What several of them share is said once, in front. Where their tokens stand is read in `sprint.hosts.layouts`.
"""

import inspect
import math
from dataclasses import fields
from typing import Any

from torch import nn

from sprint.hosts import layouts
from sprint.hosts.declare import Blocks, Host, Table, declare, pattern, refuse

_CONTROL: dict[str, str] = dict.fromkeys(
    ("controlnet_block_samples", "controlnet_single_block_samples", "block_controlnet_hidden_states"),
    "because the model's own loop adds full-length residuals between its blocks",
)
_CACHE: dict[str, str] = dict.fromkeys(
    ("kv_cache", "kv_caches"), "because the blocks keep keys and values there for calls with all tokens"
)
_CROSS = ("encoder_hidden_states", "encoder_attention_mask")  # texts that may have as many tokens as the image
_TEXT_FIRST: dict[str, Any] = {"text": "encoder_hidden_states", "returns": ("text", "image")}
_IMAGE_FIRST: dict[str, Any] = {"text": "encoder_hidden_states", "returns": ("image", "text")}

_ROWS = Table(dim=0, batched=False)  # (N, D), no batch
_JOINT = Table(stream="text+image")
_JOINT_ROWS = Table(dim=0, batched=False, stream="text+image")
_TEXT_LAST_MASK = Table(dim=3, stream="image+text")  # (B, 1, 1, L)
_PAIR_MASK = Table(dim=(2, 3), stream="text+image")  # (B, 1, L, L)
_LTX2_ROPE = (Table(ndim=3), Table(dim=2, ndim=4))  # (B, N, D), or (B, heads, N, D)
_OF_BLOCKS = {option.name for option in fields(Blocks)}


def _diffusers(*names: str, blocks: str | tuple[Blocks, ...] = "transformer_blocks", **options: Any) -> None:
    """Declare classes of diffusers; the options are those of `Blocks`, for one run of blocks, and of `Host`."""
    if isinstance(blocks, str):
        blocks = (Blocks(blocks, **{key: options.pop(key) for key in _OF_BLOCKS & options.keys()}),)
    for name in names:
        declare(f"diffusers.{name}", Host(blocks, **options))


def _flux(*names: str, joined: bool = False, **tables: Table) -> None:
    """Double blocks on text and image, then single blocks, on the same or on both joined; packed latents."""
    tables = {"image_rotary_emb": _JOINT_ROWS, **tables}
    double = Blocks("transformer_blocks", tables=tables, **_TEXT_FIRST)
    both: dict[str, Any] = {"stream": "text+image"} if joined else _TEXT_FIRST
    _diffusers(
        *names,
        blocks=(double, Blocks("single_transformer_blocks", tables=tables, **both)),
        grid=layouts.of_ids,
        always_kept="last",
        refused=_CONTROL,
        note="reference images, behind the image and of another time in img_ids, are always kept",
    )


def _hunyuan(name: str, *, rope: str = "image_rotary_emb", others: tuple[str, ...] = (), **host: Any) -> None:
    """Double and single blocks on image and text, and a mask for both, the image in front."""
    runs = {"transformer_blocks": rope, "single_transformer_blocks": "image_rotary_emb"}
    blocks = (
        Blocks(run, tables={table: _ROWS, "attention_mask": _TEXT_LAST_MASK}, others=others, **_IMAGE_FIRST)
        for run, table in runs.items()
    )
    _diffusers(name, blocks=(*blocks,), **{"grid": layouts.of_latents, **host})


def _heads_width(model: Any) -> int:
    return model.config.num_attention_heads * model.config.attention_head_dim


def _latent_tokens(model: Any, arguments: Any, length: int) -> int:
    return math.prod(layouts.of_latents(model, arguments))


# One stream, of the image, with or without cross-attention to a text

_diffusers(
    "DiTTransformer2DModel",
    note="its blocks drop labels one by one in training: set the blocks' dropout_prob to 0 and drop labels outside",
)
_diffusers(
    "PixArtTransformer2DModel",
    "DreamLiteTransformer2DModel",
    tables={"attention_mask": Table(dim=-1)},
    others=_CROSS,
)
_diffusers(
    "AllegroTransformer3DModel",
    tables={"attention_mask": Table(dim=-1), "image_rotary_emb": Table(item=1)},
    others=_CROSS,
    grid=layouts.of_latents,
)
_diffusers(
    "WanTransformer3DModel",
    "ChronoEditTransformer3DModel",
    blocks="blocks",
    tables={"rotary_emb": Table(), "temb": Table(ndim=4)},
    others=_CROSS,
    grid=layouts.of_latents,
)
_diffusers(
    "SkyReelsV2Transformer3DModel",
    blocks="blocks",
    tables={"rotary_emb": Table(), "temb": Table(dim=2, ndim=4), "attention_mask": Table(dim=(2, 3))},
    others=_CROSS,
    grid=layouts.of_latents,
)
_diffusers(
    "WanAnimateTransformer3DModel",
    blocks="blocks",
    tables={"rotary_emb": Table()},
    sides=(),
    others=_CROSS,
    grid=layouts.of_latents,
    note="faces are seen frame by frame: one token per group and frame, StructuredDrop(group=(1, 2, 2), keep=1)",
)
_diffusers(
    "AnyFlowTransformer3DModel",
    blocks="blocks",
    tables={"rotary_emb": Table(dim=2), "temb": Table()},
    others=_CROSS,
    grid=layouts.of_frames_first,
)
_diffusers(
    "LTXVideoTransformer3DModel",
    tables={"image_rotary_emb": Table(), "temb": Table()},
    others=_CROSS,
    grid=layouts.of_sides,
)
_diffusers(
    "SanaWMLTX2RefinerTransformer3DModel",
    tables={"video_rotary_emb": _LTX2_ROPE, "temb": Table()},
    others=(*_CROSS, "sink_rotary_emb"),
    width=_heads_width,
    refused=_CACHE,
)
_diffusers(
    "CosmosTransformer3DModel",
    tables={"image_rotary_emb": _ROWS, "extra_pos_emb": Table(), "controlnet_residual": Table()}
    | dict.fromkeys(("embedded_timestep", "temb"), Table(ndim=3)),
    others=(*_CROSS, "attention_mask"),
    grid=layouts.of_latents,
)
_diffusers(
    "SanaTransformer2DModel",
    sides=("height", "width"),
    others=_CROSS,
    refused=_CONTROL,
    note="its blocks unfold the tokens for a convolution: one token per group can be kept, StructuredDrop(0.75)",
)
_diffusers(
    "SanaVideoTransformer3DModel",
    tables={"rotary_emb": Table(), "timestep": Table(ndim=3)},
    sides=("height", "width"),
    others=_CROSS,
    grid=layouts.of_latents,
    refused=_CONTROL,
    note="its blocks unfold the tokens: one token per group and frame, StructuredDrop(group=(1, 2, 2), keep=1)",
)
_diffusers(
    "PRXTransformer2DModel",
    blocks="blocks",
    tables={"image_rotary_emb": Table(dim=2)},
    others=(*_CROSS, "attention_mask"),
    width="hidden_size",
)
_diffusers(
    "HunyuanDiT2DModel",
    blocks="blocks",
    tables={"image_rotary_emb": _ROWS},
    others=(*_CROSS, "skip"),
    refused=_CONTROL,
    note="long skips join block i to the block as far from the end: use as many decoder as encoder blocks",
)
_diffusers(
    "Kandinsky5Transformer3DModel",
    blocks="visual_transformer_blocks",
    tables={"rope": Table()},
    others=("text_embed", "time_embed"),
    grid=layouts.of_channels_last,
    refused={"sparse_params": "because block-sparse attention cuts the grid of all tokens into tiles"},
)

# Two streams: an image, and a text or sound

_diffusers("SD3Transformer2DModel", refused=_CONTROL, **_TEXT_FIRST)
_diffusers(
    "AuraFlowTransformer2DModel",
    blocks=(
        Blocks("joint_transformer_blocks", **_TEXT_FIRST),
        Blocks("single_transformer_blocks", stream="text+image"),
    ),
)
_flux("FluxTransformer2DModel", "LongCatImageTransformer2DModel", "OvisImageTransformer2DModel", "BriaTransformer2DModel")
_flux("Flux2Transformer2DModel", "BriaFiboTransformer2DModel", joined=True)
_flux("ChromaTransformer2DModel", joined=True, attention_mask=_JOINT)
_diffusers(
    "Flux3Transformer2DModel",
    blocks="single_transformer_blocks",
    tables={"image_rotary_emb": _JOINT_ROWS, "temb_mod": Table()},
    others=("temb_mod_context",),
    grid=layouts.of_ids,
    always_kept="last",
    note="its blocks on the image alone come before the encoder; condition images are always kept",
    **_TEXT_FIRST,
)
_diffusers(
    "QwenImageTransformer2DModel",
    tables={"image_rotary_emb": Table(dim=0, batched=False, item=0), "modulate_index": Table()},
    grid=layouts.of_shapes,
    always_kept="last",
    refused=_CONTROL,
    **_TEXT_FIRST,
)
_diffusers("CogView3PlusTransformer2DModel", **_IMAGE_FIRST)
_diffusers("CogView4Transformer2DModel", tables={"image_rotary_emb": _ROWS}, **_IMAGE_FIRST)
_diffusers(
    "GlmImageTransformer2DModel",
    tables={"image_rotary_emb": _ROWS},
    others=("attention_mask",),
    refused=_CACHE,
    **_IMAGE_FIRST,
)
_diffusers(
    "CogVideoXTransformer3DModel",
    "ConsisIDTransformer3DModel",
    tables={"image_rotary_emb": _ROWS},
    grid=layouts.of_frames_first,
    **_IMAGE_FIRST,
)
_diffusers("EasyAnimateTransformer3DModel", tables={"image_rotary_emb": _ROWS}, grid=layouts.of_latents, **_IMAGE_FIRST)
_diffusers(
    "HunyuanVideo15Transformer3DModel",
    tables={"freqs_cis": _ROWS},
    others=("attention_mask",),
    grid=layouts.of_latents,
    **_IMAGE_FIRST,
)
_diffusers(
    "MochiTransformer3DModel",
    tables={"image_rotary_emb": _ROWS},
    grid=layouts.of_latents,
    **_IMAGE_FIRST,
)
_diffusers(
    "JoyImageEditTransformer3DModel",
    blocks="double_blocks",
    tables={"image_rotary_emb": Table(dim=0, batched=False, item=0)},
    grid=layouts.of_items,
    always_kept="last",
    **_IMAGE_FIRST,
)
_diffusers(
    "JoyImageEditPlusTransformer3DModel",
    blocks="double_blocks",
    tables={"image_rotary_emb": Table(), "attention_mask": _TEXT_LAST_MASK},
    grid=layouts.of_shapes,
    always_kept="last",
    **_IMAGE_FIRST,
)
_hunyuan(
    "HunyuanVideoTransformer3DModel",
    rope="freqs_cis",
    grid=layouts.of_later_frames,
    always_kept="first",
    note="with image-to-video by token replacement the first frame is always kept",
)
_hunyuan(
    "HunyuanVideoFramepackTransformer3DModel",
    rope="freqs_cis",
    always_kept="first",
    note="earlier frames are always kept",
)
_hunyuan("HunyuanImageTransformer2DModel")
_hunyuan(
    "MotifVideoTransformer3DModel",
    others=("image_embed_seq_len",),
    image_tokens=layouts.all_before_decoder,
    note="its last num_decoder_layers blocks work on other tokens: use as many decoder blocks or more",
)
_diffusers(
    "HiDreamImageTransformer2DModel",
    blocks="double_stream_blocks",
    tables={"image_rotary_emb": Table(stream="image+text"), "hidden_states_masks": Table()},
    grid=layouts.of_latents,
    always_kept="last",
    note="the middle lies within its double blocks: between its single blocks it cuts the stream at lengths of its own",
    **_IMAGE_FIRST,
)
_diffusers(
    "LTX2VideoTransformer3DModel",
    text="audio_hidden_states",
    returns=("image", "text"),
    tables=dict.fromkeys(("video_rotary_emb", "ca_video_rotary_emb"), _LTX2_ROPE)
    | dict.fromkeys(("temb", "temb_ca_scale_shift", "temb_ca_gate"), Table())
    | {"self_attention_mask": Table(dim=(-2, -1))},
    others=(*_CROSS, "audio_encoder_hidden_states", "audio_encoder_attention_mask", "audio_rotary_emb"),
    width=_heads_width,
    grid=layouts.of_sides,
    note="sound is never dropped",
)
_diffusers(
    "Kandinsky6Transformer3DModel",
    blocks="visual_transformer_blocks",
    text="aud",
    returns=("image", "text"),
    tables={"vis_rope": _ROWS},
    others=("text_v", "text_a", "aud_rope", "attn_mask"),
    width=lambda model: model.config.model_dim,
    grid=layouts.of_channels_last,
    note="sound is never dropped",
)

# One stream of text and image

_diffusers(
    "Krea2Transformer2DModel",
    stream="text+image",
    tables={"image_rotary_emb": _JOINT_ROWS, "attention_mask": Table(dim=3, stream="text+image")},
    grid=layouts.of_ids,
    image_tokens=lambda model, arguments, length: arguments["hidden_states"].shape[1],
    always_kept="last",
)
_diffusers(
    "Lumina2Transformer2DModel",
    blocks="layers",
    stream="text+image",
    tables=dict.fromkeys(("attention_mask", "image_rotary_emb"), _JOINT),
    image_tokens=_latent_tokens,
    image_starts=lambda model, arguments: arguments["encoder_attention_mask"].sum(dim=1),
)
_diffusers(
    "BriaFibo2Transformer2DModel",
    blocks="layers",
    stream="text+image",
    tables=dict.fromkeys(("attn_mask", "freqs_cis", "noise_mask"), _JOINT),
    grid=layouts.of_latents,
    image_tokens=layouts.with_context,
    image_starts=layouts.gist_starts,
    always_kept="last",
    note="condition images are always kept",
)
_diffusers(
    "OmniGenTransformer2DModel",
    blocks="layers",
    stream="text+image",
    tables={"image_rotary_emb": _JOINT_ROWS, "attention_mask": _PAIR_MASK},
    image_tokens=_latent_tokens,
)
_diffusers(
    "Ideogram4Transformer2DModel",
    blocks="layers",
    stream="text+image",
    tables={"image_rotary_emb": _JOINT, "adaln_input": _JOINT, "attention_mask": _PAIR_MASK},
    grid=layouts.of_last_rows,
    image_tokens=layouts.last_rows,
)
_diffusers(
    "MiniMaxH3Transformer3DModel",
    stream="text+image",
    tables=dict.fromkeys(("adaln_indices", "rotary_emb"), _JOINT_ROWS),
    others=("temb",),
    grid=layouts.of_last_rows,
    image_tokens=layouts.last_rows,
    note="one draw for the batch, StructuredDrop(0.75, shared=True); only the video at the end is dropped",
)
_diffusers(
    "QwenImage21Transformer2DModel",
    stream="text+image",
    tables={"rotary_emb": _JOINT_ROWS, "target_token_mask": _JOINT_ROWS, "key_valid": _JOINT},
    others=("modulation",),
    grid=layouts.of_last_shape,
    image_tokens=lambda model, arguments, length: math.prod(layouts.of_last_shape(model, arguments)),
    refused=_CACHE,
    note="condition images are always kept",
)
_diffusers(
    "ZImageTransformer2DModel",
    blocks="layers",
    stream="image+text",
    tables=dict.fromkeys(("attn_mask", "freqs_cis", "noise_mask"), Table(stream="image+text")),
    grid=layouts.of_list,
    image_tokens=lambda model, arguments, length: -(-math.prod(layouts.of_list(model, arguments)) // 32) * 32,
    always_kept="last",
    width="dim",
    refused=_CONTROL
    | dict.fromkeys(("siglip_feats", "image_noise_mask"), "because the captions then come before the images"),
    note="images are padded to a multiple of 32 tokens; the padding is always kept",
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

for _name, _reason in {
    "AnyFlowFARTransformer3DModel": "its attention follows a block mask that is built for all tokens",
    "ErnieImageTransformer2DModel": "its tokens are (N, B, C), with the batch behind them",
    "HeliosTransformer3DModel": "its blocks are told how many tokens the video has, and split them off there",
    "Kandinsky6SRTransformer3DModel": "its attention is sparse in tiles of the whole grid",
    "LatteTransformer3DModel": "its blocks work by turns over space and over time",
    "NucleusMoEImageTransformer2DModel": "its experts choose among all tokens, so that one kept depends on those dropped",
    "SanaWMTransformer3DModel": "its blocks pass a state from frame to frame, and know the camera's ray of every token",
    "WanAnimate2Transformer3DModel": "its attention goes to cached reference frames, by a block mask for all tokens",
    "WanVACETransformer3DModel": "its own loop adds full-length control features between its blocks",
}.items():
    refuse(f"diffusers.{_name}", _reason)


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
