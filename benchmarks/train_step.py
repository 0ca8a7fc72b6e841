"""Seconds of a training step, sparse and dense (forward, backward, clip, AdamW): `sprint.TrainStep` beside an eager loop.

    python -m benchmarks.train_step                                          # on a GPU: XL/2, 256 and 512 px, bf16
    python -m benchmarks.train_step --preset S/2 --job 16x16:8               # on a CPU: float32
    python -m benchmarks.train_step --quick

All train our SiT in one process; sparse and dense steps are timed in turns. On a GPU the last two rows of a job are the same
step with our kernels in the blocks (`SiT.set_kernels`); --kernels takes one kind alone. `first s` is the first call, with
compilation (cold caches with --cold), `predicted ms` is that of `sprint.cost`, for an H100.
"""

import gc
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

import sprint
from benchmarks import report
from sprint.kernels.fused import Kernels

NAMES: dict[str, Kernels] = {  # of what is measured, and what computes the element-wise part of its blocks
    "eager": "torch",
    "TrainStep": "torch",
    "TrainStep, sprint.AdamW": "torch",
    "TrainStep, sprint.AdamW, Triton blocks": "triton",
}
PATHS: dict[str, sprint.StructuredDrop | None] = {"sparse": sprint.StructuredDrop(0.75), "dense": None}
CLIP = 1.0


def eager(model: Any, loss: sprint.FlowMatchingLoss, optimizer: Any, dtype: torch.dtype | None, device: str) -> Callable:
    """The loop that people write."""

    def step(x: torch.Tensor, *, y: torch.Tensor, drop: Any) -> None:
        with torch.autocast(torch.device(device).type, dtype, enabled=dtype is not None):
            out = loss(model, x, y=y, drop=drop)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


def build(name: str, model: sprint.SiT, *, dtype: torch.dtype | None) -> Callable:
    """The step of an implementation, by its name in NAMES; it is called as `step(x, y=y, drop=drop)`."""
    model.set_kernels(NAMES[name])
    if "sprint.AdamW" in name:
        optimizer: torch.optim.Optimizer = sprint.AdamW(model.parameters(), lr=1e-4)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    loss = sprint.FlowMatchingLoss()
    if name.startswith("TrainStep"):
        return sprint.TrainStep(model, loss, optimizer, clip=CLIP, autocast=dtype)
    return eager(model, loss, optimizer, dtype, next(model.parameters()).device.type)


def measure(name: str, preset: str, grid: tuple[int, int], batch: int, args: Any) -> list[report.Row]:
    """Rows of one implementation on one job: first call, memory, then both paths in turns."""
    on_gpu = args.device.startswith("cuda")
    dtype = torch.bfloat16 if on_gpu else None
    torch.manual_seed(args.seed)
    step = build(name, sprint.SiT.preset(preset).to(args.device).train(), dtype=dtype)
    x = torch.randn(batch, 4, 2 * grid[0], 2 * grid[1], device=args.device)
    y = torch.randint(0, 1000, (batch,), device=args.device)
    jobs = {path: (lambda drop=drop: step(x, y=y, drop=drop)) for path, drop in PATHS.items()}
    first, memory = {}, {}
    for path, job in jobs.items():
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        job()
        report.synchronize(args.device)
        first[path] = time.perf_counter() - start
        for _ in range(0 if args.quick else 5 if on_gpu else 1):  # the fourth is captured
            job()
        memory[path] = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
    taken = report.seconds(jobs, repeats=args.repeats, device=args.device, warmup=0)
    return [
        {"implementation": name, "path": path, "ms": 1000 * taken[path], "dense/this": taken["dense"] / taken[path],
         "GiB": memory[path], "first s": first[path]}
        for path in jobs
    ]  # fmt: skip


def main() -> None:
    parser = report.arguments(__doc__ or "")
    parser.add_argument("--preset", default="XL/2")
    parser.add_argument("--job", nargs="+", default=["16x16:32", "16x16:64", "32x32:16"], help="token grid:batch")
    parser.add_argument("--cold", action="store_true", help="compile without caches")
    parser.add_argument("--kernels", nargs="+", choices=["torch", "triton"], help="of the blocks; both where they run")
    args = parser.parse_args()
    if args.kernels is None:
        both = args.device.startswith("cuda") and importlib.util.find_spec("triton")
        args.kernels = ["torch", "triton"] if both else ["torch"]
    if args.quick:
        args.preset, args.job, args.repeats = "S/2", ["4x4:2"], 1
    if args.cold:
        for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
            os.environ[name] = tempfile.mkdtemp()
    peak = report.measured_peak(args.device, quick=args.quick)
    rows = []
    for job in args.job:
        text, _, batch = job.partition(":")
        grid = report.grid(text)
        cost = sprint.cost(args.preset, grid=grid, batch=int(batch))
        flops = {"sparse": cost.sparse.training, "dense": cost.full.training}
        predicted = {"sparse": cost.estimate()["sparse, captured"], "dense": cost.estimate()["full, captured"]}
        for name in (name for name, kernels in NAMES.items() if kernels in args.kernels):
            for row in measure(name, args.preset, grid, int(batch), args):
                rate = flops[row["path"]] / (row["ms"] / 1000)
                rows.append(
                    {"preset": args.preset, "job": job, **row, "FLOP ratio": cost.sparse_ratio,
                     "TFLOP": flops[row["path"]] / 1e12, "TFLOP/s": rate / 1e12, "of peak": rate / peak,
                     "predicted ms": 1000 * predicted[row["path"]]}
                )  # fmt: skip
            gc.collect()
            if args.device.startswith("cuda"):
                torch.cuda.empty_cache()
    print(f"peak of a matrix product: {peak / 1e12:.3g} TFLOP/s")
    report.publish("train_step", rows, out=args.out, env=report.environment(args.device))


if __name__ == "__main__":
    main()
