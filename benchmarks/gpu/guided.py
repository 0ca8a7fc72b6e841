"""Guided sampling steps, 50 images of XL/2 at 256 px: CFG, PDG, and PDG with a shared encoder, in turns."""

from functools import partial
from typing import Any

import torch

import sprint
from benchmarks import report
from benchmarks.gpu.table import Table
from benchmarks.gpu.train import toy
from benchmarks.report import Row
from benchmarks.sampling import GUIDANCE, guided_flops

KEYS = ("implementation", "guidance")
NAMES = ("CapturedModel, Triton blocks", "CapturedModel", "eager")


def run(table: Table, *, dry: bool) -> None:
    """A unit for each implementation, of bfloat16 weights."""
    for name in NAMES:
        keys = [{"implementation": name, "guidance": kind} for kind in GUIDANCE]
        table.unit(keys, partial(_rows, name, "cpu" if dry else "cuda"), needs=0 if dry else 30)


@torch.no_grad()
def _rows(name: str, device: str) -> list[Row]:
    on_gpu, dtype = device == "cuda", report.default_dtype(device)
    grid, batch = ((16, 16), 50) if on_gpu else ((4, 4), 2)
    torch.manual_seed(0)
    model = (sprint.SiT.preset("XL/2") if on_gpu else toy()).to(device, dtype).eval()
    model.set_kernels("triton" if on_gpu and "Triton" in name else "torch")
    cost = sprint.cost(model, grid=grid, batch=batch)
    callee: Any = model if name == "eager" else sprint.CapturedModel(model)
    x = torch.randn(batch, 4, 2 * grid[0], 2 * grid[1], device=device, dtype=dtype)
    y = torch.randint(0, 1000, (batch,), device=device)
    jobs = {kind: partial(guidance, callee, x, 0.5, y) for kind, guidance in GUIDANCE.items()}
    for job in jobs.values():
        for _ in range(6 if on_gpu else 1):
            job()
    times = report.windows(jobs, rounds=8 if on_gpu else 2, calls=8 if on_gpu else 1, device=device)
    flops, medians = guided_flops(cost), {kind: report.spread(each) for kind, each in times.items()}
    reserved = torch.cuda.memory_reserved() / 2**30 if on_gpu else None
    return [
        {"implementation": name, "guidance": kind, "batch": batch, **row, "CFG/this": medians["CFG"]["ms"] / row["ms"],
         "FLOP ratio": flops["CFG"] / flops[kind], "TFLOP/s": flops[kind] / row["ms"] / 1e9, "reserved GiB": reserved,
         "error": None}
        for kind, row in medians.items()
    ]  # fmt: skip
