"""`check`: prove a wrapping on the user's own model and inputs.

Attention does not depend on the order of tokens once their positions travel with them. So keeping all tokens in a
random order for each sample must leave the full path's output as it is. A table that was forgotten, gathered twice or
gathered wrongly breaks that. And keeping some of them must give what the host itself gives with all of them, where its
attention sees the kept ones only: blocks that count their tokens, or number them, break that.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from sprint.hosts.declare import Stream
from sprint.hosts.mechanism.masked import Masked
from sprint.hosts.mechanism.paths import path
from sprint.hosts.mechanism.state import SprintState, find_wrapped, state_of
from sprint.middle.fusion import MaskRestore, SparseDenseResidual, TokenRouting
from sprint.middle.tokens import TokenSubset
from sprint.random import Device, uniform

ORDER, FEWER = "all tokens in any order = full", "fewer tokens = masked attention"
SMALL = 0.01  # seconds of a forward pass, below which shares of them say nothing


@dataclass(frozen=True)
class Finding:
    """One line of a report."""

    name: str
    ok: bool | None
    """None: does not apply to this model."""
    detail: str


@dataclass(frozen=True)
class Report:
    """What `check` found; prints as a table."""

    model: str
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
        """Whether nothing failed, and at least one of the two trials of dropped tokens proved them right."""
        proved = any(finding.ok for finding in self.findings if finding.name in (ORDER, FEWER))
        return proved and not self.failed

    @property
    def failed(self) -> bool:
        """Whether something that must hold does not."""
        return any(finding.ok is False for finding in self.findings)

    def __str__(self) -> str:
        marks = {True: "ok", False: "FAILED", None: "-"}
        lines = [f"{self.model}", *(f"  {marks[f.ok]:<7}{f.name:<34}{f.detail}" for f in self.findings)]
        for job, seconds in self.seconds.items():
            full = self.seconds[f"{job.rpartition(', ')[0]}, full"]
            share = f"{self.saved[job]:.0%} saved" if full >= SMALL else "too small to time"
            saved = "" if job.endswith(", full") else f", {share}"
            lines.append(f"  {'':<7}{job:<34}{seconds * 1000:.1f} ms{saved}")
        return "\n".join(lines)


class _Shuffled:
    """A drop sampler that drops nothing, in a random order for each sample, or the same for all."""

    def __init__(self, shared: bool) -> None:
        self.shared = shared

    def sample(
        self, batch: int, grid: Sequence[int], *, device: Device = None, generator: torch.Generator | None = None
    ) -> TokenSubset:
        """All tokens, shuffled."""
        num_tokens = math.prod(grid)
        scores = uniform((1 if self.shared else batch, num_tokens), device=device, generator=generator)
        return TokenSubset(scores.argsort(dim=1).expand(batch, -1), num_tokens)


def check(model: nn.Module, *args: Any, tolerance: float = 1e-4, repeats: int = 3, **kwargs: Any) -> Report:
    """Run a wrapped model on each path and verify what must hold.

    Parameters, modes, path and random streams stay as they were. Where the output shows nothing of the middle blocks, as
    in a fresh model with zero gates, parameters are perturbed meanwhile, and a copy of them is held.

    Args:
        model: wrapped, also behind what `sprint.path` finds it behind.
        *args: arguments of its forward; a batch of 2 or more sees more.
        tolerance: largest difference relative to the largest output; wider for bf16.
        repeats: timed runs of each kind, of which the median is given.
        **kwargs: arguments of its forward.

    Returns:
        The findings and times; `print` it.

    Raises:
        ValueError: something that must hold does not; the message is the whole report.
    """
    host, state = find_wrapped(model)
    grids, fusion = state.grid, host.sprint.fusion

    def run(name: Any, **route: Any) -> Any:
        with path(model, name, grid=grids, **route):
            return model(*args, **kwargs)

    with _left_as_it_was(model):
        model.eval()
        with torch.no_grad():
            perturbed = not _middle_matters(run, state, tolerance)
            with _perturbed(host) if perturbed else nullcontext():
                blind = perturbed and not _middle_matters(run, state, tolerance)
                findings = [_identity(run, state, fusion), _order(run, state, tolerance, perturbed=perturbed, blind=blind)]
                findings += [_fewer(run, state, tolerance, blind=blind), *_outputs(run, state)]
            findings.append(_middle_calls(host, state, run))
        with torch.enable_grad():
            findings.append(_gradients(model, state, run))
            seconds = _seconds(model, state, run, repeats)
    report = Report(type(model).__name__, tuple(findings), seconds)
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
    """Parameters with some noise, and bit by bit what they were afterwards.

    A fresh model's gates and output are often zero, so that its output shows nothing of what its middle blocks do.
    """
    parameters = [p for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize > 1]
    before = [parameter.clone() for parameter in parameters]
    fusion = {id(parameter) for parameter in state_of(model).parameters()}
    try:
        torch.manual_seed(0)
        for parameter in parameters:
            if id(parameter) not in fusion:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        yield
    finally:
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)


def _middle_matters(run: Callable[..., Any], state: SprintState, tolerance: float) -> bool:
    """Whether the output shows what the middle blocks do, well above the tolerance."""
    full = first_tensor(run("full"))
    state.idle = True
    try:
        without = first_tensor(run("full"))
    finally:
        state.idle = False
    return _difference(full, without) > 10 * tolerance


def _difference(one: Tensor, other: Tensor) -> float:
    """Largest difference relative to the largest value."""
    return ((one - other).abs().max() / one.abs().max().clamp_min(1e-12)).item()


def _outputs(run: Callable[..., Any], state: SprintState) -> list[Finding]:
    """Features that the model returns from between its middle blocks have the kept tokens only, on the sparse path."""
    if state.drop is None:
        return []
    full, sparse = _tensors(run("full")), _tensors(run("sparse"))
    changed = [
        f"output {i}: {tuple(b.shape)}, full {tuple(a.shape)}"
        for i, (a, b) in enumerate(zip(full, sparse, strict=False))
        if a.shape != b.shape
    ]
    return [Finding("outputs of kept tokens only", None, "; ".join(changed))] if changed else []


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return [tensor for value in values for tensor in _tensors(value)]


def first_tensor(output: Any) -> Tensor:
    """The prediction in whatever a model returns: a tensor, a tuple, a list of equal tensors, or an output with `sample`."""
    output = getattr(output, "sample", output)
    if isinstance(output, tuple):
        output = output[0]
    if isinstance(output, list):
        output = torch.stack(output)
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the model returned {type(output).__name__}, in which no prediction was found: wrap a model of tensors"
        )
    return output


def _identity(run: Callable[..., Any], state: SprintState, fusion: nn.Module) -> Finding:
    name = "full path = the host itself"
    full = first_tensor(run("full"))
    state.bypassed = True
    try:
        host = first_tensor(run("full"))
    finally:
        state.bypassed = False
    difference = _difference(host, full)
    if not _is_identity(fusion):
        return Finding(name, None, f"the fusion is not the identity (any more): relative difference {difference:.1e}")
    return Finding(name, full.equal(host), "bit by bit" if full.equal(host) else f"relative difference {difference:.1e}")


def _is_identity(fusion: nn.Module) -> bool:
    """Whether the fusion hands all deep tokens on as they are."""
    if isinstance(fusion, TokenRouting | MaskRestore):
        return True  # by construction
    if not isinstance(fusion, SparseDenseResidual):
        return False  # an adapter's
    deep, *others = fusion.proj.weight.split(fusion.dim, dim=1)
    identity = torch.eye(fusion.dim, device=deep.device, dtype=deep.dtype)
    return deep.equal(identity) and not any(other.any() for other in (*others, fusion.proj.bias))


def _order(run: Callable[..., Any], state: SprintState, tolerance: float, *, perturbed: bool, blind: bool) -> Finding:
    name = ORDER
    if any(place.unfolds for place, _ in state.places):
        return Finding(name, None, "its blocks need tokens in grid order")
    if blind:
        return Finding(name, None, "NOT PROVED: the output does not depend on what the middle blocks do")
    generator = torch.Generator().manual_seed(0)
    shuffled = _Shuffled(bool(getattr(state.drop, "shared", False)))
    full, reordered = first_tensor(run("full")), first_tensor(run("sparse", drop=shuffled, generator=generator))
    difference = _difference(full, reordered)
    detail = f"relative difference {difference:.1e}, at most {tolerance:.0e}"
    return Finding(name, difference < tolerance, detail + (", parameters perturbed" if perturbed else ""))


def _fewer(run: Callable[..., Any], state: SprintState, tolerance: float, *, blind: bool) -> Finding:
    """Kept tokens alone, and all of them with attention masked to the kept ones."""
    reasons = {
        "wrapped without a drop sampler": state.drop is None,
        "NOT PROVED: its blocks need tokens in grid order": any(place.sides for place, _ in state.places),
        "NOT PROVED: the output does not depend on what the middle blocks do": blind,
    }
    for reason, holds in reasons.items():
        if holds:
            return Finding(FEWER, None, reason)
    sparse = first_tensor(run("sparse", generator=torch.Generator().manual_seed(1)))
    difference, detail = math.inf, ""
    # A joint attention may have either order, and its queries may be of another stream than its keys.
    for order, across in product(("text+image", "image+text"), (False, True)):
        expected, masked = _masked(run, state, order, across=across)
        if masked.subset is None or masked.attentions < masked.blocks:
            continue
        kept, tokens = masked.subset.num_kept, masked.subset.num_tokens
        if kept == tokens:
            return Finding(FEWER, None, f"NOT PROVED: the drop sampler keeps all {tokens} tokens")
        here = _difference(expected, sparse)
        if not across or here < tolerance:
            detail = f"image tokens {tokens} of {masked.length}, kept {kept}"
            difference = min(difference, here)
        if difference < tolerance:
            break
    if not detail:
        return Finding(FEWER, None, "NOT PROVED: attention does not go through F.scaled_dot_product_attention")
    return Finding(FEWER, difference < tolerance, f"{detail}, relative difference {difference:.1e}, at most {tolerance:.0e}")


def _masked(run: Callable[..., Any], state: SprintState, order: Stream, *, across: bool) -> tuple[Tensor, Masked]:
    """What the host gives on the sparse path when all tokens run and attention is masked, for the same draw."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    state.masked = masked = Masked(order, across=across)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return first_tensor(run("sparse", generator=torch.Generator().manual_seed(1))), masked
    finally:
        state.masked = None
        torch.backends.mha.set_fastpath_enabled(fastpath)


def _middle_calls(model: nn.Module, state: SprintState, run: Callable[..., Any]) -> Finding:
    calls, hooks, index = 0, [], 0
    seen: set[nn.Module] = set()

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    for place, _ in state.places:
        blocks = model.get_submodule(place.blocks.name)
        for block in blocks if isinstance(blocks, nn.ModuleList | nn.Sequential) else [blocks]:
            if state.first <= index <= state.last:
                hooks.append(block.register_forward_hook(count))
            seen.add(block)
            index += 1
    name = "shallow path skips the middle"
    if len(seen) < index:
        for hook in hooks:
            hook.remove()
        return Finding(name, None, "some blocks are one and the same module, so that their calls cannot be told apart")
    try:
        run("shallow")
    finally:
        for hook in hooks:
            hook.remove()
    return Finding(name, calls == 0, f"{calls} calls of {len(hooks)} middle blocks")


def _gradients(model: nn.Module, state: SprintState, run: Callable[..., Any]) -> Finding:
    """Every parameter that learns on the full path learns on the sparse path."""
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    def reached(*path_and: Any) -> set[str]:
        output = first_tensor(run(*path_and))
        grads = torch.autograd.grad(output.float().square().mean(), [p for _, p in parameters], allow_unused=True)
        return {name for (name, _), grad in zip(parameters, grads, strict=True) if grad is not None}

    name = "sparse gradients reach parameters"
    if state.drop is None:
        return Finding(name, None, "wrapped without a drop sampler")
    if not parameters:
        return Finding(name, None, "no parameter requires gradients")
    missing = sorted(reached("full") - reached("sparse"))
    return Finding(name, not missing, f"none for {', '.join(missing[:3])}" if missing else f"{len(parameters)} parameters")


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
                lambda name=name: torch.autograd.grad(first_tensor(run(name)).float().mean(), parameters, allow_unused=True)
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
