"""Slow, readable twins of what the library computes: the oracles of the tests. Loops and plain formulas, nothing shared."""

import cmath
import math

import torch
from torch import Tensor


def gather(tokens: Tensor, keep: Tensor) -> Tensor:
    return torch.stack([torch.stack([tokens[b, i] for i in row]) for b, row in enumerate(keep.tolist())])


def restore(sparse: Tensor, keep: Tensor, fill: Tensor, num_tokens: int) -> Tensor:
    """`fill` (C,) everywhere, then one kept token after the other."""
    rows = []
    for b, row in enumerate(keep.tolist()):
        tokens = [fill] * num_tokens
        for k, i in enumerate(row):
            tokens[i] = sparse[b, k]
        rows.append(torch.stack(tokens))
    return torch.stack(rows)


def fuse(weight: Tensor, bias: Tensor, mask_token: Tensor, shallow: Tensor, *, deep: Tensor, keep: Tensor) -> Tensor:
    """The plain form, W [g_pad ; f] + b, with the padded (B, N, 2C) tensor."""
    padded = restore(deep, keep, mask_token.flatten(), shallow.shape[1])
    return torch.cat([padded, shallow], dim=-1) @ weight.T + bias


def turn(head: Tensor, row: int, column: int) -> Tensor:
    """Rotary positions of one head vector (D,): its first half turns with the row, its second with the column."""
    pairs = len(head) // 4
    turned = []
    for half, position in ((head[: 2 * pairs], row), (head[2 * pairs :], column)):
        for i in range(pairs):
            frequency = torch.tensor(10000.0, dtype=torch.float32) ** -(i / pairs)
            angle = cmath.exp(1j * float(torch.tensor(float(position)) * frequency))
            a, b = half[2 * i], half[2 * i + 1]
            turned += [a * angle.real - b * angle.imag, a * angle.imag + b * angle.real]
    return torch.stack(turned)


def rope(x: Tensor, columns: int) -> Tensor:
    """(B, heads, N, D), row-major positions on a grid with this many columns."""
    return torch.stack(
        [torch.stack([torch.stack([turn(v, *divmod(n, columns)) for n, v in enumerate(h)]) for h in b]) for b in x]
    )


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1) @ v


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6) * weight


def layer_norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def linear(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def block(weights: dict[str, Tensor], name: str, tokens: Tensor, cond: Tensor, *, heads: int, table: Tensor) -> Tensor:
    """A DiT block; `table` holds the positions of its tokens, (B, N, D / 2), as complex numbers of length one."""
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (
        part[:, None] for part in linear(weights, f"{name}.adaLN_modulation.1", silu(cond)).chunk(6, dim=-1)
    )
    b, n, c = tokens.shape
    qkv = linear(weights, f"{name}.attn.qkv", layer_norm(tokens) * (1 + scale_a) + shift_a)
    q, k, v = (part.reshape(b, n, heads, c // heads).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    q, k = (
        torch.view_as_real(
            torch.view_as_complex(rms_norm(x, weights[f"{name}.attn.{norm}.weight"]).unflatten(-1, (-1, 2))) * table[:, None]
        ).flatten(-2)
        for x, norm in ((q, "q_norm"), (k, "k_norm"))
    )
    attended = attention(q, k, v).transpose(1, 2).reshape(b, n, c)
    tokens = tokens + gate_a * linear(weights, f"{name}.attn.proj", attended)
    hidden = gelu(linear(weights, f"{name}.mlp.fc1", layer_norm(tokens) * (1 + scale_m) + shift_m))
    return tokens + gate_m * linear(weights, f"{name}.mlp.fc2", hidden)


def positions(rows: int, columns: int, head_dim: int) -> Tensor:
    """(N, head_dim / 2) complex128: `turn`'s rotations."""
    ones = torch.tensor([1.0, 0.0] * (head_dim // 2), dtype=torch.float64)
    grid = [turn(ones, row, column) for row in range(rows) for column in range(columns)]
    return torch.view_as_complex(torch.stack(grid).unflatten(-1, (-1, 2)))


def sit(weights: dict[str, Tensor], config, x: Tensor, t: Tensor, y: Tensor, *, keep: Tensor) -> Tensor:
    """The velocity of a class-conditional SiT in float64, its middle on the kept tokens, with the plain fusion."""
    p, (b, channels, height, width) = config.patch_size, x.shape
    rows, columns = height // p, width // p
    patches = [x[:, :, r * p : (r + 1) * p, c * p : (c + 1) * p].flatten(1) for r in range(rows) for c in range(columns)]
    tokens = linear(weights, "x_embedder.proj", torch.stack(patches, dim=1))
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    angles = t[:, None] * frequencies
    cond = linear(weights, "t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], dim=1))
    cond = linear(weights, "t_embedder.mlp.2", silu(cond)) + weights["y_embedder.embedding_table.weight"][y]

    table = positions(rows, columns, config.dim // config.heads).expand(b, -1, -1)
    for i in range(config.encoder_depth):
        tokens = block(weights, f"encoder.{i}", tokens, cond, heads=config.heads, table=table)
    deep, kept = gather(tokens, keep), gather(table, keep)
    for i in range(config.middle_depth):
        deep = block(weights, f"middle.blocks.{i}", deep, cond, heads=config.heads, table=kept)
    fusion = [weights[f"middle.fusion.{name}"] for name in ("proj.weight", "proj.bias", "mask_token")]
    tokens = fuse(*fusion, tokens, deep=deep, keep=keep)
    for i in range(config.decoder_depth):
        tokens = block(weights, f"decoder.{i}", tokens, cond, heads=config.heads, table=table)

    shift, scale = (part[:, None] for part in linear(weights, "final_layer.adaLN_modulation.1", silu(cond)).chunk(2, -1))
    patches = linear(weights, "final_layer.linear", layer_norm(tokens) * (1 + scale) + shift)
    image = torch.empty_like(x)
    for n in range(rows * columns):
        r, c = divmod(n, columns)
        image[:, :, r * p : (r + 1) * p, c * p : (c + 1) * p] = patches[:, n].reshape(b, channels, p, p)
    return image
