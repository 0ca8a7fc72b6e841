"""LoRA on a wrapped SD3 transformer: adapters and the fusion learn on a quarter of the tokens, the rest is frozen.

python examples/lora_sd3.py
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import sprint


def base() -> Any:
    """Small and random, the same at each call: take SD3Transformer2DModel.from_pretrained(...) for yours."""
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=32,
        num_layers=8,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=128,
        pooled_projection_dim=64,
        in_channels=4,
        out_channels=4,
    )


model = base()
model.requires_grad_(False)
model.add_adapter(LoraConfig(r=8, target_modules=["to_q", "to_k", "to_v"]))
options: Any = {"encoder_depth": 2, "decoder_depth": 2, "drop": sprint.StructuredDrop(0.75), "fill": "shallow"}
sprint.wrap(model, path_drop=0.0, **options)

learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
print(f"{sum(p.numel() for p in learned):,} of {sum(p.numel() for p in model.parameters()):,} parameters learn")
optimizer = torch.optim.AdamW(learned, lr=1e-3)
latents, text, pooled = torch.randn(4, 4, 32, 32), torch.randn(4, 20, 64), torch.randn(4, 64)
for step in range(10):
    t, noise = torch.rand(4), torch.randn_like(latents)
    x = torch.lerp(latents, noise, t.view(-1, 1, 1, 1))
    with sprint.path(model, "sparse" if step < 8 else "full"):
        v = model(x, text, pooled, t * 1000).sample
    loss = (v - (noise - latents)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}")

folder = Path(tempfile.mkdtemp())  # adapters as the pipelines of diffusers read them, the fusion in a file of its own
adapters: Any = get_peft_model_state_dict(model)
StableDiffusion3Pipeline.save_lora_weights(folder, transformer_lora_layers=adapters)
save_file(model.sprint.state_dict(), folder / "fusion.safetensors")
print(f"saved: {', '.join(sorted(file.name for file in folder.iterdir()))}")

again = sprint.wrap(base(), **options)
again.sprint.load_state_dict(load_file(folder / "fusion.safetensors"))
unused: Any = dict.fromkeys(
    ("vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
)
pipe = StableDiffusion3Pipeline(transformer=again, scheduler=FlowMatchEulerDiscreteScheduler(), **unused)
pipe.load_lora_weights(str(folder), weight_name="pytorch_lora_weights.safetensors")
now = torch.full((4,), 500.0)
with torch.no_grad():
    difference = (again(latents, text, pooled, now).sample - model(latents, text, pooled, now).sample).abs().max()
print(f"loaded: largest difference {difference:.0e}")
