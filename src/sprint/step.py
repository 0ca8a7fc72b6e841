"""`TrainStep`: one optimisation step as one call, captured whole in a CUDA graph where that is possible.

    draw time, noise and tokens, forward, backward, clip, optimizer, EMA

A sparse step has few FLOPs and as many kernels as a dense one, so that in eager PyTorch it waits for its launches: the
gain of dropping tokens shows on the clock only when launches are out of the way. On a CPU the step is plain code with the
same numbers.
"""

import math
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sprint.capture import LIMIT, WARMUP, Graph, Graphs, ModelState
from sprint.compiling import compile_blocks
from sprint.guidance import unwrapped
from sprint.optim import AdamW, Shadows


class StepOutput(NamedTuple):
    """What a step returns; tensors stay on the device, so that reading them is the caller's choice."""

    loss: Tensor
    """Of this batch, scalar."""
    grad_norm: Tensor | None
    """Total norm of the gradients before clipping, scalar; None without clip, or where only gradients were accumulated."""
    metrics: dict[str, Tensor]
    """The other scalar tensors of what the loss function returned, by name (`repa`)."""
    updated: bool
    """Whether the parameters changed; with accumulation, at every `accumulate`-th call."""
    captured: bool
    """Whether a CUDA graph did it."""


class TrainStep:
    """A training step for any model, loss function and optimizer.

    Args:
        model: trained in place, also inside DistributedDataParallel or FSDP2, where nothing is captured: the blocks are
            compiled, and collectives overlap with the backward pass as usual.
        loss: called as `loss(model, *args, **kwargs)`; returns a scalar, or an object or dictionary with a scalar `loss`.
        optimizer: of torch, or with its interface; `sprint.AdamW` clips and averages in its own pass over memory, and
            keeps the weights of linear layers in autocast's dtype beside the float32 ones. On a GPU its learning rates
            become tensors (schedulers fill them), and its states capturable.
        clip: largest total norm of the gradients; None leaves them.
        ema: a copy of the model whose parameters follow (averaged within the captured step), or an object with
            `step(parameters)` (`diffusers.training_utils.EMAModel`) or `update_parameters(model)`
            (`torch.optim.swa_utils.AveragedModel`), called after each update.
        ema_decay: of a copied model.
        accumulate: calls per update; the mean of their gradients is taken.
        autocast: dtype of the products, such as torch.bfloat16; None for the model's own.
        compile: compile the blocks, each distinct shape once; by default on a GPU.
        capture: capture CUDA graphs; by default on a GPU.
        warmup: plain steps before a shape is captured.
        limit: graphs kept at most, one for each shape, drop sampler and other option.
        make_graph: for tests.

    Examples:
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> step = TrainStep(model, lambda model, x: model(x).square().mean(), optimizer, clip=1.0)
        >>> out = step(torch.ones(4, 2))
        >>> out.updated, out.captured
        (True, False)
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Any],
        optimizer: torch.optim.Optimizer,
        *,
        clip: float | None = None,
        ema: Any = None,
        ema_decay: float = 0.9999,
        accumulate: int = 1,
        autocast: torch.dtype | None = None,
        compile: bool | None = None,  # noqa: A002  # torch's word
        capture: bool | None = None,
        warmup: int = WARMUP,
        limit: int = LIMIT,
        make_graph: Callable[[], Graph] | None = None,
    ) -> None:
        if not hasattr(optimizer, "param_groups"):
            raise TypeError(
                f"optimizer must be one like torch.optim.AdamW(model.parameters()), got {type(optimizer).__name__}"
            )
        if not callable(loss):
            raise TypeError(f"loss must be a function of the model and its batch, got {type(loss).__name__}")
        self.parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        if not self.parameters:
            raise ValueError("the optimizer has no parameter that requires a gradient: pass model.parameters()")
        _check(clip, accumulate, ema_decay, autocast)
        self.device = self.parameters[0].device
        on_gpu = self.device.type == "cuda"
        if capture and not on_gpu and make_graph is None:
            raise ValueError(f"capture=True needs a CUDA device, the model is on {self.device}: leave capture out")
        self.model, self.loss, self.optimizer = model, loss, optimizer
        self.clip, self.accumulate, self.autocast = clip, accumulate, autocast
        self._after = self._prepare_ema(ema, ema_decay)
        if on_gpu if compile is None else compile:
            compile_blocks(unwrapped(model))
        self._shadows: Shadows | None = None
        if isinstance(optimizer, AdamW) and autocast is not None and accumulate == 1 and self._cannot() is None:
            self._shadows = Shadows(model, autocast)
            optimizer.shadows = self._shadows.copies
        self._model_state = ModelState(model)
        self._rates: list[Tensor] = []
        self._graphs: Graphs | None = None
        self.accumulated = 0
        if capture is not False and (on_gpu or make_graph is not None):
            graphs = Graphs(
                self._run,
                device=self.device,
                state=self._state,
                before=self._release,
                warmup=warmup,
                limit=limit * min(accumulate, 3),  # the first, the middle and the last of a window differ
                make_graph=make_graph,
            )
            if reason := self._cannot():
                graphs.say(reason)
            else:
                self._graphs = graphs
                self._make_capturable()
        for parameter in self.parameters:  # with accumulation every graph must add to the same memory
            parameter.grad = torch.zeros_like(parameter) if accumulate > 1 else None

    def __call__(self, *args: Any, **kwargs: Any) -> StepOutput:
        """Train on one batch.

        Args:
            *args: passed to the loss after the model.
            **kwargs: passed to the loss. Tensors may change from call to call; every other value, such as a drop sampler,
                belongs to what is captured.
        """
        first, updates = self.accumulated == 0, self.accumulated + 1 == self.accumulate
        if self._shadows is not None:
            self._shadows.refresh()
        if self._graphs is None:
            (loss, norm, metrics), captured = self._run(*args, _first=first, _updates=updates, **kwargs), False
        else:
            self._keep_rates()
            (loss, norm, metrics), captured = self._graphs(*args, _first=first, _updates=updates, **kwargs)
        self.accumulated = 0 if updates else self.accumulated + 1
        if updates:
            self._after()
        return StepOutput(loss, norm, metrics, updates, captured)

    def _run(self, *args: Any, _first: bool, _updates: bool, **kwargs: Any) -> tuple[Tensor, Tensor | None, dict]:
        """The whole step; this is what a graph captures."""
        if _first and self.accumulate > 1:
            torch._foreach_zero_([p.grad for p in self.parameters])  # pyright: ignore[reportPrivateImportUsage]
        with self._synchronised(_updates):
            context = nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)
            with context, self._shadows or nullcontext():
                output = self.loss(self.model, *args, **kwargs)
            loss = _scalar(output)
            (loss / self.accumulate).backward()
        if not _updates:
            return loss.detach(), None, _metrics(output)
        norm = self._update()
        self._release()
        return loss.detach(), norm, _metrics(output)

    def _update(self) -> Tensor | None:
        """Clip, update, average; returns the norm if clipped."""
        if isinstance(self.optimizer, AdamW):
            self.optimizer.step(clip=self.clip, averages=self._averages, average_decay=self._decay)
            if self._shadows is not None:
                self._shadows.remember()
            return None if self.clip is None else self.optimizer.grad_norm
        norm = None
        if self.clip is not None:
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        if self._averages:
            parameters, averages = [p.data for p in self._averages], list(self._averages.values())
            torch._foreach_lerp_(averages, parameters, 1 - self._decay)  # pyright: ignore[reportPrivateImportUsage]
        return norm

    def _release(self) -> None:
        """Drop the gradients, which are used up, so that a backward pass writes new ones instead of adding."""
        if self.accumulate == 1:
            for parameter in self.parameters:
                parameter.grad = None
            if self._shadows is not None:
                self._shadows.release()

    def _synchronised(self, updates: bool) -> AbstractContextManager[Any]:
        """Gradients are averaged over processes when they are complete."""
        if isinstance(self.model, DistributedDataParallel) and not updates:
            return self.model.no_sync()
        if hasattr(self.model, "set_requires_gradient_sync"):  # FSDP2
            self.model.set_requires_gradient_sync(updates)  # pyright: ignore[reportCallIssue]
        return nullcontext()

    def _prepare_ema(self, ema: Any, decay: float) -> Callable[[], None]:
        self._averages: dict[Tensor, Tensor] = {}
        self._decay = decay
        model = unwrapped(self.model)
        if ema is None:
            return lambda: None
        if hasattr(ema, "update_parameters"):
            return lambda: ema.update_parameters(model)
        if isinstance(ema, nn.Module):
            ours, theirs = dict(model.named_parameters()), dict(ema.named_parameters())
            if ema is model or ours.keys() != theirs.keys():
                raise ValueError("ema is not a copy of the model: copy.deepcopy(model), before it is wrapped in DDP")
            self._averages = {ours[name]: theirs[name].data for name in ours if ours[name].requires_grad}
            return lambda: None
        if hasattr(ema, "step"):
            return lambda: ema.step(model.parameters())
        raise TypeError(f"ema must be a copy of the model, or have step or update_parameters, got {type(ema).__name__}")

    def _cannot(self) -> str | None:
        """Why this step cannot be captured, if so."""
        if isinstance(self.model, DistributedDataParallel):
            return "DistributedDataParallel reduces gradients from hooks of its own"
        if any(hasattr(parameter, "placements") for parameter in self.parameters):
            return "FSDP gathers parameters from hooks of its own"
        if any(parameter.device != self.device for parameter in self.parameters):
            return "the parameters are on several devices"
        return None

    def _make_capturable(self) -> None:
        """Learning rates and step counts as tensors on the device, where a graph finds them."""
        for group in self.optimizer.param_groups:
            if "capturable" in group:
                group["capturable"] = True
            self._rates.append(torch.tensor(float(group["lr"]), device=self.device))
        # Or torch warns of each plain step before the capture.
        self.optimizer._warned_capturable_if_run_uncaptured = True  # pyright: ignore[reportAttributeAccessIssue]
        for state in self.optimizer.state.values():
            if isinstance(count := state.get("step"), Tensor):
                state["step"] = count.to(self.device)
        self._keep_rates()

    def _keep_rates(self) -> None:
        """A rate that was set as a number, or loaded, goes into the tensor that the graphs read."""
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            if group["lr"] is not rate:
                rate.fill_(float(group["lr"]))
                group["lr"] = rate

    def _state(self) -> Hashable:
        """What a graph has built in besides its arguments: modes, options, and where parameters and states are."""
        groups = tuple(
            tuple((key, value) for key, value in group.items() if key not in ("params", "lr") and _plain(value))
            for group in self.optimizer.param_groups
        )
        ends = (self.parameters[0], self.parameters[-1])
        states = (id(value) for p in ends for value in self.optimizer.state.get(p, {}).values() if isinstance(value, Tensor))
        return self._model_state(), groups, tuple(states)


def _check(clip: float | None, accumulate: int, ema_decay: float, autocast: torch.dtype | None) -> None:
    if clip is not None and not clip > 0:
        raise ValueError(f"clip is the largest norm of the gradients, positive, got {clip}: None turns it off")
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1 call per update, got {accumulate}")
    if not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay must be in [0, 1), got {ema_decay}")
    if autocast == torch.float16:
        raise ValueError("float16 gradients vanish without loss scaling, which TrainStep has not: torch.bfloat16")


def _scalar(output: Any) -> Tensor:
    loss = output["loss"] if isinstance(output, dict) else getattr(output, "loss", output)
    if not isinstance(loss, Tensor) or loss.ndim:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"the loss function must return a scalar tensor, or an object with one as `loss`, got {shape}")
    return loss


def _metrics(output: Any) -> dict[str, Tensor]:
    """Scalars beside the loss, of an object or a dictionary."""
    fields = output if isinstance(output, dict) else getattr(output, "__dict__", {})
    return {
        name: value.detach()
        for name, value in fields.items()
        if name != "loss" and isinstance(value, Tensor) and not value.ndim and not isinstance(output, Tensor)
    }


def _plain(value: Any) -> bool:
    if isinstance(value, float) and math.isnan(value):
        return False  # never equal to itself
    return isinstance(value, (int, float, str, tuple, bool, type(None)))
