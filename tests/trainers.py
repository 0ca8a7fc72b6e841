"""Run diffusers' own LoRA trainers with SPRINT: a checkout of diffusers in, a table out.

    python tests/trainers.py FOLDER               # a checkout of huggingface/diffusers, left as it is
    python tests/trainers.py FOLDER --only sd3    # one of them

The scripts are in no package of diffusers: `git clone https://github.com/huggingface/diffusers FOLDER`, at the commit that
the patches in `examples/trainers/` name. Each script is copied, patched, and run on a tiny random pipeline
and a few drawn images: with validation, in bfloat16 with checkpointing, resumed with cached latents. What its
blocks got is counted, and what it saved is loaded into a fresh pipeline and sampled. Nothing here runs in CI.
"""

import argparse
import json
import os
import runpy
import string
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

import sprint

ROOT = Path(__file__).parents[1]
SIDE, TOKENS, KEPT = 64, 256, 64  # of an image; of its latents, in 2x2 patches; of those kept
STEPS = 10


# The tiny pipelines


def clip_tokenizer() -> Any:
    """Every letter is a token."""
    from transformers import CLIPTokenizer

    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    words = [*letters, "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)


def t5_tokenizer() -> Any:
    """Every letter is a token."""
    from transformers import T5TokenizerFast

    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -2.0) for letter in "▁" + string.ascii_lowercase)]
    return T5TokenizerFast(vocab=words, extra_ids=0)


def clip(kind: str) -> Any:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=54, bos_token_id=52, eos_token_id=53, pad_token_id=53, hidden_size=32, intermediate_size=32,
        num_attention_heads=2, num_hidden_layers=2, projection_dim=32,
    )  # fmt: skip
    return getattr(transformers, kind)(config)


def t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=30, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4))


def vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1, latent_channels=4, norm_num_groups=2, shift_factor=0.06, scaling_factor=1.5,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def sd3() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=SIDE // 2, num_layers=6, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=64,
        caption_projection_dim=32, pooled_projection_dim=64, in_channels=4, out_channels=4,
    )  # fmt: skip
    encoders = {"text_encoder": clip("CLIPTextModelWithProjection"), "text_encoder_2": clip("CLIPTextModelWithProjection")}
    tokenizers = {"tokenizer": clip_tokenizer(), "tokenizer_2": clip_tokenizer(), "tokenizer_3": t5_tokenizer()}
    rest = {"vae": vae(), "scheduler": FlowMatchEulerDiscreteScheduler(), "text_encoder_3": t5()}
    return StableDiffusion3Pipeline(transformer=transformer, **encoders, **tokenizers, **rest)


def flux() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=3, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=64, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    texts = {"text_encoder": clip("CLIPTextModel"), "text_encoder_2": t5()}
    tokenizers = {"tokenizer": clip_tokenizer(), "tokenizer_2": t5_tokenizer()}
    rest = {"vae": vae(), "scheduler": FlowMatchEulerDiscreteScheduler()}
    return FluxPipeline(transformer=transformer, **texts, **tokenizers, **rest)


@dataclass(frozen=True)
class Trainer:
    """A script, its patch, the tiny pipeline, and the block whose tokens are counted."""

    pipeline: Any
    middle: str

    def script(self, name: str) -> str:
        return f"examples/dreambooth/train_dreambooth_lora_{name}.py"


TRAINERS = {"sd3": Trainer(sd3, "transformer_blocks.3"), "flux": Trainer(flux, "single_transformer_blocks.0")}


def draw_images(folder: Path) -> None:
    """Four coloured discs."""
    folder.mkdir()
    for number, colour in enumerate(("red", "green", "blue", "orange")):
        image = Image.new("RGB", (SIDE, SIDE), "white")
        ImageDraw.Draw(image).ellipse((8 + number, 8, 48, 48), fill=colour)
        image.save(folder / f"{number}.png")


# One run


def watch(report: Path, middle: str, script: str, options: list[str]) -> None:
    """Run a script, and write what a middle block of the models that it wraps got."""
    noted: dict[str, Any] = {"training": [], "sampling": []}
    wrap = sprint.wrap

    def watched(model: Any, **given: Any) -> Any:
        wrap(model, **given)

        def note(block: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            if not noted["training"]:
                noted["start"] = model.sprint.fusion.proj.weight.detach().double().abs().sum().item()
                noted["dtypes"] = sorted({str(p.dtype) for p in model.parameters() if p.requires_grad})
            noted["training" if torch.is_grad_enabled() else "sampling"].append([*args, *kwargs.values()][0].shape[1])

        model.get_submodule(middle).register_forward_pre_hook(note, with_kwargs=True)
        return model

    sprint.wrap = watched
    sys.argv = [script, *options]
    runpy.run_path(script, run_name="__main__")
    report.write_text(json.dumps(noted))


def run(name: str, script: Path, folder: Path, out: Path, *options: str) -> dict[str, Any]:
    """A training run in a process of its own; what `watch` saw, and the losses."""
    report = folder / "report.json"
    report.unlink(missing_ok=True)
    given = {
        "pretrained_model_name_or_path": folder / name,
        "instance_data_dir": folder / "images",
        "output_dir": out,
        "instance_prompt": "a disc",
        "resolution": SIDE,
        "train_batch_size": 2,
        "max_train_steps": STEPS,
        "learning_rate": 1e-3,
        "lr_scheduler": "constant",
        "seed": 0,
    }
    options = (*(f"--{option}={value}" for option, value in given.items()), *options)
    command = [sys.executable, __file__, "--watch", str(report), TRAINERS[name].middle, str(script), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise SystemExit(f"{name} {' '.join(options)}:\n{done.stdout[-2000:]}{done.stderr[-6000:]}")
    return {**json.loads(report.read_text()), "loss": losses(out)}


def losses(out: Path) -> list[float]:
    """From the log that the scripts write."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[int, float] = {}
    for log in sorted(out.rglob("events.out.*")):
        events = EventAccumulator(str(log)).Reload()
        if "loss" in events.Tags()["scalars"]:
            found |= {event.step: event.value for event in events.Scalars("loss")}
    return [found[step] for step in sorted(found)]


# What is asked of a trainer


def expect(true: bool, what: str) -> None:
    if not true:
        raise SystemExit(f"failed: {what}")


def patched(name: str, checkout: Path, folder: Path) -> Path:
    """The script with its patch, in a folder of its own."""
    relative = TRAINERS[name].script(name)
    patch = ROOT / "examples" / "trainers" / f"{name}_lora.patch"
    script = folder / relative
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text((checkout / relative).read_text())
    subprocess.run(["git", "apply", patch], cwd=folder, check=True)
    changed = [
        line for line in patch.read_text().splitlines() if line.startswith(("+", "-")) and line[:3] not in ("+++", "---")
    ]
    expect(0 < len([line for line in changed if line.startswith("+")]) <= 8, f"{patch.name} has at most eight lines")
    expect(all(line.startswith("+") for line in changed), f"{patch.name} only adds lines")
    return script


def moved(file: Path) -> torch.Tensor:
    """What the fusion has learned."""
    weight = load_file(file)["fusion.proj.weight"].float()
    weight[:, : len(weight)] -= torch.eye(len(weight))
    return weight


def sample(name: str, folder: Path, out: Path) -> None:
    """As a person would, afterwards: base, adapters, fusion."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder / name)
    pipe.load_lora_weights(str(out), weight_name="pytorch_lora_weights.safetensors")
    sprint.wrap(pipe.transformer, fill="shallow").sprint.load_state_dict(load_file(out / "fusion.safetensors"))
    pipe.set_progress_bar_config(disable=True)
    options = {"height": SIDE, "width": SIDE, "num_inference_steps": 2, "output_type": "pt"}
    with_fusion = pipe("a disc", generator=torch.Generator().manual_seed(0), **options).images
    sprint.unwrap(pipe.transformer)
    without = pipe("a disc", generator=torch.Generator().manual_seed(0), **options).images
    expect(with_fusion.isfinite().all().item(), "the images are numbers")
    expect(not with_fusion.equal(without), "the fusion counts in the images")


def prove(name: str, checkout: Path, folder: Path) -> None:
    script = patched(name, checkout, folder)
    torch.manual_seed(0)
    TRAINERS[name].pipeline().save_pretrained(folder / name)
    sparse = STEPS * 9 // 10

    out = folder / f"{name}-plain"
    seen = run(name, script, folder, out, "--validation_prompt=a disc", "--num_validation_images=1", "--validation_epochs=3")
    expect(seen["training"] == [KEPT] * sparse + [TOKENS] * (STEPS - sparse), f"sparse steps, then full ones: {seen}")
    expect(len(set(seen["sampling"])) == 1 and seen["sampling"][0] >= TOKENS, f"samples on all tokens: {seen['sampling']}")
    expect(moved(out / "fusion.safetensors").abs().max().item() > 1e-4, "the fusion learns")
    sample(name, folder, out)
    print(f"{name}: {STEPS} steps, {sparse} of them sparse, loss {seen['loss'][0]:.3f} to {seen['loss'][-1]:.3f}, "
          f"validated and sampled, {seen['dtypes']}")  # fmt: skip

    out = folder / f"{name}-bf16"
    seen = run(name, script, folder, out, "--mixed_precision=bf16", "--gradient_checkpointing")
    expect(seen["training"] == [KEPT] * 2 * sparse + [TOKENS] * 2 * (STEPS - sparse), f"each step twice: {seen['training']}")
    change = moved(out / "fusion.safetensors")
    learned = change.diagonal().ne(0).float().mean().item()  # weights of 1, where small steps are lost in bfloat16
    expect(learned > 0.9, f"the fusion learns in bfloat16: {learned:.0%} of its diagonal moved")
    print(f"{name}: bfloat16, checkpointing, loss {seen['loss'][0]:.3f} to {seen['loss'][-1]:.3f}, "
          f"{seen['dtypes']}")  # fmt: skip

    out = folder / f"{name}-resumed"
    first = run(name, script, folder, out, "--cache_latents", f"--checkpointing_steps={STEPS // 2}")
    checkpoint = out / f"checkpoint-{STEPS // 2}"
    fusion = torch.load(checkpoint / "custom_checkpoint_0.pkl", weights_only=True)["fusion.proj.weight"]
    again = run(name, script, folder, out, "--cache_latents", f"--resume_from_checkpoint={checkpoint}")
    expect(len(again["training"]) == STEPS - STEPS // 2, f"half of the steps after resuming: {again['training']}")
    expect(abs(again["start"] - fusion.double().abs().sum().item()) < 1e-6, "the fusion is resumed")
    expect(again["start"] != first["start"], "the fusion had learned before")
    print(f"{name}: resumed at step {STEPS // 2}, with its fusion")


def main() -> None:
    if sys.argv[1:2] == ["--watch"]:
        watch(Path(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=list(TRAINERS))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        draw_images(folder / "images")
        for name in [args.only] if args.only else TRAINERS:
            prove(name, args.folder.resolve(), folder)


if __name__ == "__main__":
    main()
