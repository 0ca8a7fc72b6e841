"""Wrap a DiT of your own: its `forward` stays as it is, and the middle blocks see a quarter of the tokens.

python examples/wrap_plain_dit.py
"""

import torch
from torch import nn

import sprint


class Block(nn.Module):
    """A block that gets positions as an argument, one row per token: declared below, they are gathered with the tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(dim), nn.MultiheadAttention(dim, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: torch.Tensor, cond: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        h = self.norm(x + cond[:, None]) + positions
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.mlp(x)


class MyDiT(nn.Module):
    def __init__(self, dim: int = 128, depth: int = 12) -> None:
        super().__init__()
        self.width = dim
        self.embed, self.time, self.head = nn.Linear(16, dim), nn.Linear(1, dim), nn.Linear(dim, 16)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 256, dim))
        self.blocks = nn.ModuleList([Block(dim) for _ in range(depth)])

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        tokens, cond = self.embed(nn.functional.unfold(x, 2, stride=2).transpose(1, 2)), self.time(t[:, None])
        for block in self.blocks:
            tokens = block(tokens, cond, self.positions)
        return nn.functional.fold(self.head(tokens).transpose(1, 2), x.shape[-2:], 2, stride=2)


torch.manual_seed(0)
sprint.register(MyDiT, sprint.Host((sprint.Blocks("blocks", tables={"positions": sprint.Table()}),)))
model = sprint.wrap(MyDiT(), encoder_depth=2, decoder_depth=2, drop=sprint.StructuredDrop(0.75), init="xavier")

images = torch.randn(4, 4, 32, 32)
print(sprint.check(model, images, torch.rand(4)))

optimizer, loss_fn = torch.optim.AdamW(model.parameters(), lr=1e-3), sprint.FlowMatchingLoss()
for step in range(10):
    drop = sprint.StructuredDrop(0.75) if step < 8 else None  # the last steps on all tokens
    loss = loss_fn(model, images, drop=drop).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}, {'sparse' if drop else 'full'}: loss {loss.item():.3f}")
