"""Checkpoints of the original SiT (arXiv 2401.08740), DiT (arXiv 2212.09748) and REPA (arXiv 2410.06940) as our `SiT`.

It is the same function in other words. All have the same tensors; what they mean differs from ours, and is turned
exactly, in float64. SiT:

- time runs from noise (0) to data (1). Ours runs the other way; the sinusoids of 1 - t are a reflection of those of t in
  every (cosine, sine) pair, which the first layer of the time embedder takes up;
- the velocity is data minus noise. Ours is noise minus data: the final layer changes its sign;
- the final layer gives patches as (row, column, channel), and as many channels again that SiT's samplers drop;
- positions are added to the tokens, and there is no norm on queries and keys: `positions="sincos"`, `qk_norm=False`.

DiT predicts the noise, which has the same sign everywhere, at one of 1000 steps: step k is our `t = (k + 1) / 1000`, whose
sinusoids `time_scale=1000` and a rotation of each (cosine, sine) pair give. Sample it, and train it on, with
`prediction="noise", interpolant="ddpm"`; its variances, the second half of its channels, are dropped.

REPA's SiT has our time, sign and velocity already; its projection heads, which are for training alone, are left out.

The fusion starts as the identity, so that the full path is the original model; the sparse and shallow paths have to be
trained.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from sprint.arguments import checked
from sprint.middle.fusion import SparseDenseResidual
from sprint.models.config import SiTConfig
from sprint.models.layers import sincos_positions
from sprint.models.sit import SiT

Kind = Literal["sit", "dit", "repa"]

_TIME = "t_embedder.mlp.0.weight"
_WRAPPERS = ("module.", "_orig_mod.")


_DIT: dict[str, Any] = {"time_scale": 1000.0, "prediction": "noise"}


@checked
def from_original(
    tensors: Mapping[str, Tensor],
    *,
    heads: int,
    kind: Kind = "sit",
    num_classes: int | None = None,
    patch_size: int = 2,
    encoder_depth: int = 2,
    decoder_depth: int = 2,
) -> SiT:
    """Build our model of an original SiT's, DiT's or REPA's state dictionary.

    Args:
        tensors: `state_dict` of the original, such as the "ema" of its checkpoint; prefixes of DistributedDataParallel and
            `torch.compile` are taken off.
        kind: "sit", "dit" or "repa"; no tensor tells them apart.
        heads: attention heads, which no tensor tells (16 for XL/2).
        num_classes: its classes. The table of a model that was trained with label dropout has one row more, the null
            condition; one of just as many rows gets a null row that was never trained, and `label_drop=0`. By default 1000
            for a table of 1001 rows; another must be said, since a real class would be taken for the null one.
        patch_size: of the model.
        encoder_depth: blocks before the middle.
        decoder_depth: blocks after it.

    Raises:
        ValueError: tensors that are no SiT or DiT.
    """
    tensors = _plain_names(tensors)
    needed = ("x_embedder.proj.weight", "pos_embed", _TIME, "y_embedder.embedding_table.weight", "final_layer.linear.weight")
    if missing := [name for name in needed if name not in tensors]:
        raise ValueError(f"this is no checkpoint of the original SiT, it has no {', '.join(missing)}: pass its state_dict")
    if "blocks.0.attn.q_norm.weight" in tensors:
        raise ValueError("the original SiT has no norm on queries and keys, and this model has one: it cannot be converted")
    dim, channels = tensors["x_embedder.proj.weight"].shape[:2]
    depth = 1 + max(int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name)))
    if encoder_depth + decoder_depth >= depth:
        raise ValueError(
            f"encoder_depth={encoder_depth} and decoder_depth={decoder_depth} leave no middle of {depth} blocks"
        )
    table = tensors["y_embedder.embedding_table.weight"]
    num_classes = _classes(len(table), num_classes)
    untrained: dict[str, Any] = {"label_drop": 0.0} if len(table) == num_classes else {}
    config = SiTConfig(
        dim=dim,
        heads=heads,
        encoder_depth=encoder_depth,
        middle_depth=depth - encoder_depth - decoder_depth,
        decoder_depth=decoder_depth,
        patch_size=patch_size,
        in_channels=channels,
        mlp_ratio=tensors["blocks.0.mlp.fc1.weight"].shape[0] / dim,
        num_classes=num_classes,
        positions="sincos",
        qk_norm=False,
        **(_DIT if kind == "dit" else {}),
        **untrained,
    )
    _check_positions(tensors["pos_embed"])
    model = SiT(config)
    fusion = model.middle.fusion
    assert isinstance(fusion, SparseDenseResidual)
    fusion.init = "identity"
    fusion.reset_parameters()
    state = model.state_dict()
    for name, tensor in tensors.items():
        if name == "pos_embed" or (kind == "repa" and name.startswith("projectors.")):
            continue
        ours = _ours(name, config)
        if ours not in state:
            raise ValueError(f"the original SiT has no tensor {name}: this checkpoint is of another model")
        turned = _turned(name, tensor, config, turns=kind != "repa")
        if tensor is table and untrained:
            turned = torch.cat([table, table.mean(0, keepdim=True)])
        if state[ours].shape != turned.shape:
            raise ValueError(f"{name} has shape {tuple(turned.shape)}, expected {tuple(state[ours].shape)}")
        state[ours] = turned.to(state[ours].dtype)
    model.load_state_dict(state)
    return model


@checked
def to_original(model: SiT, *, grid: tuple[int, int] = (16, 16)) -> dict[str, Tensor]:
    """The state dictionary of the original SiT for our model's full path, or of DiT for a model that predicts noise.

    Args:
        model: with `positions="sincos"` and `qk_norm=False`, its fusion still the identity.
        grid: of the positions that the original stores, (16, 16) for 256 px.

    Raises:
        ValueError: the original has no words for this model.
    """
    config, state = model.config, model.state_dict()
    if (config.prediction, config.time_scale) not in (("v", 1.0), ("noise", 1000.0)):
        raise ValueError(
            "the original SiT predicts v at time_scale=1, the original DiT noise at time_scale=1000; this model has "
            f"prediction={config.prediction!r}, time_scale={config.time_scale:g}"
        )
    if config.positions != "sincos" or config.qk_norm or config.num_classes is None or config.repa_dim is not None:
        raise ValueError(
            "the original SiT has sincos positions, no norm on queries and keys, classes and no REPA head; this model has "
            f"positions={config.positions!r}, qk_norm={config.qk_norm}, num_classes={config.num_classes}, "
            f"repa_dim={config.repa_dim}"
        )
    weight, bias = state["middle.fusion.proj.weight"], state["middle.fusion.proj.bias"]
    identity = torch.eye(config.dim, 2 * config.dim, dtype=weight.dtype, device=weight.device)
    if not weight.equal(identity) or bias.any():
        raise ValueError("the fusion was trained, and the original SiT has none: its function cannot be kept")
    theirs = {"pos_embed": sincos_positions(grid, config.dim)}
    for name in _their_names(config):
        tensor = state[_ours(name, config)]
        if name.startswith("final_layer.linear."):
            tensor = _their_patches(_signed(tensor, config), config)
        elif name == _TIME:
            tensor = _their_time(tensor, config)
        elif name == "x_embedder.proj.weight":
            tensor = tensor.unflatten(1, (config.in_channels, config.patch_size, config.patch_size))
        theirs[name] = tensor.clone()
    return theirs


def _plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes that wrappers of a whole model put before its names."""
    found = dict(tensors)
    while found and (prefix := next((p for p in _WRAPPERS if all(name.startswith(p) for name in found)), None)):
        found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    return found


def _classes(rows: int, said: int | None) -> int:
    """The classes of a table; which row is the null condition, none of its numbers tells."""
    if said is None and rows == 1001:
        return 1000
    if said is None or rows not in (said, said + 1):
        raise ValueError(
            f"the table of classes has {rows} rows{'' if said is None else f', and num_classes={said} was given'}: "
            f"pass num_classes={rows - 1} if the last row is the null condition of label dropout, num_classes={rows} if it "
            "was trained without"
        )
    return said


def _turned(name: str, tensor: Tensor, config: SiTConfig, *, turns: bool) -> Tensor:
    """A tensor of theirs as ours; `turns` where their time and sign are others."""
    if name.startswith("final_layer.linear."):
        return _our_patches(_signed(tensor, config) if turns else tensor, config)
    if name == _TIME and turns:
        return _our_time(tensor, config)
    return tensor.flatten(1) if name == "x_embedder.proj.weight" else tensor


def _ours(name: str, config: SiTConfig) -> str:
    match = re.match(r"blocks\.(\d+)\.(.*)", name)
    if match is None:
        return name
    number, rest = int(match[1]), match[2]
    if number < config.encoder_depth:
        return f"encoder.{number}.{rest}"
    number -= config.encoder_depth
    if number < config.middle_depth:
        return f"middle.blocks.{number}.{rest}"
    return f"decoder.{number - config.middle_depth}.{rest}"


def _their_names(config: SiTConfig) -> list[str]:
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
    outer = (
        "x_embedder.proj",
        "t_embedder.mlp.0",
        "t_embedder.mlp.2",
        "final_layer.adaLN_modulation.1",
        "final_layer.linear",
    )
    layers = [*outer, *(f"blocks.{i}.{part}" for i in range(config.depth) for part in parts)]
    return ["y_embedder.embedding_table.weight", *(f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias"))]


def _signed(tensor: Tensor, config: SiTConfig) -> Tensor:
    """SiT's velocity has the other sign, DiT's noise has not."""
    return -tensor if config.prediction == "v" else tensor


def _our_time(weight: Tensor, config: SiTConfig) -> Tensor:
    """SiT's t is our 1 - t, DiT's step is our 1000 t - 1."""
    return _turn(weight, 1.0, mirrored=True) if config.prediction == "v" else _turn(weight, -1.0)


def _their_time(weight: Tensor, config: SiTConfig) -> Tensor:
    return _turn(weight, 1.0, mirrored=True) if config.prediction == "v" else _turn(weight, 1.0)


def _turn(weight: Tensor, shift: float, *, mirrored: bool = False) -> Tensor:
    """Weights that give with s what these gave with `shift + s`, or `shift - s` if mirrored.

    They act on (cos f s, sin f s) for every frequency f; `cos f (a ± s) = cos f a cos f s ∓ sin f a sin f s`, and likewise
    for the sine.
    """
    half = weight.shape[1] // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half).double()
    cos, sin = weight.double().cpu().split(half, dim=1)
    c, s = (frequency * shift).cos(), (frequency * shift).sin()
    sign = -1 if mirrored else 1
    turned = [cos * c + sin * s, sign * (sin * c - cos * s)]
    return torch.cat(turned, dim=1).to(weight.dtype)


def _our_patches(tensor: Tensor, config: SiTConfig) -> Tensor:
    """Rows (row, column, channel) to (channel, row, column), without the channels that are dropped."""
    p = config.patch_size
    whole = tensor.unflatten(0, (p, p, -1)).movedim(2, 0)  # (channels, p, p, *)
    return whole[: config.in_channels].flatten(0, 2)


def _their_patches(tensor: Tensor, config: SiTConfig) -> Tensor:
    p = config.patch_size
    whole = tensor.unflatten(0, (config.in_channels, p, p))
    return torch.cat([whole, torch.zeros_like(whole)]).movedim(0, 2).flatten(0, 2)


def _check_positions(stored: Tensor) -> None:
    side = math.isqrt(stored.shape[1])
    ours = sincos_positions((side, side), stored.shape[2])
    if stored.shape != ours.shape or not torch.allclose(stored.cpu().float(), ours, atol=1e-4):
        raise ValueError("pos_embed is not the fixed table of the original SiT: this checkpoint is of another model")
