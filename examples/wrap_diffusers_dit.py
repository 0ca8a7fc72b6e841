"""Wrap a transformer of diffusers and train ten steps: eight sparse ones, two on all tokens.

python examples/wrap_diffusers_dit.py
"""

from typing import Any

import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

import sprint

torch.manual_seed(0)
model: Any = DiTTransformer2DModel(
    num_attention_heads=4, attention_head_dim=32, in_channels=4, num_layers=12, sample_size=32
)
for block in model.transformer_blocks:  # this host drops labels in each block by itself; drop them outside instead
    block.norm1.emb.class_embedder.dropout_prob = 0.0

latents, labels, steps = torch.randn(4, 4, 32, 32), torch.arange(4), torch.arange(4) * 250
before = model(latents, steps, class_labels=labels).sample
sprint.wrap(model, encoder_depth=2, decoder_depth=2, drop=sprint.StructuredDrop(0.75))
assert model(latents, steps, class_labels=labels).sample.equal(before)  # nothing has changed yet
print(sprint.check(model, latents, steps, class_labels=labels))

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
for step in range(10):
    t, noise = torch.rand(4), torch.randn_like(latents)
    x = torch.lerp(latents, noise, t.view(-1, 1, 1, 1))
    with sprint.path(model, "sparse" if step < 8 else "full"):
        v = model(x, t * 1000, class_labels=labels).sample[:, :4]
    loss = (v - (noise - latents)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}")

sprint.unwrap(model)  # exactly the host again
