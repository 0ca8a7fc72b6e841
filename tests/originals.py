"""Wrap models as their authors wrote them: a folder of checkouts in, a table for docs/wrapping.md out.

    python tests/originals.py FOLDER               # FOLDER/SiT, FOLDER/U-ViT, ...: clones, unmodified
    python tests/originals.py FOLDER --only SiT    # one of them, with its whole report

Each model is built at a tiny size with random weights, wrapped, and proved by `sprint.check`; then its sparse path runs on
several sizes of image. Packages that need a GPU are replaced by what computes the same. Nothing here runs in CI.
"""

import argparse
import importlib
import importlib.abc
import importlib.machinery
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import sprint
from sprint import Blocks, Host, Table
from sprint.hosts.outputs import first_tensor


@dataclass
class Original:
    """How to build one, and what to call it with.

    Args:
        repository: its name, that of its folder too.
        build: makes the model, from the module that `module` names.
        inputs: arguments of its forward, for images of a side.
        module: to import, with `path` (below the folder) on the path.
        options: of `wrap` beside the drop sampler.
        host: a declaration, if it needs one.
        lines: of that declaration.
        output: of `check`.
        absent: packages that are imported and not used.
        stubs: packages that are replaced.
        sides: of the images tried.
    """

    repository: str
    module: str
    build: Callable[[Any, int], torch.nn.Module]
    inputs: Callable[[int], tuple[tuple, dict]]
    path: str = ""
    options: Callable[[int], dict[str, Any]] = lambda side: {}
    host: Host | None = None
    lines: int = 0
    output: Callable[[Any], torch.Tensor] | None = None
    absent: tuple[str, ...] = ()
    stubs: Callable[[], None] = lambda: None
    sides: tuple[int, ...] = (16, 24, 48)


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Packages that are not installed, whose names the checkout imports without using them."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        known = fullname.split(".", maxsplit=1)[0] in self.names
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if known else None

    def exec_module(self, module: types.ModuleType) -> None:
        module.__getattr__ = _unused  # pyright: ignore[reportAttributeAccessIssue]


def _unused(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (torch.nn.Module,), {})


def labelled(side: int, channels: int = 4) -> tuple[tuple, dict]:
    """Latents, times, classes."""
    torch.manual_seed(1)
    return (torch.randn(2, channels, side, side), torch.rand(2), torch.tensor([1, 2])), {}


def flux_inputs(side: int) -> tuple[tuple, dict]:
    """Packed tokens with ids, text, a pooled vector."""
    torch.manual_seed(1)
    rows = side // 4
    ids = torch.zeros(2, rows * rows, 3)
    ids[..., 1], ids[..., 2] = torch.arange(rows * rows) // rows, torch.arange(rows * rows) % rows
    call = {"img": torch.randn(2, rows * rows, 16), "img_ids": ids, "txt": torch.randn(2, 5, 12)}
    return (), {**call, "txt_ids": torch.zeros(2, 5, 3), "timesteps": torch.rand(2), "y": torch.randn(2, 8)}


def flux(module: Any, side: int) -> torch.nn.Module:
    sizes: dict[str, Any] = {"in_channels": 16, "out_channels": 16, "vec_in_dim": 8, "context_in_dim": 12, "mlp_ratio": 2.0}
    return module.Flux(
        module.FluxParams(
            **sizes,
            hidden_size=48,
            num_heads=2,
            depth=3,
            depth_single_blocks=3,
            axes_dim=[4, 10, 10],
            theta=10_000,
            qkv_bias=True,
            guidance_embed=False,
        )
    )


def plain_flash() -> None:
    """Wan's flash attention by torch's own, for whole batches without padding."""
    attention = types.ModuleType("wan.modules.attention")

    def flash_attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    attention.flash_attention = flash_attention  # pyright: ignore[reportAttributeAccessIssue]
    sys.modules["wan.modules.attention"] = attention


SIZES: dict[str, Any] = {"hidden_size": 48, "depth": 6, "num_heads": 3, "num_classes": 10}
ROPE_HEADS = {"feat_rope": Table(dim=0, batched=False)}
SPEEDRUN = {"rope_ids": Table(stream="text+image"), "v1": Table(dim=2, stream="text+image")}
ORIGINALS = {
    "SiT": Original("willisma/SiT", "models", lambda m, s: m.SiT(input_size=s, **SIZES), labelled),
    "REPA": Original(
        "sihyun-yu/REPA", "models.sit",
        lambda m, s: m.SiT(input_size=s, decoder_hidden_size=48, encoder_depth=2, z_dims=[32], projector_dim=64,
                           qk_norm=False, fused_attn=True, **SIZES),
        labelled, options=lambda s: {"encoder_depth": 3, "decoder_depth": 1},
    ),
    "U-ViT": Original(
        "baofff/U-ViT", "libs.uvit",
        lambda m, s: m.UViT(img_size=s, patch_size=2, in_chans=4, embed_dim=48, depth=6, num_heads=3, num_classes=10),
        labelled,
    ),
    "flux": Original("black-forest-labs/flux", "flux.model", flux, flux_inputs, "src",
                     options=lambda s: {"grid": (s // 4, s // 4)}),
    "LightningDiT": Original(
        "hustvl/LightningDiT", "models.lightningdit",
        lambda m, s: m.LightningDiT(input_size=s, in_channels=4, use_rope=True, use_qknorm=True, use_swiglu=True,
                                    use_rmsnorm=True, **SIZES),
        labelled, host=Host((Blocks("blocks", tables=ROPE_HEADS),)), lines=1, absent=("fairscale",),
    ),
    "minRF": Original(
        "cloneofsimo/minRF", "dit",
        lambda m, s: m.DiT_Llama(in_channels=4, input_size=s, dim=64, n_layers=6, n_heads=2, num_classes=10),
        labelled,
        host=Host((Blocks("layers", tables={"freqs_cis": Table(dim=0, batched=False, longer=True)}),)), lines=1,
    ),
    "micro_diffusion": Original(
        "SonyResearch/micro_diffusion", "micro_diffusion.models.dit",
        lambda m, s: m.DiT(input_size=s, dim=64, depth=6, head_dim=32, caption_channels=24, patch_mixer_depth=2,
                           patch_mixer_dim=64, experts_every_n=100),
        lambda s: ((*labelled(s)[0][:2], torch.randn(2, 1, 7, 24)), {}),
        host=Host((Blocks("blocks"),)), lines=1, output=lambda out: out["sample"],
        absent=("torchmetrics", "composer", "streaming", "open_clip"),
    ),
    "MaskDiT": Original("Anima-Lab/MaskDiT", "models.maskdit", lambda m, s: m.DiT(input_size=s, **SIZES),
                        lambda s: ((*labelled(s)[0][:2], torch.eye(10)[[1, 2]]), {}), output=lambda out: out["x"]),
    "SpeedrunDiT": Original(
        "SwayStar123/SpeedrunDiT", "models.sit",
        lambda m, s: m.SiT(input_size=s, decoder_hidden_size=48, encoder_depth=2, z_dims=[32], projector_dim=64,
                           cls_token_dim=24, qk_norm=False, fused_attn=True, **SIZES),
        lambda s: (labelled(s)[0], {"cls_token": torch.randn(2, 32)}),
        host=Host(
            (Blocks("blocks", stream="text+image", others=("feat_rope",), tables=SPEEDRUN),),
            image_tokens=lambda model, arguments, length: length - 1),
        lines=3,
    ),
    "MDT": Original(
        "sail-sg/MDT", "masked_diffusion.models", lambda m, s: m.MDTv2(input_size=s, decode_layer=2, **SIZES), labelled
    ),
    "Latte": Original(
        "Vchitect/Latte", "models.latte", lambda m, s: m.Latte(input_size=s, num_frames=4, extras=2, **SIZES),
        lambda s: ((torch.randn(2, 4, 4, s, s), *labelled(s)[0][1:]), {}),
    ),
    "Wan2.1": Original(
        "Wan-Video/Wan2.1", "wan.modules.model",
        lambda m, s: m.WanModel(in_dim=4, out_dim=4, dim=48, ffn_dim=96, freq_dim=32, text_dim=24, text_len=8, num_heads=2,
                                num_layers=6),
        lambda s: (([torch.randn(4, 2, s, s)] * 2, torch.tensor([3.0, 5.0]), [torch.randn(5, 24)] * 2),
                   {"seq_len": 2 * s * s // 4}),
        options=lambda s: {"grid": (2, s // 2, s // 2)}, stubs=plain_flash,
    ),
    "sd3.5": Original(
        "Stability-AI/sd3.5", "mmditx",
        lambda m, s: m.MMDiTX(input_size=s, depth=6, num_patches=s * s // 4, pos_embed_max_size=s // 2, adm_in_channels=16,
                              qk_norm="rms",
                              context_embedder_config={"target": "torch.nn.Linear",
                                                       "params": {"in_features": 24, "out_features": 384}}),
        lambda s: (labelled(s)[0][:2], {"y": torch.randn(2, 16), "context": torch.randn(2, 5, 24)}),
        host=Host(
            (Blocks("joint_blocks", arguments=("context", "x"), image="x", text="context", returns=("text", "image")),)
        ),
        lines=1,
    ),
    "RAE": Original(
        "bytetriper/RAE", "stage2.models.DDT",
        lambda m, s: m.DiTwDDTHead(input_size=s // 4, patch_size=1, in_channels=16, hidden_size=[48, 48], depth=[6, 2],
                                   num_heads=[3, 3], num_classes=10, use_qknorm=True),
        lambda s: labelled(s // 4, 16), "src",
        host=Host((Blocks("blocks", tables=ROPE_HEADS),)), lines=1,
        options=lambda s: {"drop": sprint.StructuredDrop(0.75, shared=True)},
    ),
}  # fmt: skip


def tried(name: str, folder: Path, *, whole: bool) -> str:
    """The row of one model."""
    this, root = ORIGINALS[name], folder / name
    module = imported(this, root)
    needed, proof = "not possible", "?"
    model: Any = None
    try:
        for side in this.sides:
            torch.manual_seed(0)
            model = this.build(module, side).eval()
            for parameter in model.parameters():  # gates and outputs that start at zero hide the blocks
                if parameter.requires_grad and not (
                    parameter.any() and parameter.abs().max() < 100
                ):  # NaN: never initialised
                    torch.nn.init.normal_(parameter, std=0.02)
            args, kwargs = this.inputs(side)
            wrapped = sprint.wrap(model, **{"drop": sprint.StructuredDrop(0.75), "host": this.host, **this.options(side)})
            report = sprint.check(wrapped, *args, output=this.output, **kwargs)
            if whole:
                print(report)
            step(wrapped, this, args, kwargs)
            proof = "; ".join(f"{f.name}: {f.detail}" for f in report.findings[:6] if not f.ok) or "all proved"
        needed = f"{this.lines} line{'s' * (this.lines != 1)}"
        proof += f", sides {', '.join(map(str, this.sides))}"
    except Exception as error:
        text = " ".join(str(error).split())
        proof = f"{type(error).__name__}: {text if whole else text[:160]}"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    return f"| {this.repository} `{type(model).__name__}` | {commit.stdout.strip() or '-'} | {needed} | {proof} |"


def imported(this: Original, root: Path) -> Any:
    """The module, without what the packages' own __init__ would import."""
    sys.path.insert(0, str(root / this.path))
    names = this.module.split(".")[:-1]
    for depth in range(len(names)):
        parent = ".".join(names[: depth + 1])
        sys.modules[parent] = types.ModuleType(parent)
        sys.modules[parent].__path__ = [str(root / this.path / Path(*names[: depth + 1]))]
    sys.meta_path.append(Absent(this.absent))
    this.stubs()
    return importlib.import_module(this.module)


def step(model: torch.nn.Module, this: Original, args: tuple, kwargs: dict) -> None:
    """A sparse training step (in eval mode: some drop labels on a GPU), in which the middle and the fusion learn."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    with sprint.path(model, "sparse"):
        returned = model(*args, **kwargs)
    first_tensor(returned if this.output is None else this.output(returned)).square().mean().backward()
    optimizer.step()
    after = dict(model.named_parameters())
    learned = [name for name, value in before.items() if not after[name].equal(value)]
    if len(learned) < len(before) // 2 or not all(parameter.isfinite().all() for parameter in after.values()):
        raise RuntimeError(f"in a sparse step {len(learned)} of {len(before)} parameters learned")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=list(ORIGINALS))
    args = parser.parse_args()
    if args.only:
        print(tried(args.only, args.folder.resolve(), whole=True))
        return
    print("| model | commit | declaration | `check` |\n|---|---|---|---|")
    for name, this in ORIGINALS.items():
        if (args.folder / name).is_dir():
            command = [sys.executable, __file__, str(args.folder), "--only", name]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            rows = [line for line in run.stdout.splitlines() if line.startswith("| ")]
            last = (run.stderr.strip().splitlines() or ["nothing"])[-1]
            print(rows[-1] if rows else f"| {this.repository} | - | not built | {last[:160]} |", flush=True)


if __name__ == "__main__":
    main()
