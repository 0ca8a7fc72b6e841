"""`check`: prove a wrapping on the user's own model and inputs, by `sprint.hosts.trials`, and time its paths."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sprint.arguments import checked
from sprint.hosts.mechanism.paths import path
from sprint.hosts.mechanism.state import SprintState, find_wrapped
from sprint.hosts.mechanism.tables import kept_in
from sprint.hosts.outputs import first_tensor
from sprint.hosts.trials import FEWER, ORDER, Trials, gradients
from sprint.hosts.tried import Finding

SMALL = 0.01  # seconds of a forward pass, below which shares of them say nothing


@dataclass(frozen=True)
class Report:
    """What `check` found; prints as a table."""

    model: str
    tokens: str
    """Image tokens, their grid, those that are kept."""
    findings: tuple[Finding, ...]
    seconds: dict[str, float]
    """Median seconds by job: forward on each path, and forward and backward on the full and sparse path."""

    @property
    def saved(self) -> dict[str, float]:
        """Share of the full path's seconds that the others save, by job; negative where they cost more."""
        full = {job.rpartition(", ")[0]: seconds for job, seconds in self.seconds.items() if job.endswith(", full")}
        return {job: 1 - seconds / full[job.rpartition(", ")[0]] for job, seconds in self.seconds.items()}

    @property
    def ok(self) -> bool:
        """Whether fewer tokens were proved right, or, without a drop sampler, their order; and nothing failed."""
        found = {finding.name: finding for finding in self.findings}
        return bool(found.get(FEWER, found[ORDER]).ok) and not self.failed

    @property
    def failed(self) -> bool:
        """Whether something that must hold does not."""
        return any(finding.ok is False for finding in self.findings)

    def __str__(self) -> str:
        marks = {True: "ok", False: "FAILED", None: "-"}
        lines = [
            f"{self.model}{f': {self.tokens}' if self.tokens else ''}",
            *(f"  {marks[f.ok]:<7}{f.name:<34}{f.detail}" for f in self.findings),
        ]
        if not self.ok and not self.failed:
            lines.append("  not proved, so not ok: see what says NOT PROVED; nothing failed")
        for job, seconds in self.seconds.items():
            full = self.seconds[f"{job.rpartition(', ')[0]}, full"]
            share = f"{self.saved[job]:.0%} saved" if full >= SMALL else "too small to time"
            saved = "" if job.endswith(", full") else f", {share}"
            lines.append(f"  {'':<7}{job:<34}{seconds * 1000:.1f} ms{saved}")
        return "\n".join(lines)


@checked
def check(
    model: nn.Module,
    *args: Any,
    tolerance: float | None = None,
    repeats: int = 3,
    output: Callable[[Any], Tensor] | None = None,
    **kwargs: Any,
) -> Report:
    """Run a wrapped model on each path and verify what must hold.

    Parameters, modes, path and random streams are afterwards as they were. Behind the first trial parameters are perturbed,
    so that zero gates, positions and biases hide nothing, and a copy of them is held meanwhile.

    Args:
        model: wrapped, also behind what `sprint.path` finds it behind.
        *args: arguments of its forward; a batch of 2 or more sees more.
        tolerance: largest difference relative to the largest output; by default 1e-4, and with parameters or autocast of
            fewer bits four times their precision.
        repeats: timed runs of each kind, of which the median is given.
        output: takes the prediction out of what the model returns, such as `lambda out: out["x"]`; by default the first
            tensor of a tuple, a list, or an output with `sample`.
        **kwargs: arguments of its forward.

    Returns:
        The findings and times; `print` it.

    Raises:
        ValueError: something that must hold does not; the message is the whole report. Or the wrapped model's own forward
            did not run, so that no path was taken.
    """
    host, state = find_wrapped(model)

    def call(name: Any, args: tuple, kwargs: dict[str, Any], **route: Any) -> Any:
        with path(model, name, grid=state.grid, **route):
            return model(*args, **kwargs)

    trials = Trials(model, host, state, call, output or first_tensor, args, kwargs, tolerance or _tolerance(host))
    with _left_as_it_was(model):
        model.eval()
        with torch.no_grad():
            findings = [trials.identity()]
            trials.enters()
            with _perturbed(host):
                trials.blind = not trials.middle_matters()
                findings += [trials.order(), trials.fewer(), trials.image(), trials.counts(), trials.alone()]
                findings += [trials.halves(), trials.padding(), trials.outputs(), trials.middle_calls()]
                with torch.enable_grad():
                    findings.append(trials.gradients())
            tokens = trials.tokens()
        with torch.enable_grad():
            seconds = _seconds(model, state, trials.run, repeats)
    report = Report(type(model).__name__, tokens, tuple(finding for finding in findings if finding is not None), seconds)
    if report.failed:
        raise ValueError(f"this wrapping is not right:\n{report}")
    return report


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """The mode of every module and torch's random streams are afterwards what they were."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng([device.index for device in devices]):
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


@contextmanager
def _perturbed(model: nn.Module) -> Iterator[None]:
    """Parameters with some noise, and other tensors that modules keep where they are all zero; afterwards what they were.

    Gates and output of a fresh model are often zero, so that its output shows nothing of what its middle blocks do; and so
    may be positions and biases, of which it then shows nothing. What is no parameter is changed where all of it is zero (one
    zero among others means something: the sine of position 0), and to small positive numbers, of which a root or a
    logarithm can be taken; a single number may be a switch, and stays.
    """
    kept = {id(value): value for module in model.modules() for value in kept_in(module).values()}.values()
    kept = [x for x in kept if x.is_floating_point() and x.dtype.itemsize > 1 and not x.is_inference()]
    parameters = [x for x in kept if isinstance(x, nn.Parameter)]
    others = [x for x in kept if not isinstance(x, nn.Parameter) and x.numel() > 1 and x.is_contiguous() and not x.any()]
    before = [value.clone() for value in (*parameters, *others)]
    try:
        torch.manual_seed(0)
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter), alpha=_noise(parameter))
        for value in others:
            value.add_(torch.rand_like(value), alpha=_noise(value))
        yield
    finally:
        for value, earlier in zip((*parameters, *others), before, strict=True):
            value.copy_(earlier)


def _noise(like: Tensor) -> float:
    return min(0.05, (like.shape[-1] if like.ndim else 1) ** -0.5)


def _tolerance(model: nn.Module) -> float:
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize > 1}
    for kind in ("cpu", "cuda"):
        if torch.is_autocast_enabled(kind):
            kinds.add(torch.get_autocast_dtype(kind))
    return max(1e-4, *(4 * torch.finfo(kind).eps for kind in kinds))


def _seconds(model: nn.Module, state: SprintState, run: Callable[..., Any], repeats: int) -> dict[str, float]:
    def median(job: Callable[[], Any]) -> float:
        job()
        times = []
        for _ in range(repeats):
            with _timed(times):
                job()
        return sorted(times)[len(times) // 2]

    paths = ("full", "sparse", "shallow") if state.drop is not None else ("full", "shallow")
    seconds = {}
    with torch.no_grad():
        for name in paths:
            seconds[f"forward, {name}"] = median(lambda name=name: run(name))
    parameters = [p for p in model.parameters() if p.requires_grad]
    for name in paths[:-1]:
        if parameters:
            seconds[f"forward and backward, {name}"] = median(
                lambda name=name: gradients(lambda: run(name).float().mean(), parameters)
            )
    return seconds


@contextmanager
def _timed(times: list[float]) -> Iterator[None]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    times.append(time.perf_counter() - start)
