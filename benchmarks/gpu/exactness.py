"""Kernels and captured graphs against float64, beside plain PyTorch in the same precision.

Kernels: relative error |x - x64| / |x64| of each output and gradient. Steps: of the losses, and of what training changed in
the weights, |w - w64| / |w64 - w0|. Samples: of the images.
"""

import copy
import sys
from functools import partial
from typing import Any

import torch

import sprint
from benchmarks.gpu.suite import ROOT
from benchmarks.gpu.table import Table
from benchmarks.report import Row

KEYS = ("what", "dtype", "tensor")
STEPS = 12
SPARSE = sprint.StructuredDrop(0.75)
GUIDANCE = sprint.PathDropGuidance(2.0)


def run(table: Table, *, dry: bool) -> None:
    """A unit for each kernel and dtype, one for the update, one for steps, one for samples."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    import kernel_cases  # pyright: ignore[reportMissingImports]

    device = "cpu" if dry else "cuda"
    for operation in kernel_cases.TWINS:
        for dtype in (torch.bfloat16, torch.float32):
            key = {"what": operation.__name__, "dtype": str(dtype), "tensor": "worst"}
            table.unit([key], partial(_kernel, kernel_cases, operation, key, device), needs=0 if dry else 10)
    key = {"what": "adamw", "dtype": "torch.float32", "tensor": "worst"}
    table.unit([key], partial(_update, key, device), needs=0 if dry else 10)
    for name in ("plain", "compiled", "captured", "captured, Triton"):
        key = {"what": f"{STEPS} steps, {name}", "dtype": "bfloat16 autocast", "tensor": "change of weights"}
        table.unit([key], partial(_steps, name, key, device), needs=0 if dry else 30)
    for name in ("plain", "captured", "captured, Triton"):
        key = {"what": f"samples, {name}", "dtype": "torch.bfloat16", "tensor": "images"}
        table.unit([key], partial(_samples, name, key, device), needs=0 if dry else 20)


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative, of the whole tensor."""
    return float((actual.detach().double().cpu() - exact.detach().cpu()).norm() / exact.detach().cpu().norm())


def _compared(key: Row, names: list[str], actual: Any, plain: Any, exact: Any) -> list[Row]:
    """A row for each tensor and one for the worst of them."""
    rows: list[Row] = [
        {**key, "tensor": name, "error": None, "relative error": error(one, true), "of plain torch": error(other, true)}
        for name, one, other, true in zip(names, actual, plain, exact, strict=True)
    ]
    worst = max(rows, key=lambda row: row["relative error"])
    return [{**worst, "tensor": "worst"}, *rows]


def _kernel(cases: Any, operation: Any, key: Row, device: str) -> list[Row]:
    dtype = getattr(torch, key["dtype"].removeprefix("torch."))
    batch, grid, heads = (8, (16, 16), 16) if device == "cuda" else (2, (4, 4), 2)
    if operation.__name__ == "norm_and_rotate":
        inputs = cases.rotation(batch, grid, heads, 72, dtype=dtype, device=device, per_sample=True, weight=torch.float32)
    else:
        gated = operation.__name__ == "gate_and_modulate"
        inputs = cases.modulation(batch, grid[0] * grid[1], 72 * heads, dtype=dtype, device=device, gated=gated)
    twin = cases.TWINS[operation]
    actual, plain = cases.run(operation if device == "cuda" else twin, inputs), cases.run(twin, inputs)
    exact = cases.run(twin, [x.double() for x in inputs], rounded=dtype)
    return _compared(key, [f"{i}: {tuple(x.shape)}" for i, x in enumerate(exact)], actual, plain, exact)


def _update(key: Row, device: str) -> list[Row]:
    from sprint.training.optim import fastest, update

    def results(function: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        p, m, g, v = (torch.randn(100_001, generator=generator).to(device, dtype) for _ in range(4))
        v = v.abs()
        scalars = torch.tensor([0.01, 0.3, 0.5, 0.7], device=device).to(dtype)
        function(p, g, m, v, shadow=None, average=None, scalars=scalars, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1,
                 average_decay=0.0)  # fmt: skip
        return [p, m, v]

    ours = fastest() if device == "cuda" else update
    actual, plain, exact = results(ours, torch.float32), results(update, torch.float32), results(update, torch.float64)
    return _compared(key, ["parameter", "first moment", "second moment"], actual, plain, exact)


def _model(device: str) -> sprint.SiT:
    """Without zeros at its gates and its output; in `eval()`, where no labels are dropped at random."""
    shape: dict[str, Any] = (
        {"dim": 384, "heads": 6, "middle_depth": 4} if device == "cuda" else {"dim": 64, "heads": 1, "middle_depth": 2}
    )
    torch.manual_seed(0)
    model = sprint.SiT(sprint.SiTConfig(encoder_depth=1, decoder_depth=1, num_classes=10, **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model.to(device).eval()


def _kernels(model: sprint.SiT, name: str) -> sprint.SiT:
    return model.set_kernels("triton" if "Triton" in name and next(model.parameters()).is_cuda else "torch")


def _steps(name: str, key: Row, device: str) -> list[Row]:
    start = _model(device)
    before = torch.cat([p.detach().double().flatten() for p in start.parameters()])

    def train(model: sprint.SiT, dtype: torch.dtype, **options: Any) -> tuple[torch.Tensor, torch.Tensor, bool]:
        side, generator = (32 if device == "cuda" else 8), torch.Generator().manual_seed(1)
        x, noise = (torch.randn(8, 4, side, side, generator=generator).to(device, dtype) for _ in range(2))
        t, y = torch.linspace(0.1, 0.9, 8, device=device), torch.arange(8, device=device)
        step = sprint.TrainStep(model, sprint.FlowMatchingLoss(), clip=1.0, **options)
        torch.manual_seed(2)  # of the dropped tokens, the only draw
        outs = [step(x, y=y, t=t, noise=noise, drop=SPARSE) for _ in range(STEPS)]
        weights = torch.cat([p.detach().double().flatten() for p in model.parameters()])
        return torch.stack([out.loss.detach().double() for out in outs]), weights - before, outs[-1].captured

    exact = copy.deepcopy(start).double()
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(exact.parameters(), lr=1e-3, fused=True)
    losses, change, _ = train(exact, torch.float64, optimizer=optimizer, compile=False, capture=False)
    model, compiled = _kernels(start, name), name != "plain" and device == "cuda"
    optimizer = (torch.optim.AdamW if name == "plain" else sprint.AdamW)(model.parameters(), lr=1e-3)
    capture = None if "captured" in name else False
    actual, changed, captured = train(
        model, torch.float32, optimizer=optimizer, compile=compiled, capture=capture, autocast=torch.bfloat16
    )
    rows = [("change of weights", changed, change), ("losses", actual, losses)]
    return [
        {**key, "tensor": tensor, "error": None, "relative error": error(one, true), "captured": captured}
        for tensor, one, true in rows
    ]


def _samples(name: str, key: Row, device: str) -> list[Row]:
    model, side = _model(device), 32 if device == "cuda" else 8
    noise = torch.randn(4, 4, side, side, generator=torch.Generator().manual_seed(1)).to(device)
    y = torch.arange(4, device=device)
    exact = sprint.sample(copy.deepcopy(model).double(), noise.double(), y=y, guidance=GUIDANCE, steps=8)
    model = _kernels(model.to(torch.bfloat16), name)
    fast: Any = model if name == "plain" else sprint.CapturedModel(model)
    actual = sprint.sample(fast, noise.to(torch.bfloat16), y=y, guidance=GUIDANCE, steps=8)
    return [{**key, "error": None, "relative error": error(actual, exact), "captured": name != "plain" and device == "cuda"}]
