"""Where a training step's time goes, by kind of kernel (on a CPU: of operation), captured and eager, sparse and dense."""

import re
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import report, train_step
from benchmarks.gpu.table import Table
from benchmarks.gpu.train import EAGER, OURS, PLAIN_OURS, build, model_of
from benchmarks.report import Row

KEYS = ("implementation", "path", "kind")
KINDS = (  # the first whose pattern is found in a name; Inductor's names list all that it fused, so that they come first
    ("reductions", r"^triton_(red|per)"),
    ("element-wise", r"^triton_"),
    ("our kernels in blocks", r"^_(forward|backward)$"),
    ("attention", r"flash|fmha|attention|sdpa"),
    ("update of the weights", r"adam|multi_tensor|foreach|lpnorm"),
    ("copies, fills", r"memcpy|memset|copy|fill|zero_"),
    ("matrix products", r"gemm|nvjet|cutlass|xmma|cublas|splitk|aten::(addmm|mm|bmm|matmul|linear)"),
    ("reductions", r"reduce|softmax|aten::(sum|mean|norm)|layer_?norm"),
    ("element-wise", r"elementwise|pointwise|vectorized|aten::(mul|add|sub|div|gelu|silu|cat|neg|pow|sqrt|rsqrt)"),
    ("other", ""),
)
SPANS = r"Optimizer\.|ProfilerStep|Torch-Compiled|## |CompiledFunction"  # of several kernels, which count themselves
TOTAL = "all"
STEPS = 3


def run(table: Table, *, dry: bool) -> None:
    """A unit for each implementation: XL/2, 256 px, batch 64."""
    for name in (OURS, PLAIN_OURS, EAGER):
        keys = [{"implementation": name, "path": path, "kind": TOTAL} for path in train_step.PATHS]
        table.unit(keys, partial(_rows, name, "cpu" if dry else "cuda"), needs=0 if dry else 45)


def kind_of(name: str) -> str:
    """Of a kernel or an operation, by its name."""
    return next(kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE))


def _rows(name: str, device: str) -> list[Row]:
    on_gpu = device == "cuda"
    grid, batch = ((16, 16), 64) if on_gpu else ((4, 4), 2)
    torch.manual_seed(0)
    step = build(name, model_of("XL/2" if on_gpu else "toy", device).train())
    x = torch.randn(batch, 4, 2 * grid[0], 2 * grid[1], device=device)
    y = torch.randint(0, 1000, (batch,), device=device)
    rows = []
    for path, drop in train_step.PATHS.items():
        for _ in range(6 if on_gpu else 1):
            step(x, y=y, drop=drop)
        report.synchronize(device)
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
            for _ in range(STEPS):
                step(x, y=y, drop=drop)
            report.synchronize(device)
        rows += [{"implementation": name, "path": path, **row, "error": None} for row in _kinds(profiled, on_gpu=on_gpu)]
    return rows


def _kinds(profiled: Any, *, on_gpu: bool) -> list[Row]:
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for event in profiled.key_averages():
        if re.match(SPANS, event.key) or (on_gpu and not str(event.device_type).endswith("CUDA")):
            continue
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        found.setdefault(kind_of(event.key), {})[event.key] = (microseconds / 1000 / STEPS, event.count / STEPS)
    rows: list[Row] = []
    for kind, names in found.items():
        longest = sorted(names, key=lambda name: -names[name][0])[:3]
        ms, launches = (sum(each[i] for each in names.values()) for i in range(2))
        texts = [f"{names[name][0]:.3g} ms {name[:80]}" for name in longest]
        rows.append({"kind": kind, "ms": ms, "launches": launches, "longest": "; ".join(texts)})
    whole = {"kind": TOTAL, "ms": sum(row["ms"] for row in rows), "launches": sum(row["launches"] for row in rows)}
    return [whole, *sorted(rows, key=lambda row: -row["ms"])]
