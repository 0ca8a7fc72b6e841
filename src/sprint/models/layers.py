"""The layers of a SiT: embedders, rotary positions, attention, the adaLN-Zero block and the final layer.

The transformer is DiT's (arXiv 2212.09748) as SiT uses it (arXiv 2401.08740), with RMSNorm on queries and keys and axial
rotary positions, as in the released SPRINT models. Module names are those of the released checkpoints.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sprint.kernels.fused import Kernels, gate_and_modulate, norm_and_rotate
from sprint.kernels.fused import modulate as fused_modulate
from sprint.random import Device, uniform

AttentionBackend = Literal["sdpa", "xformers"]


def attention(q: Tensor, k: Tensor, v: Tensor, *, backend: AttentionBackend = "sdpa") -> Tensor:
    """Softmax attention; the one place where the library calls an attention kernel.

    Args:
        q: queries, (B, heads, N, head_dim).
        k: keys, like q.
        v: values, like q.
        backend: "sdpa" (torch) or "xformers" (`memory_efficient_attention`, CUDA only).

    Returns:
        (B, heads, N, head_dim).
    """
    if backend == "sdpa":
        return F.scaled_dot_product_attention(q, k, v)
    from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]

    q, k, v = (rearrange(x, "b h n d -> b n h d") for x in (q, k, v))
    return rearrange(memory_efficient_attention(q, k, v), "b n h d -> b h n d")


def check_backend(backend: str) -> None:
    """Raise ImportError for an attention backend that is not installed."""
    if backend == "xformers":
        try:
            import xformers.ops  # noqa: F401  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError(
                f"attention backend 'xformers' cannot be imported ({error}): "
                "pip install 'sprint-diffusion[xformers]', or use 'sdpa'"
            ) from error


def axial_rope(grid: tuple[int, int], head_dim: int, *, theta: float = 10000.0, device: Device = None) -> Tensor:
    """Rotary table of a grid: the first half of each head turns with the row, the second with the column.

    Frequencies are float32, as in the reference. Built from the grid at each call (a few microseconds), so that a model has
    no fixed resolution and no buffer that a checkpoint or a device move could get wrong.

    Args:
        grid: (rows, columns).
        head_dim: divisible by 4.
        theta: base of the frequencies.
        device: of the table.

    Returns:
        (1, rows * columns, head_dim / 2, 2), float32: cosine and sine of the angle of each pair of channels.
    """
    rows, columns = grid
    quarter = head_dim // 4
    frequency = theta ** -(torch.arange(quarter, device=device, dtype=torch.float32) / quarter)
    row, column = torch.meshgrid(
        torch.arange(rows, device=device, dtype=torch.float32),
        torch.arange(columns, device=device, dtype=torch.float32),
        indexing="ij",
    )
    angle = torch.cat([torch.outer(axis.flatten(), frequency) for axis in (row, column)], dim=1)  # (N, head_dim / 2)
    return torch.stack([angle.cos(), angle.sin()], dim=-1)[None]


def sincos_positions(grid: tuple[int, int], dim: int, *, device: Device = None) -> Tensor:
    """Positions that are added to the tokens, as in the original DiT: half of the channels for the column, then the row.

    Args:
        grid: (rows, columns).
        dim: C, divisible by 4.
        device: of the table.

    Returns:
        (1, rows * columns, C), float32.
    """
    rows, columns = grid
    quarter = dim // 4
    frequency = 10000.0 ** -(torch.arange(quarter, device=device, dtype=torch.float64) / quarter)
    row, column = torch.meshgrid(
        torch.arange(rows, device=device, dtype=torch.float64),
        torch.arange(columns, device=device, dtype=torch.float64),
        indexing="ij",
    )
    angles = [torch.outer(axis.flatten(), frequency) for axis in (column, row)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)[None].float()


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn interleaved pairs of channels (2i, 2i+1) by the table's angles; computed in at least float32.

    Args:
        x: (B, heads, N, head_dim).
        rope: (B or 1, N, head_dim / 2, 2).
    """
    cos, sin = rope.unsqueeze(1).unbind(-1)  # (B, 1, N, head_dim / 2)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


class RMSNorm(nn.Module):
    """`x / rms(x) * weight` over the last dimension, in at least float32; keeps the dtype of x."""

    def __init__(self, dim: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


class Attention(nn.Module):
    """Self-attention with RMSNorm on queries and keys, then rotary positions; either may be left out."""

    def __init__(self, dim: int, heads: int, *, qk_norm: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.backend: AttentionBackend = "sdpa"
        self.kernels: Kernels = "torch"
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = RMSNorm(dim // heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(dim // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, rope: Tensor | None) -> Tensor:
        q, k, v = self._fused_inputs(tokens, rope) if self.kernels == "triton" else self._inputs(tokens, rope)
        return self.proj(rearrange(attention(q, k, v, backend=self.backend), "b h n d -> b n (h d)"))

    def _inputs(self, tokens: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = rearrange(self.qkv(tokens), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        return q, k, v

    def _fused_inputs(self, tokens: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        q_norm, k_norm = self.q_norm, self.k_norm
        if rope is None or not isinstance(q_norm, RMSNorm) or not isinstance(k_norm, RMSNorm):
            raise ValueError("kernels 'triton' need qk_norm=True and rotary positions in each block: use 'torch'")
        return norm_and_rotate(self.qkv(tokens), q_norm.weight, k_norm.weight, rope, eps=q_norm.eps)


class MLP(nn.Module):
    """Two linear layers with a tanh-GELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(tokens), approximate="tanh"))


def modulate(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: `LayerNorm(tokens) * (1 + scale) + shift`, one shift and scale per sample, (B, C)."""
    normed = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
    return normed * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Block(nn.Module):
    """Transformer block with adaLN-Zero conditioning (DiT, section 3.2)."""

    recompute = False  # activation checkpointing: see SiT.set_checkpointing

    def __init__(self, dim: int, heads: int, *, mlp_ratio: float = 4.0, qk_norm: bool = True) -> None:
        super().__init__()
        self.kernels: Kernels = "torch"
        self.attn = Attention(dim, heads, qk_norm=qk_norm)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, tokens: Tensor, cond: Tensor, rope: Tensor | None = None) -> Tensor:
        """tokens (B, N, C), cond (B, C), rope (B or 1, N, head_dim / 2, 2) or None -> (B, N, C)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(cond).chunk(6, dim=-1)
        if self.kernels == "triton":
            tokens, modulated = fused_modulate(tokens, shift_a, scale_a)
            tokens, modulated = gate_and_modulate(tokens, self.attn(modulated, rope), gate_a, shift_m, scale_m)
            return tokens + gate_m.unsqueeze(1) * self.mlp(modulated)
        tokens = tokens + gate_a.unsqueeze(1) * self.attn(modulate(tokens, shift_a, scale_a), rope)
        return tokens + gate_m.unsqueeze(1) * self.mlp(modulate(tokens, shift_m, scale_m))


class FinalLayer(nn.Module):
    """adaLN and a linear map from tokens to patch vectors."""

    def __init__(self, dim: int, patch_dim: int) -> None:
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.linear = nn.Linear(dim, patch_dim)

    def forward(self, tokens: Tensor, cond: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(cond).chunk(2, dim=-1)
        return self.linear(modulate(tokens, shift, scale))


class PatchEmbedder(nn.Module):
    """Images to tokens: row-major patches, each a vector ordered (channel, row, column), then a linear map."""

    def __init__(self, patch_size: int, in_channels: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(in_channels * patch_size**2, dim)

    def forward(self, x: Tensor) -> Tensor:
        p = self.patch_size
        return self.proj(rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p))


class TimestepEmbedder(nn.Module):
    """t in [0, 1] to a vector: sinusoids of `scale t` (cosines first, period 10000; SPRINT's scale is 1), then an MLP."""

    def __init__(self, dim: int, *, frequencies: int = 256, scale: float = 1.0) -> None:
        super().__init__()
        self.frequencies, self.scale = frequencies, scale
        self.mlp = nn.Sequential(nn.Linear(frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        half = self.frequencies // 2
        # Made on the device, in float32 like the reference: a table copied from the host cannot be captured in a CUDA graph.
        frequency = torch.exp(-math.log(10000) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
        angle = self.scale * t.to(torch.promote_types(t.dtype, torch.float32)).unsqueeze(1) * frequency
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1).to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """Class ids to vectors; one extra row, index `num_classes`, is the null condition."""

    def __init__(self, num_classes: int, dim: int, *, label_drop: float = 0.1) -> None:
        super().__init__()
        self.num_classes, self.label_drop = num_classes, label_drop
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def null(self, batch: int) -> Tensor:
        """The null condition, (B,) int64."""
        return torch.full((batch,), self.num_classes, device=self.embedding_table.weight.device)

    def forward(self, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        if self.training and self.label_drop > 0:
            dropped = uniform(y.shape, device=y.device, generator=generator) < self.label_drop
            y = y.masked_fill(dropped, self.num_classes)
        return self.embedding_table(y)


class VectorEmbedder(nn.Module):
    """Condition vectors (a pooled text or image embedding) to C; the null condition is a learned vector."""

    def __init__(self, cond_dim: int, dim: int, *, label_drop: float = 0.1) -> None:
        super().__init__()
        self.label_drop = label_drop
        self.null_vector = nn.Parameter(0.02 * torch.randn(cond_dim))
        self.mlp = nn.Sequential(nn.Linear(cond_dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def null(self, batch: int) -> Tensor:
        """The null condition, (B, cond_dim)."""
        return self.null_vector.expand(batch, -1)

    def forward(self, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        if self.training and self.label_drop > 0:
            dropped = uniform((len(y), 1), device=y.device, generator=generator) < self.label_drop
            y = torch.where(dropped, self.null_vector.to(y.dtype), y)
        return self.mlp(y)
