"""Models of others, wrapped: forward and backward of the host, of the full path and of the sparse one, in turns.

A DiT and a Flux of diffusers where it is installed, and timm's vision transformer.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import sprint
from benchmarks import report
from benchmarks.gpu.table import Table
from benchmarks.report import Row

KEYS = ("host", "path")
PATHS = ("host", "full", "sparse")


def run(table: Table, *, dry: bool) -> None:
    """A unit for each host."""
    for name, make in HOSTS.items():
        keys = [{"host": name, "path": path} for path in PATHS]
        table.unit(keys, partial(_rows, name, make, "cpu" if dry else "cuda"), needs=0 if dry else 20)


def dit(large: bool) -> tuple[torch.nn.Module, dict[str, Any], Any]:
    """XL/2's shape; 256 px."""
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    heads, layers, side, batch = (16, 28, 32, 16) if large else (1, 6, 8, 2)
    host = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=72, num_layers=layers, in_channels=4, sample_size=side
    )
    call = {"timestep": torch.arange(batch), "class_labels": torch.zeros(batch, dtype=torch.int64)}
    return host, {"hidden_states": torch.randn(batch, 4, side, side), **call}, None


def flux(large: bool) -> tuple[torch.nn.Module, dict[str, Any], Any]:
    """Double and single blocks, text beside the image; a quarter of Flux's width, 1024 tokens."""
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    heads, layers, side, words, batch = (12, (6, 18), 32, 128, 8) if large else (2, (3, 3), 4, 5, 2)
    host = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=layers[0], num_single_layers=layers[1], attention_head_dim=64,
        num_attention_heads=heads, joint_attention_dim=128, pooled_projection_dim=64, axes_dims_rope=(8, 28, 28),
    )  # fmt: skip
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.stack([torch.zeros(side * side), rows.flatten(), columns.flatten()], dim=1)
    call = {
        "hidden_states": torch.randn(batch, side * side, 64), "encoder_hidden_states": torch.randn(batch, words, 128),
        "pooled_projections": torch.randn(batch, 64), "timestep": torch.rand(batch), "img_ids": places,
        "txt_ids": torch.zeros(words, 3),
    }  # fmt: skip
    return host, call, (side, side)


def vit(large: bool) -> tuple[torch.nn.Module, dict[str, Any], Any]:
    """ViT-L/16 or a tiny one."""
    import timm

    size, batch = (256, 64) if large else (64, 2)
    shape: dict[str, Any] = {} if large else {"depth": 6, "embed_dim": 24, "num_heads": 2}
    host = timm.create_model("vit_large_patch16_224" if large else "vit_tiny_patch16_224", img_size=size, **shape)
    return host, {"x": torch.randn(batch, 3, size, size)}, None


HOSTS: dict[str, Callable[[bool], tuple[torch.nn.Module, dict[str, Any], Any]]] = {
    "diffusers.DiTTransformer2DModel": dit,
    "diffusers.FluxTransformer2DModel": flux,
    "timm.VisionTransformer": vit,
}


def _rows(name: str, make: Callable, device: str) -> list[Row]:
    on_gpu = device == "cuda"
    torch.manual_seed(0)
    host, call, grid = make(on_gpu)
    drop = sprint.StructuredDrop(0.75)
    options: dict[str, Any] = {} if grid is None else {"grid": grid}
    wrapped = sprint.wrap(copy.deepcopy(host), encoder_depth=2, decoder_depth=2, drop=drop, **options).to(device).eval()
    host = host.to(device).eval()
    call = {key: value.to(device) for key, value in call.items()}

    def forward(model: torch.nn.Module) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=on_gpu):
            out = model(**call)
        return getattr(out, "sample", out)

    def step(path: Any) -> None:
        model = host if path == "host" else wrapped
        model.zero_grad()
        if path == "host":
            forward(model).float().square().mean().backward()
            return
        with sprint.path(model, path):
            forward(model).float().square().mean().backward()

    jobs = {path: partial(step, path) for path in PATHS}
    for job in jobs.values():
        for _ in range(3 if on_gpu else 1):
            job()
    times = report.windows(jobs, rounds=6 if on_gpu else 2, calls=5 if on_gpu else 1, device=device)
    medians = {path: report.spread(each) for path, each in times.items()}
    return [
        {"host": name, "path": path, "parameters": sum(p.numel() for p in host.parameters()), **row,
         "host/this": medians["host"]["ms"] / row["ms"], "error": None}
        for path, row in medians.items()
    ]  # fmt: skip
