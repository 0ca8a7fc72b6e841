"""A LightningModule with a wrapped model: sparse epochs, then full ones, validation on all tokens.

It needs `pip install lightning`. Interrupted and called again, it goes on.

python examples/lightning_module.py
"""

import argparse
from pathlib import Path
from typing import Any

import lightning
import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

import sprint


class Flow(lightning.LightningModule):
    """Flow matching on latents with classes.

    Args:
        sparse_share: share of the epochs in which tokens are dropped.
        rate: of learning.
    """

    def __init__(self, sparse_share: float = 0.8, rate: float = 1e-4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.sparse_share, self.rate = sparse_share, rate
        model: Any = DiTTransformer2DModel(
            num_attention_heads=4, attention_head_dim=32, num_layers=6, sample_size=16, out_channels=4
        )
        for block in model.transformer_blocks:  # this host drops labels in each block by itself
            block.norm1.emb.class_embedder.dropout_prob = 0.0
        self.model = sprint.wrap(model, drop=sprint.StructuredDrop(0.75))

    def loss(self, batch: Any) -> torch.Tensor:
        latents, labels = batch
        t, noise = torch.rand(len(latents), device=latents.device), torch.randn_like(latents)
        x = torch.lerp(latents, noise, t.view(-1, 1, 1, 1))
        v = self.model(x, t * 1000, class_labels=labels).sample
        return (v - (noise - latents)).square().mean()

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        sparse = self.current_epoch < self.sparse_share * (self.trainer.max_epochs or 1)
        with sprint.path(self.model, "sparse" if sparse else "full"):
            loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:  # outside of the `with`: the full path
        self.log("validation", self.loss(batch), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.rate)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--precision", default="32-true", help="of Lightning, such as bf16-mixed")
    parser.add_argument("--out", type=Path, default=Path("out/lightning_module"))
    args = parser.parse_args()

    lightning.seed_everything(0)
    data = TensorDataset(torch.randn(64, 4, 16, 16), torch.randint(1000, (64,)))  # yours goes here
    loader, held_out = DataLoader(data, batch_size=8, shuffle=True), DataLoader(data, batch_size=8)
    trainer = lightning.Trainer(
        max_epochs=args.epochs,
        precision=args.precision,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        callbacks=[ModelCheckpoint(dirpath=args.out, save_last=True)],
        logger=False,
    )
    flow, last = Flow(), args.out / "last.ckpt"
    trainer.fit(flow, loader, held_out, ckpt_path=last if last.exists() else None)  # goes on where it was

    again = Flow.load_from_checkpoint(last, weights_only=True)  # Lightning's own file, fusion included
    same = all(tensor.equal(again.state_dict()[name]) for name, tensor in flow.cpu().state_dict().items())
    print(f"saved, and loaded again: {'the same' if same else 'different'} weights")
    flow.model.save_pretrained(args.out / "model")  # without Lightning: sprint.diffusers.from_pretrained
