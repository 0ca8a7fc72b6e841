"""Tiny random-weight models of the declared architectures, with inputs: `CASES[name]()` gives (model, arguments)."""

import torch
from newer_images import IMAGES
from newer_videos import VIDEOS
from tiny import T, diffusers_model, noise, packed, randomise


def dit():
    model = diffusers_model(
        "DiTTransformer2DModel", num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=6, sample_size=8
    )
    for block in model.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    return model, {
        "hidden_states": noise(2, 4, 8, 8), "timestep": torch.tensor([3, 7]), "class_labels": torch.tensor([1, 2])
    }  # fmt: skip


def pixart():
    model = diffusers_model(
        "PixArtTransformer2DModel", num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=6,
        cross_attention_dim=16, sample_size=8, caption_channels=12, use_additional_conditions=False,
    )  # fmt: skip
    return model, {
        "hidden_states": noise(2, 4, 8, 8), "encoder_hidden_states": noise(2, 5, 12), "timestep": torch.tensor([3, 7]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }  # fmt: skip


def sd3():
    model = diffusers_model(
        "SD3Transformer2DModel", sample_size=8, patch_size=2, in_channels=4, num_layers=6, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, out_channels=4,
        pos_embed_max_size=16, qk_norm="rms_norm",
    )  # fmt: skip
    return model, {
        "hidden_states": noise(2, 4, 8, 8), "encoder_hidden_states": noise(2, 5, 12),
        "pooled_projections": noise(2, 10), "timestep": T * 1000,
    }  # fmt: skip


def flux():
    model = diffusers_model(
        "FluxTransformer2DModel", patch_size=1, in_channels=4, num_layers=3, num_single_layers=3, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=[4, 6, 6],
    )  # fmt: skip
    return model, packed(12) | {"pooled_projections": noise(2, 10)}


def chroma():
    model = diffusers_model(
        "ChromaTransformer2DModel", patch_size=1, in_channels=4, num_layers=3, num_single_layers=3, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, axes_dims_rope=[4, 6, 6], approximator_num_channels=8,
        approximator_hidden_dim=16, approximator_layers=1,
    )  # fmt: skip
    return model, packed(12) | {"attention_mask": torch.ones(2, 21, dtype=torch.bool)}


def auraflow():
    model = diffusers_model(
        "AuraFlowTransformer2DModel", sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=3,
        num_single_dit_layers=3,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16, out_channels=4,
        pos_embed_max_size=16,
    )  # fmt: skip
    return model, {"hidden_states": noise(2, 4, 8, 8), "encoder_hidden_states": noise(2, 5, 12), "timestep": T}


def sana():
    model = diffusers_model(
        "SanaTransformer2DModel", in_channels=4, out_channels=4, num_layers=6, attention_head_dim=8, num_attention_heads=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12, sample_size=8,
        patch_size=1,
    )  # fmt: skip
    return model, {"hidden_states": noise(2, 4, 8, 8), "encoder_hidden_states": noise(2, 5, 12), "timestep": T * 1000}


def lumina2():
    model = diffusers_model(
        "Lumina2Transformer2DModel", sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=6,
        num_refiner_layers=1, num_attention_heads=3, num_kv_heads=1, multiple_of=2, cap_feat_dim=12,
        axes_dim_rope=(4, 2, 2), axes_lens=(32, 32, 32),
    )  # fmt: skip
    return model, {
        "hidden_states": noise(2, 4, 8, 8), "timestep": T, "encoder_hidden_states": noise(2, 5, 12),
        "encoder_attention_mask": torch.ones(2, 5, dtype=torch.bool),
    }  # fmt: skip


def lumina2_ragged():
    """Captions of different lengths put the image in different places."""
    model, arguments = lumina2()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    return model, arguments | {"encoder_attention_mask": mask}


def z_image():
    model = diffusers_model(
        "ZImageTransformer2DModel", all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=6,
        n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=12, axes_dims=[4, 6, 6], axes_lens=[128, 32, 32],
    )  # fmt: skip
    return model, {"x": list(noise(2, 4, 1, 16, 8)), "t": T, "cap_feats": list(noise(2, 5, 12))}


def z_image_ragged():
    """Captions of different lengths, padded behind the image."""
    model, arguments = z_image()
    return model, arguments | {"cap_feats": [noise(37, 12), noise(5, 12)]}


def cogvideox():
    model = diffusers_model(
        "CogVideoXTransformer3DModel", num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        time_embed_dim=8, text_embed_dim=12, num_layers=6, sample_width=8, sample_height=8, sample_frames=9,
        max_text_seq_length=5, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    angles = noise(32, 16)
    return model, {
        "hidden_states": noise(2, 2, 4, 8, 8), "encoder_hidden_states": noise(2, 5, 12), "timestep": torch.tensor([3, 7]),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }  # fmt: skip


def wan():
    model = diffusers_model(
        "WanTransformer3DModel", patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4,
        out_channels=4, text_dim=12, freq_dim=16, ffn_dim=32, num_layers=6, rope_max_seq_len=32,
    )  # fmt: skip
    return model, {
        "hidden_states": noise(2, 4, 2, 8, 8), "encoder_hidden_states": noise(2, 5, 12), "timestep": torch.tensor([3, 7])
    }  # fmt: skip


def wan_per_token():
    """Wan 2.2 TI2V: a time for each token."""
    model, arguments = wan()
    return model, arguments | {"timestep": torch.randint(0, 999, (2, 32), generator=torch.Generator().manual_seed(0))}


def hunyuan_video():
    model = diffusers_model(
        "HunyuanVideoTransformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16,
        num_layers=3, num_single_layers=3, num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=False,
        text_embed_dim=12, pooled_projection_dim=10, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    return model, {
        "hidden_states": noise(2, 4, 2, 8, 8), "timestep": torch.tensor([3, 7]), "encoder_hidden_states": noise(2, 5, 12),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]), "pooled_projections": noise(2, 10),
    }  # fmt: skip


def hunyuan_video_first_frame():
    """Image to video by token replacement: the blocks split off the first frame."""
    model = diffusers_model(
        "HunyuanVideoTransformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16,
        num_layers=3, num_single_layers=3, num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=False,
        text_embed_dim=12, pooled_projection_dim=10, rope_axes_dim=(4, 6, 6), image_condition_type="token_replace",
    )  # fmt: skip
    _, arguments = hunyuan_video()
    return model, arguments | {"hidden_states": noise(2, 4, 3, 8, 8)}


def ltx():
    model = diffusers_model(
        "LTXVideoTransformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16,
        cross_attention_dim=32, num_layers=6, caption_channels=12,
    )  # fmt: skip
    return model, {
        "hidden_states": noise(2, 32, 4), "encoder_hidden_states": noise(2, 5, 12), "timestep": torch.tensor([3, 7]),
        "encoder_attention_mask": torch.ones(2, 5), "num_frames": 2, "height": 4, "width": 4,
    }  # fmt: skip


def qwen_image():
    model = diffusers_model(
        "QwenImageTransformer2DModel", patch_size=2, in_channels=4, out_channels=4, num_layers=6, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return model, packed(12, ids=False) | {
        "encoder_hidden_states_mask": torch.ones(2, 5, dtype=torch.long), "img_shapes": [[(1, 4, 4)]] * 2
    }  # fmt: skip


def qwen_image_edit():
    """A reference image after the image."""
    model, arguments = qwen_image()
    return model, arguments | {"hidden_states": noise(2, 20, 4), "img_shapes": [[(1, 4, 4), (1, 2, 2)]] * 2}


def prx():
    model = diffusers_model(
        "PRXTransformer2DModel", in_channels=4, patch_size=2, context_in_dim=12, hidden_size=32, mlp_ratio=2.0, num_heads=2,
        depth=6, axes_dim=[8, 8],
    )  # fmt: skip
    return model, {"hidden_states": noise(2, 4, 8, 8), "timestep": T, "encoder_hidden_states": noise(2, 5, 12)}


def hunyuan_dit():
    model = diffusers_model(
        "HunyuanDiT2DModel", num_attention_heads=2, attention_head_dim=16, in_channels=4, patch_size=2, sample_size=8,
        hidden_size=32, num_layers=6, mlp_ratio=2.0, cross_attention_dim=16, cross_attention_dim_t5=16,
        pooled_projection_dim=10, text_len=5, text_len_t5=5, use_style_cond_and_image_meta_size=False,
    )  # fmt: skip
    angles = noise(16, 16)
    return model, {
        "hidden_states": noise(2, 4, 8, 8), "timestep": T * 1000, "encoder_hidden_states": noise(2, 5, 16),
        "text_embedding_mask": torch.ones(2, 5), "encoder_hidden_states_t5": noise(2, 5, 16),
        "text_embedding_mask_t5": torch.ones(2, 5), "image_rotary_emb": (angles.cos(), angles.sin()),
    }  # fmt: skip


def cogview4():
    model = diffusers_model(
        "CogView4Transformer2DModel", patch_size=2, in_channels=4, out_channels=4, num_layers=6, attention_head_dim=16,
        num_attention_heads=2, text_embed_dim=12, time_embed_dim=8, condition_dim=4, sample_size=8, rope_axes_dim=(16, 16),
    )  # fmt: skip
    pair = torch.tensor([[8.0, 8.0]] * 2)
    return model, {
        "hidden_states": noise(2, 4, 8, 8), "encoder_hidden_states": noise(2, 5, 12), "timestep": T * 1000,
        "original_size": pair, "target_size": pair, "crop_coords": torch.zeros(2, 2),
    }  # fmt: skip


def mochi():
    model = diffusers_model(
        "MochiTransformer3DModel", patch_size=2, num_attention_heads=2, attention_head_dim=16, num_layers=6,
        pooled_projection_dim=8, in_channels=4, text_embed_dim=16, time_embed_dim=8, max_sequence_length=5,
    )  # fmt: skip
    return model, {
        "hidden_states": noise(2, 4, 2, 8, 8), "encoder_hidden_states": noise(2, 5, 16), "timestep": torch.tensor([3, 7]),
        "encoder_attention_mask": torch.ones(2, 5, dtype=torch.bool),
    }  # fmt: skip


def flux2():
    model = diffusers_model(
        "Flux2Transformer2DModel", patch_size=1, in_channels=4, num_layers=3, num_single_layers=3, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, timestep_guidance_channels=8, mlp_ratio=2.0,
        axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    places = torch.stack([torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4, torch.zeros(16)], dim=1)
    return model, packed(12, ids=False) | {"img_ids": places, "txt_ids": torch.zeros(5, 4), "guidance": torch.ones(2)}


def longcat():
    model = diffusers_model(
        "LongCatImageTransformer2DModel", patch_size=1, in_channels=4, num_layers=3, num_single_layers=3,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=10,
        axes_dims_rope=[4, 6, 6],
    )  # fmt: skip
    return model, packed(12)


def krea2():
    model = diffusers_model(
        "Krea2Transformer2DModel", in_channels=4, num_layers=6, attention_head_dim=16, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=32, timestep_embed_dim=8, text_hidden_dim=12, num_text_layers=2,
        text_num_attention_heads=2, text_num_key_value_heads=2, text_intermediate_size=16, num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    arguments = packed(12)
    places = torch.cat([arguments.pop("txt_ids"), arguments.pop("img_ids")])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    return model, arguments | {
        "encoder_hidden_states": noise(2, 5, 2, 12), "position_ids": places, "encoder_attention_mask": mask
    }  # fmt: skip


def timm_vit():
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=6, embed_dim=24, num_heads=2, num_classes=7)
    return randomise(model), {"x": noise(2, 3, 64, 64)}


CASES = {
    function.__name__: function
    for function in (
        dit, pixart, sd3, flux, chroma, auraflow, sana, lumina2, lumina2_ragged, z_image, z_image_ragged,
        cogvideox, wan, wan_per_token,
        hunyuan_video, hunyuan_video_first_frame, ltx,
        qwen_image, qwen_image_edit, prx, hunyuan_dit, cogview4, mochi, flux2, longcat, krea2, timm_vit, *IMAGES, *VIDEOS,
    )
}  # fmt: skip
