"""Whole training steps (forward, backward, AdamW) beside what `sprint.cost` predicts for this machine.

    python -m benchmarks.cost                 # float32 on a CPU, bf16 autocast on a GPU
    python -m benchmarks.cost --threads 1     # on a busy CPU: the process's own time is measured, for both
    python -m benchmarks.cost --quick

In each round `Hardware.measure` runs its own models, of other sizes; then each setting takes a step of a plain eager loop,
on all tokens and with three quarters of the middle's dropped. The table holds medians over the rounds.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import sprint
from benchmarks import report

# width, depth, side of the token grid, batch; none is a setting of `Hardware.measure`
SETTINGS = [
    (192, 6, 8, 4),
    (192, 12, 8, 2),
    (192, 8, 16, 4),
    (256, 6, 16, 2),
    (320, 8, 8, 8),
    (384, 6, 16, 3),
    (384, 12, 8, 2),
]
LARGE = [(768, 12, 16, 16), (768, 12, 32, 4), (1024, 24, 16, 8), (1152, 28, 16, 16)]


def training(model: sprint.SiT, side: int, batch: int, drop: Any, *, device: str, seed: int) -> Callable[[], None]:
    """A step of the loop that people write."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(batch, 4, 2 * side, 2 * side, device=device, generator=generator)
    t, y = torch.rand(batch, device=device, generator=generator), torch.zeros(batch, dtype=torch.int64, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.startswith("cuda") or None)
    dtype = report.default_dtype(device)

    def step() -> None:
        subset = None if drop is None else drop.sample(batch, (side, side), device=device)
        with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
            loss = (model(x, t, y, subset=subset).float() - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = report.arguments(__doc__ or "")
    parser.add_argument("--threads", type=int, help="of a CPU; by default torch's choice")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    settings = [(64, 4, 2, 1)] if args.quick else LARGE if args.device.startswith("cuda") else SETTINGS
    repeats, seconds = (1, 0.0) if args.quick else (args.repeats, 2.0)
    # What other processes take is no part of one thread's own time; with several, only the clock on the wall is left.
    own = args.device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if own else time.perf_counter
    drop, jobs = sprint.StructuredDrop(0.75), []
    for dim, depth, side, batch in settings:
        ends: dict[str, Any] = {"encoder_depth": 1, "decoder_depth": 1} if args.quick else {}
        config = sprint.SiTConfig(dim=dim, heads=dim // 64, middle_depth=depth - (2 if ends else 4), num_classes=10, **ends)
        model = sprint.SiT(config).to(args.device).train()
        cost = sprint.cost(model, grid=(side, side), drop=drop, batch=batch)
        for path, sampler in (("full", None), ("sparse", drop)):
            row = {"width": dim, "depth": depth, "tokens": side**2, "batch": batch, "path": path}
            step = training(model, side, batch, sampler, device=args.device, seed=args.seed)
            step()
            jobs.append((row, step, cost, [], []))
    for _ in range(repeats):  # the machine is measured again in each round: others may be at work on it
        start = time.perf_counter()
        here = sprint.Hardware.measure(args.device, seconds=seconds)
        print(f"{here}\nmeasured in {time.perf_counter() - start:.1f} s")
        for row, step, cost, predicted, measured in jobs:
            predicted.append(cost.estimate(here)[f"{row['path']}, eager"])
            report.synchronize(args.device)
            begin = clock()
            step()
            report.synchronize(args.device)
            measured.append(clock() - begin)
    rows = []
    for row, _, _, predicted, measured in jobs:
        ratios = [ours / theirs for ours, theirs in zip(predicted, measured, strict=True)]
        rows.append(
            {**row, "predicted ms": 1000 * statistics.median(predicted), "measured ms": 1000 * statistics.median(measured),
             "predicted/measured": statistics.median(ratios)}
        )  # fmt: skip
    ratios = [row["predicted/measured"] for row in rows]
    print(f"predicted / measured: {min(ratios):.2f} to {max(ratios):.2f}")
    report.publish("cost", rows, out=args.out, env=report.environment(args.device))


if __name__ == "__main__":
    main()
