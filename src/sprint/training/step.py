"""`TrainStep`: one optimisation step as one call, captured whole in a CUDA graph where that is possible.

    draw time, noise and tokens, forward, backward, clip, optimizer, EMA

A sparse step has few FLOPs and as many kernels as a dense one, so that in eager PyTorch it waits for its launches: the
gain of dropping tokens shows on the clock only when launches are out of the way. On a CPU the step is plain code with the
same numbers.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sprint.arguments import checked
from sprint.capture.compiling import compile_blocks
from sprint.capture.graphs import LIMIT, WARMUP, Graph, Graphs, check_autocast, check_counts
from sprint.capture.state import ModelState, OptimizerState, Together
from sprint.flow.holders import unwrapped
from sprint.training.averages import Averages
from sprint.training.gradients import Window
from sprint.training.optim import AdamW
from sprint.training.shadows import Shadows


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


@checked
class TrainStep:
    """A training step for any model, loss function and optimizer.

    Gradients belong to the step: `p.grad` is None after an update, and what others leave there is not used. On a GPU no
    Python runs once a step is captured: an attribute of the loss function, or a hook, that changes later has no effect.
    Modes, paths, checkpointing, `requires_grad` and the optimizer's options are looked at in each call.

    Args:
        model: trained in place, also inside DistributedDataParallel or FSDP2, where nothing is captured: the blocks are
            compiled, and collectives overlap with the backward pass as usual.
        loss: called as `loss(model, *args, **kwargs)`; returns a scalar, or an object or dictionary with a scalar `loss`.
        optimizer: of torch, or with its interface; `sprint.AdamW` clips and averages in its own pass over memory, and
            keeps the weights of linear layers in autocast's dtype beside the float32 ones. On a GPU its learning rates
            become tensors (schedulers fill them), its states capturable, and SGD fused.
        clip: largest total norm of the gradients; None leaves them.
        ema: a copy of the model whose parameters follow (averaged within the captured step), or an object with
            `step(parameters)` (`diffusers.training_utils.EMAModel`) or `update_parameters(model)`
            (`torch.optim.swa_utils.AveragedModel`), called after each update.
        ema_decay: of a copied model.
        accumulate: calls per update; the mean of their gradients is taken. After an exception they are counted anew.
        autocast: dtype of the products, such as torch.bfloat16; None for the model's own.
        shadows: with `sprint.AdamW` and autocast, keep weights of linear layers in autocast's dtype. False casts them in
            each step, as autocast does: for models that turn autocast off for some layers, or read weights themselves.
        compile: compile the blocks, each distinct shape once; by default on a GPU.
        capture: capture CUDA graphs; by default on a GPU.
        warmup: plain steps before a shape is captured, at least one.
        limit: graphs kept at most, one for each shape, drop sampler and other option.
        make_graph: for tests.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a value out of range, an `ema` that is no copy of the model, an optimizer of another model.

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
        shadows: bool = True,
        compile: bool | None = None,  # noqa: A002  # torch's word
        capture: bool | None = None,
        warmup: int = WARMUP,
        limit: int = LIMIT,
        make_graph: Callable[[], Graph] | None = None,
    ) -> None:
        _check_parts(model, loss, optimizer)
        _check_numbers(clip, accumulate, ema_decay, autocast)
        check_counts(warmup, limit, least=1)  # states of the optimizer are made in a plain step
        self.model, self.loss, self.optimizer = model, loss, optimizer
        self.clip, self.accumulate, self.autocast = clip, accumulate, autocast
        self.device = next(p.device for p in self.parameters if p.requires_grad)
        on_gpu = self.device.type == "cuda"
        if capture and not on_gpu and make_graph is None:
            raise ValueError(f"capture=True needs a CUDA device, the model is on {self.device}: leave capture out")
        self._averages = Averages(model, ema, ema_decay)
        if on_gpu if compile is None else compile:
            compile_blocks(unwrapped(model))
        cannot, captures = self._cannot(), capture is not False and (on_gpu or make_graph is not None)
        self._shadows: Shadows | None = None
        if shadows and isinstance(optimizer, AdamW) and autocast is not None and accumulate == 1 and cannot is None:
            self._shadows = Shadows(model, autocast)
        self._graphs: Graphs | None = None
        self._optimizer_state: OptimizerState | None = None
        self._window = Window(accumulate, fixed=captures and cannot is None)
        self.accumulated = self._filled = 0
        if captures:
            models = [part for part in (model, loss) if isinstance(part, nn.Module)]
            optimizer_state = OptimizerState(optimizer, self.device, [p for each in models for p in each.parameters()])
            graphs = Graphs(
                self._run,
                device=self.device,
                state=Together(ModelState(*models), optimizer_state, self._averages),
                recording=self._recording,
                warmup=warmup,
                limit=limit * min(accumulate, 3),  # the first, the middle and the last of a window differ
                make_graph=make_graph,
            )
            if cannot is not None:
                graphs.say(cannot)
            else:
                self._graphs, self._optimizer_state = graphs, optimizer_state
                optimizer_state.prepare()
        self._forget_gradients()

    def __repr__(self) -> str:
        how = "captured in CUDA graphs" if self._graphs is not None else "plain"
        parts = f"{type(unwrapped(self.model)).__name__}, {self.loss}, {type(self.optimizer).__name__}"
        options = f"clip={self.clip}, accumulate={self.accumulate}, autocast={self.autocast}"
        return f"TrainStep({parts}, {options}; {how} on {self.device})"

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Of the optimizer, also of groups that were added later."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def __call__(self, *args: Any, **kwargs: Any) -> StepOutput:
        """Train on one batch.

        Args:
            *args: passed to the loss after the model.
            **kwargs: passed to the loss. Tensors may change from call to call; every other value, such as a drop sampler,
                belongs to what is captured.
        """
        updates, captured = self.accumulated + 1 == self.accumulate, False
        if self._shadows is not None:
            self._shadows.refresh()
        try:
            if self._graphs is None or self._optimizer_state is None:
                result = self._run(*args, _filled=self._filled, _updates=updates, **kwargs)
            else:
                self._optimizer_state.prepare()
                result, captured = self._graphs(*args, _filled=self._filled, _updates=updates, **kwargs)
        except BaseException:
            self.accumulated = self._filled = 0
            self._forget_gradients()
            raise
        loss, norm, metrics, self._filled = result
        self.accumulated = 0 if updates else self.accumulated + 1
        if updates:
            self._filled = 0
            if captured:  # torch, and the copies of other steps, learn nothing from a replay
                torch.autograd.graph.increment_version(self.parameters)
            if self._shadows is not None:
                self._shadows.remember()
            self._forget_gradients()
            self._averages.after()
        return StepOutput(loss, norm, metrics, updates, captured)

    def refresh(self) -> None:
        """Say that weights were changed in a way that torch does not count: through `parameter.data`, or by a kernel.

        Only `sprint.AdamW` with autocast needs it, for its copies of the weights. Loading a state, or `copy_` under
        `torch.no_grad()`, is noticed; `EMAModel.copy_to` of diffusers is not.
        """
        if self._shadows is not None:
            self._shadows.refresh(always=True)

    def _run(self, *args: Any, _filled: int, _updates: bool, **kwargs: Any) -> tuple[Tensor, Tensor | None, dict, int]:
        """The whole step; this is what a graph captures."""
        parameters = self.parameters
        self._window.open(parameters, _filled)
        if self._shadows is not None:
            self._shadows.release()
        context = nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)
        with self._synchronised(_updates), self._shadows or nullcontext():  # also when checkpointing runs blocks again
            with context:
                output = self.loss(self.model, *args, **kwargs)
            loss = _scalar(output)
            (loss / self.accumulate).backward()
        filled = self._window.close(parameters, _filled)
        norm = None
        if _updates:
            norm = self._update(parameters)
            self._forget_gradients()  # within the graph, whose later part and whose successors then use their memory
        return loss.detach(), norm, _metrics(output), filled

    def _update(self, parameters: list[nn.Parameter]) -> Tensor | None:
        """Clip, update, average; returns the norm if clipped."""
        averages = self._averages
        if isinstance(self.optimizer, AdamW):
            copies = None if self._shadows is None else self._shadows.copies
            self.optimizer.step(clip=self.clip, averages=averages.following(), average_decay=averages.decay, shadows=copies)
            return None if self.clip is None else self.optimizer.grad_norm
        norm = None if self.clip is None else torch.nn.utils.clip_grad_norm_(parameters, self.clip)
        self.optimizer.step()
        averages.follow()
        return norm

    def _forget_gradients(self) -> None:
        self._window.clear(self.parameters)
        if self._shadows is not None:
            self._shadows.release()

    def _synchronised(self, updates: bool) -> AbstractContextManager[Any]:
        """Gradients are averaged over processes when they are complete."""
        if isinstance(self.model, DistributedDataParallel) and not updates:
            return self.model.no_sync()
        if hasattr(self.model, "set_requires_gradient_sync"):  # FSDP2
            self.model.set_requires_gradient_sync(updates)  # pyright: ignore[reportCallIssue]
        return nullcontext()

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Around a capture, which runs nothing: if it fails, states that Python made meanwhile were never filled."""
        had = {parameter for parameter, state in self.optimizer.state.items() if state}
        self._window.recording = True
        try:
            yield
        except BaseException:
            for parameter in [parameter for parameter in self.optimizer.state if parameter not in had]:
                del self.optimizer.state[parameter]
            for parameter in self.parameters:  # in the graph's memory
                parameter.grad = None
            if self._shadows is not None:
                self._shadows.release()
            raise
        finally:
            self._window.recording = False

    def _cannot(self) -> str | None:
        """Why this step cannot be captured, if so."""
        if isinstance(self.model, DistributedDataParallel):
            return "DistributedDataParallel reduces gradients from hooks of its own"
        if any(hasattr(parameter, "placements") for parameter in self.parameters):
            return "FSDP gathers parameters from hooks of its own"
        if any(parameter.device != self.device for parameter in self.parameters):
            return "the parameters are on several devices"
        return None


def _check_parts(model: Any, loss: Any, optimizer: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}: the model itself, not its parameters")
    if not callable(loss):
        raise TypeError(f"loss must be a function of the model and its batch, got {type(loss).__name__}")
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(f"optimizer must be one like torch.optim.AdamW(model.parameters()), got {type(optimizer).__name__}")
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if not trained:
        raise ValueError("the optimizer has no parameter that requires a gradient: pass model.parameters()")
    if set(trained).isdisjoint(model.parameters()):
        raise ValueError("the optimizer has no parameter of this model, which would not train: pass model.parameters()")


def _check_numbers(clip: Any, accumulate: Any, ema_decay: Any, autocast: Any) -> None:
    for name, value in (("clip", clip), ("ema_decay", ema_decay)):
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise TypeError(f"{name} must be a number, got {value!r}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip is the largest norm of the gradients, positive, got {clip}: None turns it off")
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise ValueError(f"accumulate must be at least 1 call per update, a whole number, got {accumulate!r}")
    if ema_decay is None or not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay must be in [0, 1), got {ema_decay}")
    check_autocast(autocast)
    if autocast == torch.float16:
        raise ValueError("float16 gradients vanish without loss scaling, which TrainStep has not: torch.bfloat16")


def _scalar(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", output)
    if not isinstance(loss, Tensor) or loss.ndim:
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        if isinstance(output, dict) and "loss" not in output:
            got = f"a dictionary with {', '.join(map(repr, output)) or 'nothing'}"
        raise TypeError(f"the loss function must return a scalar tensor, or an object with one as `loss`, got {got}")
    return loss


def _metrics(output: Any) -> dict[str, Tensor]:
    """Scalars beside the loss, of an object, a named tuple or a dictionary."""
    if isinstance(output, Tensor):
        return {}
    fields = output if isinstance(output, dict) else getattr(output, "__dict__", {})
    if isinstance(output, tuple) and hasattr(output, "_asdict"):
        fields = output._asdict()  # pyright: ignore[reportAttributeAccessIssue]
    return {
        name: value.detach()
        for name, value in fields.items()
        if name != "loss" and isinstance(value, Tensor) and not value.ndim
    }
