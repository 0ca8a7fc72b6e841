"""AdamW that clips, updates, averages and refreshes bfloat16 weights in one pass over memory.

    g <- g min(1, clip / |g|)
    m <- m + (1 - b1)(g - m),  v <- b2 v + (1 - b2) g^2
    p <- p - lr wd p - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)          (arXiv 1711.05101, algorithm 2)

At a batch of 64, an eighth of XL/2's step goes into passes over its 677 M parameters: casts of weights to bfloat16 and of
gradients back, the norm, the clipping, the update. Here gradients stay bfloat16 as autocast computed them, and whatever is
written at each step is written in the update's own pass.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sprint.arguments import checked


@checked
class AdamW(torch.optim.Optimizer):
    """AdamW for `TrainStep`; on a GPU with Triton its update is one kernel per parameter, elsewhere plain code.

    Its states are those of `torch.optim.AdamW`: state dictionaries fit both. A parameter without a gradient stays as it is.

    Args:
        params: float32 parameters, or groups of them.
        lr: learning rate; a number, or a tensor that schedulers fill.
        betas: decays of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled.

    Examples:
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = AdamW(model.parameters(), lr=0.1)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step(clip=1.0)
        >>> float(optimizer.grad_norm) > 1
        True
    """

    grad_norm: Tensor | None = None
    """Total norm of the gradients before clipping, of the last step that clipped."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        if float(lr) < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                f"lr, eps and weight_decay must not be negative and betas in [0, 1), got lr={lr}, eps={eps}, "
                f"weight_decay={weight_decay}, betas={betas}"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; parameters must be float32."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dtype != torch.float32:
                self.param_groups.pop()
                raise TypeError(f"parameters must be float32, got {parameter.dtype}: use autocast for fast products")

    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        closure: Callable[[], Any] | None = None,
        *,
        clip: float | None = None,
        averages: Mapping[Tensor, Tensor] | None = None,
        average_decay: float = 0.0,
        shadows: Mapping[Tensor, Tensor] | None = None,
    ) -> Any:
        """Update the parameters.

        Args:
            closure: computes the loss anew.
            clip: largest total norm of the gradients.
            averages: by parameter, a moving average that follows it.
            average_decay: of the averages.
            shadows: by parameter, a copy in another dtype, which is kept equal and whose gradient counts too.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        averages, shadows = averages or {}, shadows or {}
        gradients = {
            parameter: gradient
            for group in self.param_groups
            for parameter in group["params"]
            if (gradient := _gradient(parameter, shadows.get(parameter))) is not None
        }
        factor = None
        if clip is not None and gradients:
            self.grad_norm = _norm(list(gradients.values()))
            factor = (clip / (self.grad_norm + 1e-6)).clamp(max=1.0)
        for group in self.param_groups:
            for device in dict.fromkeys(parameter.device for parameter in group["params"]):
                used = [p for p in group["params"] if p in gradients and p.device == device]
                if used:
                    scalars = self._scalars(group, used, device, factor)
                    self._update(
                        group, used, gradients, scalars, averages=averages, average_decay=average_decay, shadows=shadows
                    )
        if still := [parameter for parameter in averages if parameter not in gradients]:
            torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
                [averages[parameter] for parameter in still], [parameter.data for parameter in still], 1 - average_decay
            )
        return loss

    def _update(
        self,
        group: dict[str, Any],
        used: list[Tensor],
        gradients: Mapping[Tensor, Tensor],
        scalars: Sequence[Tensor],
        *,
        averages: Mapping[Tensor, Tensor],
        average_decay: float,
        shadows: Mapping[Tensor, Tensor],
    ) -> None:
        beta1, beta2 = group["betas"]
        for parameter, row in zip(used, scalars, strict=True):
            state, shadow, average = self.state[parameter], shadows.get(parameter), averages.get(parameter)
            gradient, m, v = gradients[parameter], state["exp_avg"], state["exp_avg_sq"]
            fast = parameter.is_cuda and alike(parameter, (gradient, m, v, shadow, average))
            apply = fastest() if fast else update
            apply(
                parameter,
                gradient,
                m,
                v,
                shadow=shadow,
                average=average,
                scalars=row,
                beta1=beta1,
                beta2=beta2,
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                average_decay=average_decay,
            )
        torch.autograd.graph.increment_version(used)  # of which a kernel tells torch nothing

    def _scalars(
        self, group: dict[str, Any], used: list[Tensor], device: torch.device, factor: Tensor | None
    ) -> Sequence[Tensor]:
        """Count this step for each of the parameters; returns for each what `update` takes, computed for all at once."""
        counts = []
        for parameter in used:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), device=device)
                state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            counts.append(state["step"])
        torch._foreach_add_(counts, 1)  # pyright: ignore[reportPrivateImportUsage]
        taken = torch.stack(counts).double()  # 1 - b2^t has few digits left in float32 at first
        beta1, beta2 = group["betas"]
        lr = group["lr"]
        if not isinstance(lr, Tensor) or lr.device != device:
            lr = torch.full((), float(lr), device=device)  # unlike torch.tensor it does not wait for the device
        factor = torch.ones((), device=device) if factor is None else factor.to(device)
        columns = [lr.expand_as(taken), factor.expand_as(taken), 1 - beta1**taken, (1 - beta2**taken).sqrt()]
        return torch.stack([column.float() for column in columns], dim=1).unbind()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of this class or of `torch.optim.AdamW`."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for parameter in group["params"]:
                if state := self.state.get(parameter):
                    state["step"] = torch.as_tensor(state["step"]).to(parameter.device, torch.float32)


def update(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    shadow: Tensor | None,
    average: Tensor | None,
    scalars: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    average_decay: float,
) -> None:
    """One parameter's update, in plain code.

    Args:
        parameter: float32, any shape; changed in place, as are the next two, shadow and average.
        gradient: of its shape, any dtype.
        exp_avg: first moment m.
        exp_avg_sq: second moment v.
        shadow: copy of the parameter in another dtype.
        average: moving average of the parameter.
        scalars: (4,) float32: learning rate, factor of the gradient, 1 - b1^t, sqrt(1 - b2^t).
        beta1: decay of m.
        beta2: decay of v.
        eps: added to the denominator.
        weight_decay: decoupled.
        average_decay: of the average.
    """
    lr, factor, correction1, correction2 = scalars.unbind()
    g = gradient.to(parameter.dtype) * factor
    exp_avg.lerp_(g, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    parameter.sub_(lr * weight_decay * parameter)
    parameter.sub_(lr / correction1 * exp_avg / (exp_avg_sq.sqrt() / correction2 + eps))
    if shadow is not None:
        shadow.detach().copy_(parameter)
    if average is not None:
        average.lerp_(parameter, 1 - average_decay)


@functools.cache
def fastest() -> Callable[..., None]:
    """The Triton kernel where Triton is installed, else the plain update."""
    try:
        from sprint.kernels.adamw import adamw
    except ImportError:
        return update
    return adamw


def alike(parameter: Tensor, others: Sequence[Tensor | None]) -> bool:
    """Whether the kernel may go through all of them in the order of memory: dense, and laid out in the same way."""
    given = [other for other in others if other is not None]
    if all(tensor.is_contiguous() for tensor in (parameter, *given)):
        return all(other.device == parameter.device for other in given)
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(parameter.ndim)
    return last is not None and all(
        tensor.is_contiguous(memory_format=last) and tensor.device == parameter.device for tensor in (parameter, *given)
    )


def _gradient(parameter: Tensor, shadow: Tensor | None) -> Tensor | None:
    if shadow is None or shadow.grad is None:
        return parameter.grad
    # Both, where the loss reaches the weight itself too (a penalty on weights).
    return shadow.grad if parameter.grad is None else parameter.grad + shadow.grad


def _norm(gradients: list[Tensor]) -> Tensor:
    norms = torch._foreach_norm(gradients, 2, torch.float32)  # pyright: ignore[reportPrivateImportUsage]
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
