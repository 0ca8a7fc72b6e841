"""Tiny random-weight models of the newer image architectures, with inputs; see `architectures`."""

import torch
from tiny import T, diffusers_model, noise, packed

SIZES = {"num_attention_heads": 2, "attention_head_dim": 16}
FLUX = {"patch_size": 1, "in_channels": 4, "num_layers": 3, "num_single_layers": 3, "joint_attention_dim": 12} | SIZES
PAIR = torch.tensor([[8.0, 8.0]] * 2)
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def ovis():
    return diffusers_model("OvisImageTransformer2DModel", axes_dims_rope=(4, 6, 6), **FLUX), packed(12)


def bria():
    return diffusers_model("BriaTransformer2DModel", axes_dims_rope=[4, 6, 6], **FLUX), packed(12)


def flux_reference():
    """A reference image after the image."""
    model = diffusers_model("FluxTransformer2DModel", pooled_projection_dim=10, axes_dims_rope=[4, 6, 6], **FLUX)
    arguments = packed(12)
    places = torch.cartesian_prod(torch.ones(1), torch.arange(2.0), torch.arange(2.0))
    return model, arguments | {
        "hidden_states": noise(2, 20, 4), "img_ids": torch.cat([arguments["img_ids"], places]),
        "pooled_projections": noise(2, 10),
    }  # fmt: skip


def bria_fibo():
    model = diffusers_model("BriaFiboTransformer2DModel", axes_dims_rope=[4, 6, 6], text_encoder_dim=10, **FLUX)
    return model, packed(12) | {"text_encoder_layers": list(noise(6, 2, 5, 10))}


def bria_fibo2():
    """A condition image after the image."""
    model = diffusers_model(
        "BriaFibo2Transformer2DModel", in_channels=4, dim=32, n_layers=6, n_refiner_layers=1, n_heads=2, cap_feat_dim=12,
        injection_layer_ids=(3,), perceiver_num_layers=1, min_num_gist_tokens=4, max_num_gist_tokens=8, gist_step=4,
        gist_min_text_len=4, gist_max_text_len=8, axes_dims=(4, 6, 6), axes_lens=(32, 32, 32),
    )  # fmt: skip
    return model, {
        "hidden_states": noise(2, 4, 8, 8), "timestep": T, "encoder_hidden_states": noise(2, 2, 6, 12),
        "context_latents": [noise(2, 4, 4, 4)],
    }  # fmt: skip


def bria_fibo2_ragged():
    """Captions with different numbers of gist tokens, which then come behind the image."""
    model, arguments = bria_fibo2()
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    return model, arguments | {"encoder_attention_mask": mask}


def flux3():
    """A condition image, which joins the image before the single blocks."""
    model = diffusers_model(
        "Flux3Transformer2DModel", in_channels=4, cond_in_channels=4, num_layers=1, num_single_layers=6,
        joint_attention_dim=12, timestep_channels=8, mlp_ratio=2.0, axes_dims_rope=(4, 4, 4, 4), **SIZES,
    )  # fmt: skip
    places = torch.stack([torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4, torch.zeros(16)], dim=1)
    return model, packed(12, ids=False) | {
        "img_ids": places, "txt_ids": torch.zeros(5, 4), "image_cond_hidden_states": noise(2, 4, 4),
        "image_cond_ids": places[:4] + torch.tensor([10, 0, 0, 0]),
    }  # fmt: skip


def cogview3():
    model = diffusers_model(
        "CogView3PlusTransformer2DModel", patch_size=2, in_channels=4, out_channels=4, num_layers=6, text_embed_dim=12,
        time_embed_dim=8, condition_dim=4, sample_size=8, pos_embed_max_size=8, **SIZES,
    )  # fmt: skip
    return model, {
        "hidden_states": noise(2, 4, 8, 8), "encoder_hidden_states": noise(2, 5, 12), "timestep": T * 1000,
        "original_size": PAIR, "target_size": PAIR, "crop_coords": torch.zeros(2, 2),
    }  # fmt: skip


def glm_image():
    model = diffusers_model(
        "GlmImageTransformer2DModel", patch_size=2, in_channels=4, out_channels=4, num_layers=6, text_embed_dim=12,
        time_embed_dim=8, condition_dim=4, prior_vq_quantizer_codebook_size=7, **SIZES,
    )  # fmt: skip
    return model, {
        "hidden_states": noise(2, 4, 8, 8), "encoder_hidden_states": noise(2, 5, 12), "timestep": T * 1000,
        "prior_token_id": torch.arange(32).view(2, 16) % 7, "prior_token_drop": torch.zeros(2, 16, dtype=torch.bool),
        "target_size": PAIR, "crop_coords": torch.zeros(2, 2), "attention_mask": MASK,
    }  # fmt: skip


def dreamlite():
    model = diffusers_model(
        "DreamLiteTransformer2DModel", in_channels=32, num_layers=6, cross_attention_dim=12, norm_num_groups=4, **SIZES
    )
    return model, {"hidden_states": noise(2, 32, 4, 4), "encoder_hidden_states": noise(2, 5, 12)}


def hidream():
    """A wide image, which is padded."""
    model = diffusers_model(
        "HiDreamImageTransformer2DModel", patch_size=2, in_channels=4, num_layers=6, num_single_layers=1,
        caption_channels=[12, 10], text_emb_dim=8, num_routed_experts=3, axes_dims_rope=(4, 6, 6), max_resolution=(12, 12),
        llama_layers=[0, 1, 2, 1, 0, 2, 1], **SIZES,
    )  # fmt: skip
    return model, {
        "hidden_states": noise(2, 4, 8, 16), "timesteps": T * 1000, "encoder_hidden_states_t5": noise(2, 5, 12),
        "encoder_hidden_states_llama3": noise(3, 2, 4, 10), "pooled_embeds": noise(2, 8),
    }  # fmt: skip


def hunyuan_image():
    model = diffusers_model(
        "HunyuanImageTransformer2DModel", in_channels=4, out_channels=4, num_layers=3, num_single_layers=3,
        num_refiner_layers=1, patch_size=(2, 2), text_embed_dim=12, rope_axes_dim=(8, 8), **SIZES,
    )  # fmt: skip
    return model, {
        "hidden_states": noise(2, 4, 8, 8), "timestep": T * 1000, "encoder_hidden_states": noise(2, 5, 12),
        "encoder_attention_mask": MASK,
    }  # fmt: skip


def ideogram4():
    """Padding, then text, then image, in one stream."""
    model = diffusers_model(
        "Ideogram4Transformer2DModel", in_channels=4, num_layers=6, intermediate_size=32, adaln_dim=8, llm_features_dim=12,
        mrope_section=(4, 2, 2), **SIZES,
    )  # fmt: skip
    image = torch.cartesian_prod(torch.tensor([9]), torch.arange(4), torch.arange(4))
    text = torch.arange(5).view(5, 1).expand(5, 3)
    roles = torch.tensor([[3] * 5 + [2] * 16, [0] * 2 + [3] * 3 + [2] * 16])
    return model, {
        "hidden_states": noise(2, 21, 4), "timestep": T, "encoder_hidden_states": noise(2, 21, 12), "indicator": roles,
        "position_ids": torch.cat([text, image]).expand(2, -1, -1).clone(),
        "segment_ids": torch.where(roles == 0, -1, 1),
    }  # fmt: skip


def omnigen():
    model = diffusers_model(
        "OmniGenTransformer2DModel", in_channels=4, patch_size=2, hidden_size=32, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=32, num_layers=6, pad_token_id=0, vocab_size=9, max_position_embeddings=64,
        original_max_position_embeddings=64, rope_scaling={"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
        pos_embed_max_size=8, time_step_dim=8,
    )  # fmt: skip
    return model, {
        "hidden_states": noise(2, 4, 8, 8), "timestep": T, "input_ids": torch.arange(8).view(2, 4), "input_img_latents": [],
        "input_image_sizes": {}, "position_ids": torch.arange(21).expand(2, -1),
        "attention_mask": torch.ones(2, 21, 21).tril(5),
    }  # fmt: skip


def qwen_image21():
    """A condition image among the text, and the image at the end; four tokens stand for each place in the text."""
    model = diffusers_model(
        "QwenImage21Transformer2DModel", patch_size=1, in_channels=4, out_channels=4, num_layers=6, context_in_dim=12,
        mlp_ratio=2, axes_dims_rope=(4, 6, 6), **SIZES,
    )  # fmt: skip
    return model, {
        "hidden_states": noise(2, 20, 4), "encoder_hidden_states": noise(2, 5, 12), "timestep": T,
        "img_shapes": [[(1, 2, 2), (1, 4, 4)]] * 2,
        "img_mask": torch.tensor([[0, 0, 1, 0, 0, 1, 1, 1, 1]] * 2, dtype=torch.bool),
        "encoder_hidden_states_mask": MASK,
    }  # fmt: skip


IMAGES = (
    flux_reference, ovis, bria, bria_fibo, bria_fibo2, bria_fibo2_ragged, flux3, cogview3, glm_image, dreamlite, hidream,
    hunyuan_image, ideogram4, omnigen, qwen_image21,
)  # fmt: skip
