"""`Hardware`: the rates that turn counted work into seconds, from data sheets or measured on this machine.

    seconds of a step = FLOPs / rate + bytes / bandwidth + operations * launch + parameters * update

On a CPU these add up. A GPU computes while the next operation is launched, so that the longer of work and launches counts,
and a CUDA graph leaves the work alone.
"""

import itertools
import math
import operator
import os
import re
import time
from dataclasses import dataclass, replace

import torch

from sprint.arguments import checked
from sprint.costs.counting import PathCost, count
from sprint.models.config import SiTConfig
from sprint.models.sit import SiT

HERE = "this machine"
FITTED = "fitted to measured steps"
SCALED = "scaled from the H100 by data sheets, not measured"
MEASURED = "measured here"
UNRELIABLE = "measured here while other work took the machine: unreliable, measure again"


@checked
@dataclass(frozen=True)
class Hardware:
    """Rates of a device in whole training steps, which are below those of its data sheet.

    Args:
        name: for tables.
        flops: floating-point operations per second that the products of a training step reach.
        update: seconds per parameter of what a step does whatever its batch: clip, AdamW, casts of weights and gradients.
        launch: seconds that eager PyTorch takes to launch one operation.
        bandwidth: bytes per second of the operations that are no products; infinite where `flops` includes them.
        memory: bytes; None if unknown.
        captures: whether work and launches overlap and CUDA graphs leave launches out; False on a CPU, where they add up.
        source: where the rates come from.

    Raises:
        ValueError: a rate or memory that is not positive, or a time that is negative.

    Examples:
        >>> gpu = Hardware("mine", flops=100e12, update=40e-12, launch=8e-6, memory=48 * 2**30)
        >>> work = PathCost(forward=1e12, backward=2e12, activations=0, operations=5000)
        >>> [gpu.seconds(work, 100_000_000, captured=captured) for captured in (True, False)]
        [0.034, 0.044]
    """

    name: str
    flops: float
    update: float
    launch: float
    bandwidth: float = math.inf
    memory: int | None = None
    captures: bool = True
    source: str = "given"

    def __post_init__(self) -> None:
        if not (self.flops > 0 and self.bandwidth > 0 and self.update >= 0 and self.launch >= 0):
            raise ValueError(
                "flops and bandwidth must be positive (per second), update and launch at least 0 (seconds), got "
                f"flops={self.flops!r}, bandwidth={self.bandwidth!r}, update={self.update!r}, launch={self.launch!r}"
            )
        if self.memory is not None and not (isinstance(self.memory, int) and self.memory > 0):
            raise ValueError(f"memory must be bytes, such as 80 * 2**30, or None, got {self.memory!r}")

    def seconds(self, work: PathCost, parameters: int, *, captured: bool = False) -> float:
        """Seconds of a training step.

        Args:
            work: what forward and backward ask for.
            parameters: how many are trained.
            captured: in a CUDA graph.
        """
        computing = work.training / self.flops + work.traffic / self.bandwidth
        launching, update = work.operations * self.launch, parameters * self.update
        if not self.captures:
            return computing + launching + update
        return (computing if captured else max(computing, launching)) + update

    @classmethod
    def measure(
        cls, device: torch.device | str | None = None, dtype: torch.dtype | None = None, *, seconds: float = 2.0
    ) -> "Hardware":
        """Measure this machine on training steps of a few small models; takes three to five seconds.

        A GPU is measured in eager PyTorch: compiled blocks move less memory, so that a captured step can be faster than its
        estimate. On a busy machine the rates are those that the other work leaves; where it leaves none that fit, `source`
        says so. With one CPU thread the process's own time counts instead, which other work hardly changes. Random streams
        are left as they were.

        Args:
            device: a CPU or CUDA device; by default the current CUDA device, or else the CPU.
            dtype: of the products; by default bfloat16 autocast on a GPU and float32 on a CPU.
            seconds: for how long steps are repeated; each is run at least twice.

        Returns:
            Rates for `cost(..., hardware=...)`, good for as long as nothing else, such as `torch.set_num_threads`, changes.

        Raises:
            ValueError: another kind of device or one that is not there, or negative seconds.

        Examples:
            >>> here = Hardware.measure("cpu", seconds=0.1)
            >>> here.source, here.captures
            ('measured here', False)
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        kind = getattr(device, "type", str(device).partition(":")[0])
        if kind != "cpu" and not (kind == "cuda" and torch.cuda.is_available()):
            raise ValueError(
                f"can measure a CPU or a CUDA device that is there, got {device}: give Hardware(...) its rates instead"
            )
        if not seconds >= 0:
            raise ValueError(f"seconds must be at least 0, got {seconds!r}")
        device = torch.device(device)
        cuda = [torch.cuda.current_device() if device.index is None else device.index] if device.type == "cuda" else []
        with torch.random.fork_rng(cuda), torch.inference_mode(False), torch.enable_grad():
            return _measure_gpu(device, dtype or torch.bfloat16, seconds) if cuda else _measure_cpu(dtype, seconds)


H100 = Hardware("H100", flops=380e12, update=24e-12, launch=8e-6, memory=80 * 2**30, source=FITTED)
"""Rates that fit the bf16 training steps of XL/2 which the project's owner measured with a prototype of this library,
captured in a CUDA graph, to 6 % (256 px at batch 32 and 64 and 512 px at batch 16: sparse 39.9, 61.5 and 63.7 ms,
dense 75.7, 135.2 and 152 ms). The time to launch an operation is an assumption. Not yet measured with this library."""


_MEASURED: dict[tuple[int | None, int], Hardware] = {}  # by CUDA device and number of threads


def _scaled(name: str, *, peak: float, bandwidth: float, memory: int) -> Hardware:
    """Another card, by the ratios of the data sheets: dense bf16 TFLOP/s, and TB/s for the update."""
    flops, update = H100.flops * peak / 989, H100.update * 3.35 / bandwidth
    return replace(H100, name=name, flops=flops, update=update, memory=memory * 2**30, source=SCALED)


KNOWN = {
    hardware.name: hardware
    for hardware in (
        H100,
        _scaled("H200", peak=989, bandwidth=4.8, memory=141),
        _scaled("A100", peak=312, bandwidth=2.04, memory=80),
        _scaled("RTX 4090", peak=165, bandwidth=1.01, memory=24),
    )
}


def find(name: str) -> Hardware:
    """The device of a name; "this machine" is measured, once per process and number of threads.

    Raises:
        ValueError: there is none of this name.
    """
    wanted = name.strip().casefold()
    if wanted == HERE:
        key = (torch.cuda.current_device() if torch.cuda.is_available() else None, torch.get_num_threads())
        if key not in _MEASURED or _MEASURED[key].source == UNRELIABLE:
            _MEASURED[key] = Hardware.measure("cpu" if key[0] is None else f"cuda:{key[0]}")
        return _MEASURED[key]
    for known, hardware in KNOWN.items():
        if known.casefold() == wanted:
            return hardware
    names = ", ".join(map(repr, (*KNOWN, HERE)))
    raise ValueError(f"unknown hardware {name!r}: choose one of {names}, or give sprint.Hardware(...) its rates")


def present() -> Hardware | str:
    """What this process runs on: a card of a known name with its own memory, or else "this machine", to be measured."""
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(torch.cuda.current_device())
        for name, hardware in KNOWN.items():
            # Cards of the same name on a slower board or in a share of one are others.
            if re.search(rf"\b{name}\b", card.name) and not re.search(r"\b(Laptop|MIG|PCIe|NVL)\b", card.name, re.I):
                return replace(hardware, memory=card.total_memory)
    return HERE


class _Steps:
    """Training steps of a small SiT, and what they ask for."""

    def __init__(self, dim: int, depth: int, side: int, batch: int, *, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        config = SiTConfig(
            dim=dim, heads=max(1, dim // 64), encoder_depth=1, middle_depth=depth - 2, decoder_depth=1, num_classes=10
        )
        sizes = (batch, config.in_channels, 2 * side, 2 * side)
        with torch.device("meta"):
            model, inputs = SiT(config), (torch.empty(sizes), torch.empty(batch), torch.zeros(batch, dtype=torch.int64))
            self.work = count(model, lambda: model(*inputs))
        self.parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        with device:
            self.model = SiT(config)
            self.inputs = torch.randn(sizes), torch.rand(batch), torch.zeros(batch, dtype=torch.int64)
            with torch.no_grad():  # a fresh model's gradients are zero, with which AdamW takes twice as long on a CPU
                for parameter in self.model.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.02)
        fused = True if device.type == "cuda" else None
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=fused)

    def differentiate(self) -> None:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = (self.model(*self.inputs).float() - self.inputs[0]).square().mean()
        loss.backward()

    def update(self) -> None:
        if self.device.type == "cuda":
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def step(self) -> None:
        self.differentiate()
        self.update()
        self.optimizer.zero_grad()


def _fastest(jobs: list, *, seconds: float, device: torch.device) -> list[float]:
    """Least time of each job, taken in turns for some seconds after a first run; others on the machine only add to it."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter

    def timed(job) -> float:
        start = clock()
        job()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - start

    end = time.perf_counter() + seconds
    for job in jobs:
        timed(job)
    times = [[timed(job) for job in jobs]]
    while time.perf_counter() < end:
        times.append([timed(job) for job in jobs])
    return [min(column) for column in zip(*times, strict=True)]


def _measure_cpu(dtype: torch.dtype | None, seconds: float) -> Hardware:
    # Each setting is ruled by another term: launches, the update, memory traffic, products.
    device, shapes = torch.device("cpu"), ((64, 4, 2, 1), (384, 3, 4, 1), (128, 3, 16, 2), (384, 3, 8, 6))
    settings = [_Steps(*shape, device=device, dtype=dtype or torch.float32) for shape in shapes]
    times = _fastest([setting.step for setting in settings], seconds=seconds, device=device)
    rows = [[s.work.training, s.work.traffic, s.work.operations, s.parameters] for s in settings]
    product, byte, launch, update = terms = nonnegative_fit(rows, times)
    fitted = [sum(map(operator.mul, terms, row)) for row in rows]
    fits = product > 0 and all(0.75 < fit / time < 1.33 for fit, time in zip(fitted, times, strict=True))
    threads = torch.get_num_threads()
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        memory = None
    return Hardware(
        f"this CPU ({threads} thread{'s'[: threads > 1]})", flops=1 / product if product else math.inf, update=update,
        launch=launch, bandwidth=1 / byte if byte else math.inf, memory=memory, captures=False,
        source=MEASURED if fits else UNRELIABLE,
    )  # fmt: skip


def _measure_gpu(device: torch.device, dtype: torch.dtype, seconds: float) -> Hardware:
    small, large = (_Steps(*shape, device=device, dtype=dtype) for shape in ((64, 4, 2, 1), (1152, 4, 16, 32)))
    large.differentiate()  # the update needs gradients, which then stay
    jobs = [small.differentiate, large.update, large.differentiate]
    launching, update, computing = _fastest(jobs, seconds=seconds, device=device)
    card = torch.cuda.get_device_properties(device)
    return Hardware(
        card.name, flops=large.work.training / computing, update=update / large.parameters,
        launch=launching / small.work.operations, memory=card.total_memory, source=MEASURED,
    )  # fmt: skip


def nonnegative_fit(rows: list[list[float]], times: list[float]) -> list[float]:
    """Times per unit of each column, none negative, with the least relative error of the rows.

    Of every choice of columns whose plain least-squares solution is not negative, the best: exact, for few columns.
    """
    table = torch.tensor(rows, dtype=torch.float64) / torch.tensor(times, dtype=torch.float64)[:, None]
    scale = table.amax(0).clamp(min=torch.finfo(table.dtype).tiny)
    best, error = [0.0] * len(scale), math.inf
    for size in range(1, len(scale) + 1):
        for chosen in map(list, itertools.combinations(range(len(scale)), size)):
            matrix = (table / scale)[:, chosen]
            solution = torch.linalg.lstsq(matrix, torch.ones(len(table), 1, dtype=table.dtype)).solution
            missed = float((matrix @ solution - 1).square().sum())
            if bool((solution >= 0).all()) and missed < error:
                best, error = [0.0] * len(scale), missed
                for column, value in zip(chosen, solution[:, 0], strict=True):
                    best[column] = float(value / scale[column])
    return best
