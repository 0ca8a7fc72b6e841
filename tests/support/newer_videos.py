"""Tiny random-weight models of the newer video architectures, with inputs; see `architectures`."""

import torch
from tiny import T, diffusers_model, noise

SIZES = {"num_attention_heads": 2, "attention_head_dim": 16}
CHANNELS = {"in_channels": 4, "out_channels": 4}
WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "out_channels": 4, "text_dim": 12,
    "freq_dim": 16, "ffn_dim": 32, "num_layers": 6, "rope_max_seq_len": 32,
}  # fmt: skip
VIDEO, TEXT, TIMES = noise(2, 4, 2, 8, 8), noise(2, 5, 12), T * 1000
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
ARGUMENTS = {"hidden_states": VIDEO, "encoder_hidden_states": TEXT, "timestep": TIMES}


def allegro():
    model = diffusers_model(
        "AllegroTransformer3DModel", num_attention_heads=2, attention_head_dim=12, num_layers=6, cross_attention_dim=24,
        sample_height=8, sample_width=8, sample_frames=2, caption_channels=12, **CHANNELS,
    )  # fmt: skip
    angles = noise(4, 4)
    places = torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(4)).T.reshape(3, 1, 32)
    return model, ARGUMENTS | {
        "attention_mask": torch.ones(2, 2, 8, 8), "encoder_attention_mask": MASK,
        "image_rotary_emb": (((angles.cos(), angles.sin()),) * 3, tuple(places)),
    }  # fmt: skip


def anyflow():
    model = diffusers_model("AnyFlowTransformer3DModel", in_channels=4, **WAN)
    times = torch.tensor([[3.0, 5.0], [7.0, 9.0]])
    return model, ARGUMENTS | {"hidden_states": noise(2, 2, 4, 8, 8), "timestep": times, "r_timestep": times - 2}


def chronoedit():
    return diffusers_model("ChronoEditTransformer3DModel", in_channels=4, rope_temporal_skip_len=2, **WAN), ARGUMENTS


def skyreels():
    return diffusers_model("SkyReelsV2Transformer3DModel", in_channels=4, **WAN), ARGUMENTS


def skyreels_forcing():
    """Diffusion forcing: a time for each frame, and attention to earlier ones."""
    model = diffusers_model("SkyReelsV2Transformer3DModel", in_channels=4, num_frame_per_block=2, **WAN)
    return model, ARGUMENTS | {
        "hidden_states": noise(2, 4, 4, 8, 8), "timestep": torch.arange(8).view(2, 4), "enable_diffusion_forcing": True
    }  # fmt: skip


def wan_animate():
    model = diffusers_model(
        "WanAnimateTransformer3DModel", in_channels=12, latent_channels=4, image_dim=10, added_kv_proj_dim=24,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8}, motion_encoder_size=16, motion_style_dim=8, motion_dim=4,
        motion_encoder_dim=8, face_encoder_hidden_dim=8, face_encoder_num_heads=2, inject_face_latents_blocks=2, **WAN,
    )  # fmt: skip
    return model, ARGUMENTS | {
        "hidden_states": noise(2, 12, 3, 8, 8), "encoder_hidden_states": noise(2, 512, 12),
        "encoder_hidden_states_image": noise(2, 3, 10), "pose_hidden_states": noise(2, 4, 2, 8, 8),
        "face_pixel_values": noise(2, 3, 8, 16, 16),
    }  # fmt: skip


def consisid():
    model = diffusers_model(
        "ConsisIDTransformer3DModel", time_embed_dim=8, text_embed_dim=12, num_layers=6, sample_width=8, sample_height=8,
        sample_frames=5, max_text_seq_length=5, use_rotary_positional_embeddings=True, is_train_face=True,
        cross_attn_dim_head=8, cross_attn_num_heads=2, LFE_id_dim=10, LFE_vit_dim=8, LFE_depth=2, LFE_dim_head=4,
        LFE_num_heads=2, LFE_num_id_token=2, LFE_num_querie=3, LFE_output_dim=21, LFE_ff_mult=1, LFE_num_scale=2,
        **CHANNELS, **SIZES,
    )  # fmt: skip
    angles = noise(32, 16)
    return model, ARGUMENTS | {
        "hidden_states": noise(2, 2, 4, 8, 8), "image_rotary_emb": (angles.cos(), angles.sin()), "id_cond": noise(2, 10),
        "id_vit_hidden": list(noise(2, 2, 3, 8)),
    }  # fmt: skip


def cosmos():
    model = diffusers_model(
        "CosmosTransformer3DModel", num_layers=6, mlp_ratio=2.0, text_embed_dim=12, adaln_lora_dim=4, max_size=(4, 8, 8),
        concat_padding_mask=False, **CHANNELS, **SIZES,
    )  # fmt: skip
    return model, ARGUMENTS | {"timestep": noise(2, 1, 2, 1, 1)}


def easyanimate():
    model = diffusers_model(
        "EasyAnimateTransformer3DModel", patch_size=2, sample_width=8, sample_height=8, num_layers=6, mmdit_layers=4,
        time_embed_dim=8, text_embed_dim=12, **CHANNELS, **SIZES,
    )  # fmt: skip
    return model, ARGUMENTS


HUNYUAN = {"num_refiner_layers": 1, "text_embed_dim": 12, "rope_axes_dim": (4, 6, 6)} | CHANNELS | SIZES


def hunyuan_video15():
    model = diffusers_model(
        "HunyuanVideo15Transformer3DModel", num_layers=6, patch_size=2, text_embed_2_dim=10, image_embed_dim=8, **HUNYUAN
    )
    return model, ARGUMENTS | {
        "encoder_attention_mask": MASK, "encoder_hidden_states_2": noise(2, 3, 10),
        "encoder_attention_mask_2": MASK[:, 2:], "image_embeds": noise(2, 2, 8),
    }  # fmt: skip


def framepack():
    """Earlier frames, whole and coarse, before those that are made."""
    model = diffusers_model(
        "HunyuanVideoFramepackTransformer3DModel", num_layers=3, num_single_layers=3, pooled_projection_dim=10,
        guidance_embeds=False, has_image_proj=True, image_proj_dim=8, has_clean_x_embedder=True, **HUNYUAN,
    )  # fmt: skip
    frames = torch.arange(9)
    return model, ARGUMENTS | {
        "encoder_attention_mask": MASK, "pooled_projections": noise(2, 10), "image_embeds": noise(2, 2, 8),
        "indices_latents": frames[7:], "latents_clean": noise(2, 4, 1, 8, 8), "indices_latents_clean": frames[6:7],
        "latents_history_2x": noise(2, 4, 2, 8, 8), "indices_latents_history_2x": frames[4:6],
        "latents_history_4x": noise(2, 4, 4, 8, 8), "indices_latents_history_4x": frames[:4],
    }  # fmt: skip


def motif_video():
    """Its last block works on other tokens."""
    model = diffusers_model(
        "MotifVideoTransformer3DModel", num_layers=3, num_single_layers=4, num_decoder_layers=1, text_embed_dim=12,
        rope_axes_dim=(4, 6, 6), enable_text_cross_attention_dual=True, image_embed_dim=8, **CHANNELS, **SIZES,
    )  # fmt: skip
    return model, ARGUMENTS | {"encoder_attention_mask": MASK, "image_embeds": noise(2, 2, 8)}


JOY = {"hidden_size": 32, "num_attention_heads": 2, "text_dim": 12, "num_layers": 6, "rope_dim_list": [4, 6, 6]} | CHANNELS


def joyimage():
    """Two items, of which the last is made."""
    model = diffusers_model("JoyImageEditTransformer3DModel", **JOY)
    return model, ARGUMENTS | {"hidden_states": noise(2, 2, 4, 1, 8, 8)}


def joyimage_plus():
    """References of other sizes, and padding, after the image."""
    model = diffusers_model("JoyImageEditPlusTransformer3DModel", **JOY)
    return model, ARGUMENTS | {
        "hidden_states": noise(2, 22, 4, 1, 2, 2), "encoder_hidden_states_mask": MASK,
        "shape_list": [[(1, 4, 4), (1, 2, 2)], [(1, 4, 4), (1, 2, 3)]],
    }  # fmt: skip


KANDINSKY = {
    "in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 12, "in_text_dim2": 10, "time_dim": 8, "model_dim": 32,
    "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 6, "axes_dims": (4, 6, 6),
}  # fmt: skip


def kandinsky5():
    model = diffusers_model("Kandinsky5Transformer3DModel", **KANDINSKY)
    return model, ARGUMENTS | {
        "hidden_states": noise(2, 2, 8, 8, 4), "pooled_projections": noise(2, 10), "text_rope_pos": torch.arange(5),
        "visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)],
    }  # fmt: skip


def kandinsky6():
    """With sound."""
    model = diffusers_model("Kandinsky6Transformer3DModel", visual_cond=False, in_audio_dim=3, out_audio_dim=3, **KANDINSKY)
    return model, ARGUMENTS | {
        "hidden_states": noise(2, 2, 8, 8, 4), "pooled_projections": noise(2, 10), "audio_hidden_states": noise(2, 7, 3)
    }  # fmt: skip


def kandinsky6_silent():
    model, arguments = kandinsky6()
    return model, arguments | {"audio_hidden_states": None}


LTX2 = {
    "cross_attention_dim": 32, "audio_in_channels": 3, "audio_out_channels": 3, "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8, "audio_cross_attention_dim": 16, "num_layers": 6, "caption_channels": 12,
} | CHANNELS | SIZES  # fmt: skip


def ltx2(**config):
    """With sound, and a time for each token."""
    model = diffusers_model("LTX2VideoTransformer3DModel", **LTX2, **config)
    return model, {
        "hidden_states": noise(2, 32, 4), "audio_hidden_states": noise(2, 7, 3), "encoder_hidden_states": TEXT,
        "audio_encoder_hidden_states": TEXT, "timestep": torch.arange(64.0).view(2, 32), "audio_timestep": TIMES,
        "encoder_attention_mask": MASK, "audio_encoder_attention_mask": MASK, "num_frames": 2, "height": 4, "width": 4,
        "audio_num_frames": 7,
    }  # fmt: skip


def ltx2_split():
    return ltx2(rope_type="split")


def sana_wm_refiner():
    model = diffusers_model("SanaWMLTX2RefinerTransformer3DModel", **LTX2)
    rope = model.build_rotary_emb_for_absolute_positions(2, [0, 1], 4, 4, torch.device("cpu"), 24.0)
    return model, {
        "hidden_states": noise(2, 32, 4), "encoder_hidden_states": TEXT, "timestep": TIMES, "video_rotary_emb": rope
    }  # fmt: skip


def minimax_h3():
    """Text, then sound, then video, packed into one stream."""
    model = diffusers_model(
        "MiniMaxH3Transformer3DModel", hidden_size=32, num_layers=6, num_refiner_layers=1, ffn_dim=32, in_channels=4,
        audio_in_channels=3, text_dim=12, freq_dim=8, time_embed_hidden_dim=8, time_embed_dim=8, rope_freq_dim=2, **SIZES,
    )  # fmt: skip
    video = torch.cartesian_prod(torch.tensor([5.0, 6.5]), torch.arange(4.0), torch.arange(4.0))
    places = torch.arange(12.0).view(12, 1).expand(12, 3)
    return model, {
        "hidden_states": noise(2, 32, 16), "audio_hidden_states": noise(2, 7, 3), "encoder_hidden_states": TEXT,
        "timestep": torch.tensor([0.0, 7.0]), "timestep_indices": (torch.arange(44) > 4).long(),
        "token_tags": torch.tensor([0] * 5 + [2] * 7 + [1] * 32), "position_ids": torch.cat([places, video]),
        "text_indices": torch.arange(5), "audio_indices": torch.arange(5, 12), "video_indices": torch.arange(12, 44),
    }  # fmt: skip


def sana_video():
    model = diffusers_model(
        "SanaVideoTransformer3DModel", num_attention_heads=2, attention_head_dim=12, num_layers=6,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=12, sample_size=8,
        **CHANNELS,
    )  # fmt: skip
    return model, ARGUMENTS


VIDEOS = (
    allegro, anyflow, chronoedit, skyreels, skyreels_forcing, wan_animate, consisid, cosmos, easyanimate, hunyuan_video15,
    framepack, motif_video, joyimage, joyimage_plus, kandinsky5, kandinsky6, kandinsky6_silent, ltx2, ltx2_split,
    sana_wm_refiner, minimax_h3, sana_video,
)  # fmt: skip
