"""An accelerate loop with a wrapped model: sparse steps, then full ones; interrupted and called again, it goes on.

accelerate launch examples/accelerate_loop.py --out out/loop --mixed_precision bf16
python examples/accelerate_loop.py --steps 20
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch.utils.data import DataLoader, TensorDataset

import sprint


class Progress:
    """The number of updates, saved and loaded with the rest."""

    step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def build() -> Any:
    """Small and random: take from_pretrained(...) for yours."""
    model: Any = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=32, num_layers=6, sample_size=16, out_channels=4
    )
    for block in model.transformer_blocks:  # this host drops labels in each block by itself
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    return sprint.wrap(model, drop=sprint.StructuredDrop(0.75))  # before prepare, so that the fusion is shared out too


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="updates, the last fifth on all tokens")
    parser.add_argument("--save_every", type=int, default=5)
    parser.add_argument("--gradient_accumulation", type=int, default=2)
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="no")
    parser.add_argument("--out", type=Path, default=Path("out/accelerate_loop"))
    args = parser.parse_args()

    accelerator = Accelerator(gradient_accumulation_steps=args.gradient_accumulation, mixed_precision=args.mixed_precision)
    set_seed(0)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    data = TensorDataset(torch.randn(64, 4, 16, 16), torch.randint(1000, (64,)))  # latents and classes
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=8, shuffle=True))

    progress, state = Progress(), args.out / "state"
    accelerator.register_for_checkpointing(progress)
    if state.exists():
        accelerator.load_state(str(state))
        accelerator.print(f"goes on at step {progress.step}")

    while progress.step < args.steps:
        for latents, labels in loader:
            with accelerator.accumulate(model):
                t, noise = torch.rand(len(latents), device=latents.device), torch.randn_like(latents)
                x = torch.lerp(latents, noise, t.view(-1, 1, 1, 1))
                with sprint.path(model, "sparse" if progress.step < 0.8 * args.steps else "full"):
                    v = model(x, t * 1000, class_labels=labels).sample
                loss = (v - (noise - latents)).square().mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            progress.step += 1
            accelerator.print(f"step {progress.step}: loss {loss.item():.3f}")
            if progress.step % args.save_every == 0 or progress.step == args.steps:
                accelerator.save_state(str(state))
            if progress.step == args.steps:
                break

    accelerator.wait_for_everyone()
    trained = accelerator.unwrap_model(model)
    if accelerator.is_main_process:
        trained.save_pretrained(args.out / "model")  # safetensors, the fusion in it
        again = sprint.diffusers.from_pretrained(DiTTransformer2DModel, args.out / "model")
        same = all(tensor.equal(again.state_dict()[name]) for name, tensor in trained.cpu().state_dict().items())
        print(f"saved, and loaded again: {'the same' if same else 'different'} weights")


if __name__ == "__main__":
    main()
