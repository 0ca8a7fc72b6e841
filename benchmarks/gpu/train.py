"""Training steps of XL/2: ours, ours without kernels, plain eager PyTorch, and torch's own best, `torch.compile`.

What fits into memory together takes turns, sparse and dense too; a large matrix product takes its turns with them, by which
one sees whether the card slowed down. `torch.compile` of the whole model takes minutes for each path: it comes last, in
turns with ours.
"""

import gc
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import sprint
from benchmarks import report, train_step
from benchmarks.gpu.table import Table, told
from benchmarks.report import Row

OURS = "TrainStep, sprint.AdamW, Triton blocks"
PLAIN_OURS = "TrainStep, sprint.AdamW"
EAGER = "eager"
COMPILED = 'torch.compile(mode="reduce-overhead"), fused AdamW'
BESIDE = f"{OURS}, beside torch.compile"
FIRST = (OURS, PLAIN_OURS, EAGER)
KEYS = ("job", "implementation", "path")
JOBS = (((16, 16), 32), ((16, 16), 64), ((32, 32), 16))
GIB = 2**30


def toy() -> sprint.SiT:
    """For a dry run."""
    return sprint.SiT(sprint.SiTConfig(dim=64, heads=1, encoder_depth=1, middle_depth=2, decoder_depth=1))


def model_of(preset: str, device: str) -> sprint.SiT:
    """By the name in a row, made on the device."""
    with torch.device(device):
        return toy() if preset == "toy" else sprint.SiT.preset(preset)


@dataclass(frozen=True)
class Job:
    """What is trained."""

    preset: str
    grid: tuple[int, int]
    batch: int
    device: str

    @property
    def name(self) -> str:
        return f"{self.grid[0]}x{self.grid[1]}:{self.batch}"


def run(table: Table, *, dry: bool) -> None:
    """A unit for each job, then one for each job and path with `torch.compile`."""
    jobs = [Job("toy", (4, 4), 2, "cpu")] if dry else [Job("XL/2", grid, batch, "cuda") for grid, batch in JOBS]
    paths = tuple(train_step.PATHS)
    units = [(job, FIRST, paths, 90) for job in jobs]
    units += [(job, (COMPILED, BESIDE), (path,), 200) for job in jobs for path in paths]
    for job, names, some, needs in units:
        keys = [{"job": job.name, "implementation": name, "path": path} for name in names for path in some]
        table.unit(keys, partial(_rows, table, job, names, some), needs=0 if dry else needs)


def build(name: str, model: sprint.SiT) -> Callable:
    """The step of an implementation."""
    device = next(model.parameters()).device.type
    dtype = torch.bfloat16 if device == "cuda" else None
    if name != COMPILED:
        name = OURS if name == BESIDE else name
        return train_step.build(PLAIN_OURS if name == OURS and device == "cpu" else name, model, dtype=dtype)
    how = {"mode": "reduce-overhead"} if device == "cuda" else {"backend": "eager"}
    model.compile(fullgraph=True, dynamic=False, **how)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    step = train_step.eager(model, sprint.FlowMatchingLoss(), optimizer, dtype, device)

    def marked(*args: Any, **kwargs: Any) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        step(*args, **kwargs)

    return marked


class _Member:
    """An implementation in memory, after its first steps; what is reserved for a path includes what those before it keep."""

    def __init__(self, name: str, job: Job, paths: tuple[str, ...]) -> None:
        device, on_gpu = job.device, job.device == "cuda"
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
        before = _memory(on_gpu)
        torch.manual_seed(0)
        step = build(name, model_of(job.preset, device).train())
        x = torch.randn(job.batch, 4, 2 * job.grid[0], 2 * job.grid[1], device=device)
        y = torch.randint(0, 1000, (job.batch,), device=device)
        self.jobs = {path: partial(step, x, y=y, drop=train_step.PATHS[path]) for path in paths}
        self.facts: dict[str, Row] = {}
        for path, once in self.jobs.items():
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            once()
            report.synchronize(device)
            first = time.perf_counter() - start
            for _ in range(5 if on_gpu else 1):  # the fourth is captured
                once()
            report.synchronize(device)
            peak, reserved = _peaks(on_gpu)
            self.facts[path] = {
                "first s": first, "allocated GiB": (peak - before[0]) / GIB if on_gpu else None,
                "reserved GiB": (reserved - before[1]) / GIB if on_gpu else None,
            }  # fmt: skip
        self.need, self.passing = _memory(on_gpu)[1] - before[1], 0
        if on_gpu:
            torch.cuda.empty_cache()
            self.passing = self.need - (_memory(on_gpu)[1] - before[1])  # what eager code gives back


def _memory(on_gpu: bool) -> tuple[int, int]:
    return (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) if on_gpu else (0, 0)


def _peaks(on_gpu: bool) -> tuple[int, int]:
    return (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if on_gpu else (0, 0)


def _rows(table: Table, job: Job, names: tuple[str, ...], paths: tuple[str, ...]) -> list[Row]:
    rows: list[Row] = []
    members: dict[str, _Member] = {}
    for name in names:
        if members and not _fits(list(members.values()), job.device):
            rows += _timed(members, job)
        problem = _enter(members, name, job, paths)
        if problem and members:  # once more, alone
            rows += _timed(members, job)
            problem = _enter(members, name, job, paths)
        if problem:
            rows += [{"job": job.name, "implementation": name, "path": path, "error": problem} for path in paths]
        if rows:
            table.put(rows)
    return rows + (_timed(members, job) if members else [])


def _enter(members: dict[str, _Member], name: str, job: Job, paths: tuple[str, ...]) -> str:
    """Returns what went wrong."""
    try:
        members[name] = _Member(name, job, paths)
    except Exception as error:
        if "CUDA error" in str(error):
            raise
        traceback.print_exc()
        return told(error)
    return ""


def _fits(members: list[_Member], device: str) -> bool:
    """Another one beside those in memory: as large as the largest, and what those take anew in their turns."""
    if device == "cpu":
        return True
    free, _ = torch.cuda.mem_get_info()
    return free > 1.2 * max(member.need for member in members) + max(member.passing for member in members)


def _timed(members: dict[str, _Member], job: Job) -> list[Row]:
    """Rows of those in memory, in turns, which then leave it."""
    device, on_gpu = job.device, job.device == "cuda"
    dtype, size = report.default_dtype(device), 8192 if on_gpu else 64
    product = partial(torch.matmul, *(torch.randn(size, size, device=device, dtype=dtype) for _ in range(2)))
    steps = {f"{name}, {path}": each.jobs[path] for name, each in members.items() for path in each.jobs}
    rounds, calls = (6, 5) if on_gpu else (2, 1)
    times = report.windows(steps | {"product": product}, rounds=rounds, calls=calls, device=device)
    peak = 2 * size**3 / (report.spread(times["product"])["ms"] / 1000)
    cost = sprint.cost(model_of(job.preset, "meta"), grid=job.grid, batch=job.batch)
    rows = []
    for name, each in members.items():
        for path, facts in each.facts.items():
            work = (cost.full if path == "dense" else cost.sparse).training
            spread = report.spread(times[f"{name}, {path}"])
            rows.append(
                {"preset": job.preset, "job": job.name, "implementation": name, "path": path, **spread, **facts,
                 "TFLOP": work / 1e12, "of product": work / spread["ms"] * 1000 / peak, "product TFLOP/s": peak / 1e12,
                 "in turns with": "; ".join(other for other in members if other != name), "error": None}
            )  # fmt: skip
    members.clear()
    steps.clear()
    del product
    gc.collect()
    if on_gpu:
        torch.compiler.reset()  # a compiled step keeps its graphs alive
        torch.cuda.empty_cache()
    return rows
