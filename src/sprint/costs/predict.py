"""`cost`: what a model costs on each path, before a GPU is rented.

The model runs on tensors without data (torch's meta or fake tensors), forward and backward, while its operations are
counted, and the bytes that autograd keeps. Nothing is computed, and a preset needs no memory.

FLOPs are not seconds. `Cost.estimate` sets them against the rates of a `Hardware`, and `Cost.notes` says plainly where
dropping tokens will not pay.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from sprint.arguments import checked
from sprint.costs.counting import PathCost
from sprint.costs.hardware import H100, HERE, Hardware, find, present
from sprint.costs.paths import of_sit, of_wrapped
from sprint.flow.holders import unwrapped
from sprint.middle.drop import Drop, StructuredDrop
from sprint.models.sit import SiT

PAYS = 1.2  # an estimated gain below this is not worth a method


@checked
@dataclass(frozen=True)
class Cost:
    """What `cost` found; prints as a table."""

    model: str
    parameters: int
    batch: int
    """Of one process."""
    full: PathCost
    sparse: PathCost
    shallow: PathCost
    shared: float | None = None
    """FLOPs of one step of PDG whose two predictions share the encoder (`weak="same"`); None where that is not possible."""
    trained: int = 0
    """Parameters that require gradients."""
    weights: int = 0
    """Bytes of the parameters."""
    states: int = 0
    """Bytes of gradients and of AdamW's two moments, for the parameters that are trained."""
    processes: int = 1
    chosen: Hardware | str = field(default=H100, repr=False)

    @property
    def hardware(self) -> Hardware:
        """Of the estimates; "this machine" is measured when it is first asked for."""
        return find(self.chosen) if isinstance(self.chosen, str) else self.chosen

    @property
    def sparse_ratio(self) -> float:
        """FLOPs of a training step on all tokens over those of a sparse one: the limit of the gain."""
        return self.full.training / self.sparse.training

    @property
    def guidance_ratio(self) -> float:
        """FLOPs of a step of CFG over those of one of PDG."""
        return 2 * self.full.forward / (self.full.forward + self.shallow.forward)

    @property
    def shared_ratio(self) -> float | None:
        """FLOPs of a step of CFG over those of one of PDG with a shared encoder."""
        return None if self.shared is None else 2 * self.full.forward / self.shared

    def memory(self, name: str) -> int:
        """Bytes that a training step on a path keeps in eager PyTorch: weights, gradients, AdamW's moments, activations.

        Args:
            name: "full", "sparse" or "shallow".

        Raises:
            ValueError: another name.
        """
        if name not in ("full", "sparse", "shallow"):
            raise ValueError(f'unknown path {name!r}: choose "full", "sparse" or "shallow"')
        return self.weights + self.states + getattr(self, name).activations

    def estimate(self, hardware: Hardware | str | None = None) -> dict[str, float]:
        """Seconds of a training step (forward, backward, AdamW) of one process, by "path, launching".

        "captured" has no launches to wait for (a CUDA graph), "eager" takes at least the launches of all its operations. A
        CPU has no graphs: its keys are "full, eager" and "sparse, eager". Take it for an order of magnitude and for ratios,
        except on hardware that was measured.

        Args:
            hardware: another device than the one that `cost` was asked about.
        """
        chosen = self.hardware if hardware is None else _choose(hardware)
        h = find(chosen) if isinstance(chosen, str) else chosen
        kinds = ("captured", "eager") if h.captures else ("eager",)
        paths = {"full": self.full, "sparse": self.sparse}
        return {
            f"{name}, {kind}": h.seconds(work, self.trained, captured=kind == "captured")
            for name, work in paths.items()
            for kind in kinds
        }

    @property
    def notes(self) -> list[str]:
        """Where dropping tokens will not pay, and what does not fit or is not counted, in words."""
        return [*self._gains(), *self._limits()]

    def _gains(self) -> Iterator[str]:
        seconds, h, alone = self.estimate(), self.hardware, self.processes == 1
        gain = {kind: seconds[f"full, {kind}"] / (seconds[f"sparse, {kind}"] or math.inf) for kind in self._kinds}
        if not self.trained:
            yield "no parameter is trained: what is called a training step is a forward pass, with what backward there is"
        if self.sparse_ratio < PAYS:
            yield f"a sparse step has only {self.sparse_ratio:.2f}x fewer FLOPs: more middle blocks or a higher drop ratio"
        terms = {
            "the products": self.sparse.training / h.flops,
            "moving memory": self.sparse.traffic / h.bandwidth,
            f"launching {self.sparse.operations} operations": self.sparse.operations * h.launch,
            f"the update of {self.trained / 1e6:.0f} M parameters": self.trained * h.update,
        }
        times = ", ".join(f"{name} {_time(term)}" for name, term in terms.items() if term)
        largest = max(terms, key=lambda name: terms[name])
        if gain["eager"] < PAYS and largest.startswith("launching"):
            yield (
                f"in eager PyTorch on {h.name} dropping tokens will not pay ({gain['eager']:.2f}x): at batch {self.batch} a "
                f"sparse step waits for launches ({times}): "
                f"{'capture the step (sprint.TrainStep), or ' if h.captures and alone else ''}use a larger batch"
            )
        elif gain["eager"] < PAYS <= self.sparse_ratio and "captured" not in gain:
            larger = largest.startswith("the update")
            yield (
                f"on {h.name} dropping tokens will hardly pay ({gain['eager']:.2f}x): of a sparse step {largest} takes most "
                f"({times}): {'use a larger batch' if larger else 'more middle blocks or a higher drop ratio'}"
            )
        if gain.get("captured", PAYS) < PAYS <= self.sparse_ratio:
            yield (
                f"even captured it will hardly pay ({gain['captured']:.2f}x): the update of {self.trained / 1e6:.0f} M "
                "parameters takes longer than the products of so few tokens: use a larger batch"
            )

    @property
    def _kinds(self) -> tuple[str, ...]:
        """How a step is launched here; over several processes it is not captured."""
        return ("captured", "eager") if self.hardware.captures and self.processes == 1 else ("eager",)

    def _limits(self) -> Iterator[str]:
        h = self.hardware
        large = [name for name in ("full", "sparse") if h.memory is not None and self.memory(name) > h.memory]
        if h.memory is not None and large:
            way = "a smaller batch, activation checkpointing, or FSDP2"
            if (fixed := self.weights + self.states) > h.memory:
                way = f"weights and states alone take {_bytes(fixed)}: FSDP2 over several, or a larger device"
            yield f"{' and '.join(large)} steps do not fit into the {_bytes(h.memory)} of {h.name}: {way}"
        if self.processes > 1:
            yield (
                f"{self.processes} processes: batch, seconds and memory are those of one, with all weights and states, as "
                "under DDP; exchanging gradients is not counted, and such steps are not captured"
            )

    def __str__(self) -> str:
        h, seconds = self.hardware, self.estimate()
        kinds = self._kinds
        rows = [["", "forward", "fwd + bwd", "operations", "activations", "memory"]]
        rows[0] += [f"step, {kind}" if len(kinds) > 1 else "step" for kind in kinds]
        for name in ("full", "sparse", "shallow"):
            p: PathCost = getattr(self, name)
            times = [_time(seconds[f"{name}, {kind}"]) if name != "shallow" else "-" for kind in kinds]
            numbers = [_flops(p.forward), _flops(p.training), str(p.operations), _bytes(p.activations)]
            rows.append([name, *numbers, _bytes(self.memory(name)), *times])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"{self.model}: {self.parameters / 1e6:.1f} M parameters, batch {self.batch}; {h.name}, rates {h.source}"]
        for first, *rest in rows:
            cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
            lines.append("  " + "   ".join(cells).rstrip())
        shared = "" if self.shared_ratio is None else f", {_two(self.shared_ratio)}x with a shared encoder"
        of = "" if h.memory is None else f", of {_bytes(h.memory)}"
        lines += [
            f"  memory: weights {_bytes(self.weights)}, gradients and AdamW {_bytes(self.states)}, and activations{of}",
            f"  FLOPs: sparse {_two(self.sparse_ratio)}x fewer, PDG {_two(self.guidance_ratio)}x fewer than CFG{shared}",
        ]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


@checked
def cost(
    model: nn.Module | str,
    *args: Any,
    grid: tuple[int, int] | None = None,
    drop: Drop | None = None,
    batch: int = 1,
    dtype: torch.dtype | None = None,
    hardware: Hardware | str | None = None,
    processes: int | None = None,
    **kwargs: Any,
) -> Cost:
    """Count what a model costs on each path.

    Args:
        model: a preset's name ("S/2", "B/2", "L/2", "XL/2"), a `SiT`, or a wrapped model; frozen parameters and activation
            checkpointing count.
        *args: for a wrapped model, arguments of its forward.
        grid: for a SiT, the token grid: (16, 16) for 256 px, (32, 32) for 512 px.
        drop: drop sampler of the sparse path; by default `StructuredDrop(0.75)`, or the wrapped model's own.
        batch: for a SiT, of one process.
        dtype: for a SiT, of its activations (their bytes); by default the model's own, or for
            float32 on a GPU bfloat16 (autocast).
        hardware: of the estimates: "H100", "H200", "A100", "RTX 4090", a `Hardware`, or "this machine", which is measured
            when the first seconds are asked for (in three to five, once per process; see `Hardware.measure`). By default
            an H100 for a preset's name or a model on the meta device, and for a real model the machine it is on: the
            rates of a card that is known by name, or else "this machine".
        processes: how many train, for the notes; by default those of `torch.distributed`.
        **kwargs: for a wrapped model, arguments of its forward.

    Raises:
        ValueError: no grid for a SiT, no arguments or no drop sampler for a wrapped model or a SiT's options, a model that
            is neither, hardware of an unknown name, or processes that are no number of them.
        TypeError: a model, drop sampler or hardware that is none.

    Examples:
        >>> c = cost("XL/2", grid=(16, 16), batch=32)
        >>> c.parameters, round(c.sparse_ratio, 2), round(c.guidance_ratio, 2)
        (677476816, 2.82, 1.75)
        >>> round(c.estimate()["sparse, captured"], 3), round(c.estimate("A100")["sparse, captured"], 3)
        (0.038, 0.094)
    """
    if isinstance(model, str):
        with torch.device("meta"):
            model = SiT.preset(model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a preset's name, a SiT or a wrapped model, got {type(model).__name__}")
    if drop is not None and (isinstance(drop, type) or not hasattr(drop, "sample")):
        raise TypeError(f"drop must be a sampler such as sprint.StructuredDrop(0.75), got {drop!r}")
    if processes is not None and not _is_count(processes):
        raise ValueError(f"processes must be a whole number of at least 1, got {processes!r}")
    parameters = list(model.parameters())
    on_meta = any(parameter.is_meta for parameter in parameters)
    chosen = _choose(hardware) if hardware is not None else H100 if on_meta else present()
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    with torch.inference_mode(False), torch.enable_grad():
        if isinstance(host := unwrapped(model), SiT):
            if grid is None or args or kwargs:
                raise ValueError("give the token grid of a SiT, and nothing else: cost(model, grid=(16, 16), batch=32)")
            if not isinstance(grid, tuple | list) or len(grid) != 2 or not all(_is_count(n) for n in (*grid, batch)):
                raise ValueError(
                    f"grid must be (rows, columns) of tokens and batch at least 1, whole numbers, got {grid!r} and {batch!r}"
                )
            name, dtype = f"SiT {host.config.dim}x{host.config.depth}", dtype or _default_dtype(host, chosen)
            counted = of_sit(host, (grid[0], grid[1]), drop or StructuredDrop(0.75), batch=batch, dtype=dtype)
        else:
            if grid is not None or dtype is not None or batch != 1:
                raise ValueError(
                    "grid, batch and dtype are for a SiT: those of a wrapped model come with its example arguments"
                )
            name, counted = type(model).__name__, of_wrapped(model, args, kwargs, drop)
            batch = next((len(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim), 1)
    return Cost(
        name,
        sum(parameter.numel() for parameter in parameters),
        batch,
        **counted,
        trained=sum(parameter.numel() for parameter in trained),
        weights=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        states=3 * sum(parameter.numel() * parameter.element_size() for parameter in trained),
        processes=processes or _processes(),
        chosen=chosen,
    )


def _choose(hardware: Hardware | str) -> Hardware | str:
    """Names are looked up at once, measuring waits."""
    if isinstance(hardware, str):
        return HERE if hardware.strip().casefold() == HERE else find(hardware)
    if not isinstance(hardware, Hardware):
        raise TypeError(f'hardware must be a name such as "H100" or a sprint.Hardware, got {hardware!r}')
    return hardware


def _default_dtype(model: SiT, chosen: Hardware | str) -> torch.dtype:
    if model.dtype != torch.float32:
        return model.dtype
    on_gpu = torch.cuda.is_available() if isinstance(chosen, str) else chosen.captures
    return torch.bfloat16 if on_gpu else torch.float32


def _processes() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


def _is_count(number: Any) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool) and int(number) >= 1


def _two(number: float) -> str:
    """Two significant digits, without an exponent."""
    return f"{float(f'{number:.2g}'):.10g}"


def _unit(number: float, units: dict[str, float]) -> str:
    """Two significant digits in the largest unit of which there is at least one."""
    name, size = next((unit for unit in units.items() if float(f"{number:.2g}") >= unit[1]), list(units.items())[-1])
    return f"{_two(number / size)} {name}"


def _time(seconds: float) -> str:
    return _unit(seconds, {"h": 3600, "s": 1, "ms": 1e-3, "µs": 1e-6})


def _flops(number: float) -> str:
    return _unit(number, {"PFLOP": 1e15, "TFLOP": 1e12, "GFLOP": 1e9, "MFLOP": 1e6, "FLOP": 1})


def _bytes(number: float) -> str:
    return _unit(number, {"TiB": 2**40, "GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "B": 1})
