"""Path-Drop Guidance in an unmodified diffusers pipeline: the unconditional branch skips the middle blocks.

python examples/pdg_pipeline.py
"""

import time
from contextlib import nullcontext
from typing import Any

import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

import sprint
from sprint.diffusers import path_drop_guidance

torch.manual_seed(0)
transformer: Any = SD3Transformer2DModel(  # small and random: its images mean nothing, its times do
    sample_size=32,
    num_layers=12,
    attention_head_dim=32,
    num_attention_heads=6,
    joint_attention_dim=64,
    caption_projection_dim=192,
    pooled_projection_dim=64,
    in_channels=4,
    out_channels=4,
)
sprint.wrap(transformer, encoder_depth=2, decoder_depth=2, init="xavier")
nothing: Any = None  # prompts are given as embeddings, images are left as latents
pipe: Any = StableDiffusion3Pipeline(transformer, FlowMatchEulerDiscreteScheduler(), *[nothing] * 7)
pipe.set_progress_bar_config(disable=True)
prompt = {name: torch.randn(2, 20, 64) for name in ("prompt_embeds", "negative_prompt_embeds")}
prompt |= {name: torch.randn(2, 64) for name in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")}

pipe(**prompt, height=256, width=256, num_inference_steps=1, output_type="latent")  # warm-up
for name, guidance in {"CFG": nullcontext(), "PDG": path_drop_guidance(transformer, weak_half="first")}.items():
    start = time.perf_counter()
    with guidance:
        pipe(**prompt, height=256, width=256, guidance_scale=3.0, num_inference_steps=10, output_type="latent")
    print(f"{name}: {(time.perf_counter() - start) / 10 * 1000:.0f} ms per step for two images")
