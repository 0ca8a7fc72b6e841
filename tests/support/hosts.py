"""Plain PyTorch models as people write them, for the tests of `wrap`."""

import torch
from torch import nn


class Block(nn.Module):
    """A block called as `block(x, c)`, as in the original DiT and SiT."""

    def __init__(self, dim: int, heads: int = 2) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(dim), nn.MultiheadAttention(dim, heads, batch_first=True)
        self.cond, self.mlp = nn.Linear(dim, dim), nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x, c):
        h = self.norm(x + self.cond(c)[:, None])
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.mlp(h)


class RotaryBlock(Block):
    """As in REPA and LightningDiT: the rotary table comes as an argument, (N, D), here added for simplicity."""

    def forward(self, x, c, feat_rope=None):
        return super().forward(x + feat_rope[None], c)


class DiT(nn.Module):
    """The original DiT's shape: patches, blocks, a condition."""

    def __init__(self, dim: int = 16, depth: int = 6, *, block: type[nn.Module] = Block, rope: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden_size = dim
        self.embed = nn.Conv2d(3, dim, 2, 2)
        self.position = nn.Parameter(torch.randn(1, 16, dim))
        self.rope = nn.Parameter(torch.randn(16, dim)) if rope else None
        self.blocks = nn.ModuleList([block(dim) for _ in range(depth)])
        self.head = nn.Linear(dim, 12)

    def forward(self, x, t, y=None):
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.position
        cond = t[:, None].expand(-1, tokens.shape[-1]) + (0 if y is None else y[:, None])
        for block in self.blocks:
            tokens = block(tokens, cond) if self.rope is None else block(tokens, cond, feat_rope=self.rope)
        return nn.functional.fold(self.head(tokens).transpose(1, 2), x.shape[-2:], 2, stride=2)


class UViT(nn.Module):
    """U-ViT's shape: long skips from the first half to the second, one block between, and a prefix token."""

    class Up(Block):
        def __init__(self, dim: int) -> None:
            super().__init__(dim)
            self.join = nn.Linear(2 * dim, dim)

        def forward(self, x, c, skip):
            return super().forward(self.join(torch.cat([x, skip], dim=-1)), c)

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_dim = dim
        self.embed, self.time, self.position = (
            nn.Conv2d(3, dim, 2, 2),
            nn.Linear(1, dim),
            nn.Parameter(torch.randn(1, 17, dim)),
        )
        self.in_blocks = nn.ModuleList([Block(dim) for _ in range(3)])
        self.mid_block = Block(dim)
        self.out_blocks = nn.ModuleList([self.Up(dim) for _ in range(3)])
        self.head = nn.Linear(dim, 12)

    def forward(self, x, t):
        tokens = torch.cat([self.time(t[:, None])[:, None], self.embed(x).flatten(2).transpose(1, 2)], 1) + self.position
        cond, skips = self.time(t[:, None]), []
        for block in self.in_blocks:
            tokens = block(tokens, cond)
            skips.append(tokens)
        tokens = self.mid_block(tokens, cond)
        for block in self.out_blocks:
            tokens = block(tokens, cond, skips.pop())
        return nn.functional.fold(self.head(tokens[:, 1:]).transpose(1, 2), x.shape[-2:], 2, stride=2)
