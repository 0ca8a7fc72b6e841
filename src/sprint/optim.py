"""AdamW that clips, updates, averages and refreshes bfloat16 weights in one pass over memory.

    g <- g min(1, clip / |g|)
    m <- m + (1 - b1)(g - m),  v <- b2 v + (1 - b2) g^2
    p <- p - lr wd p - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)          (arXiv 1711.05101, algorithm 2)

At a batch of 64, an eighth of XL/2's step goes into passes over its 677 M parameters: casts of weights to bfloat16 and of
gradients back, the norm, the clipping, the update. Here gradients stay bfloat16 as autocast computed them, and whatever is
written at each step is written in the update's own pass.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sprint.fusion import SplitLinear


class AdamW(torch.optim.Optimizer):
    """AdamW for `TrainStep`; on a GPU with Triton its update is one kernel per parameter, elsewhere plain code.

    Its states are those of `torch.optim.AdamW`: state dictionaries fit both.

    Args:
        params: float32 parameters, or groups of them.
        lr: learning rate; a number, or a tensor that schedulers fill.
        betas: decays of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled.

    Examples:
        >>> model = nn.Linear(2, 1)
        >>> optimizer = AdamW(model.parameters(), lr=0.1)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step(clip=1.0)
        >>> float(optimizer.grad_norm) > 1
        True
    """

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
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dtype != torch.float32:
                    raise TypeError(f"parameters must be float32, got {parameter.dtype}: use autocast for fast products")
        self.shadows: Mapping[Tensor, Tensor] = {}
        """Copies of parameters in another dtype, refreshed by each step, and whose gradients count."""
        self.grad_norm: Tensor | None = None
        """Total norm of the gradients before clipping, of the last step that clipped."""

    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        closure: Callable[[], Any] | None = None,
        *,
        clip: float | None = None,
        averages: Mapping[Tensor, Tensor] | None = None,
        average_decay: float = 0.0,
    ) -> Any:
        """Update the parameters.

        Args:
            closure: computes the loss anew.
            clip: largest total norm of the gradients.
            averages: by parameter, a moving average that follows it.
            average_decay: of the averages.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        used = [(g, [(p, grad) for p in g["params"] if (grad := self._gradient(p)) is not None]) for g in self.param_groups]
        factor = torch.ones((), device=used[0][0]["params"][0].device)
        if clip is not None and any(pairs for _, pairs in used):
            self.grad_norm = _norm([grad for _, pairs in used for _, grad in pairs])
            factor = (clip / (self.grad_norm + 1e-6)).clamp(max=1.0)
        for group, pairs in used:
            if pairs:
                self._update(group, pairs, factor, averages or {}, average_decay)
        return loss

    def _gradient(self, parameter: Tensor) -> Tensor | None:
        shadow = self.shadows.get(parameter)
        return parameter.grad if shadow is None or shadow.grad is None else shadow.grad

    def _update(
        self,
        group: dict[str, Any],
        pairs: list[tuple[Tensor, Tensor]],
        factor: Tensor,
        averages: Mapping[Tensor, Tensor],
        average_decay: float,
    ) -> None:
        beta1, beta2 = group["betas"]
        count = self._count([parameter for parameter, _ in pairs])
        lr = torch.as_tensor(group["lr"], dtype=torch.float32, device=count.device)
        correction2 = (1 - beta2**count).sqrt()
        scalars = torch.stack([lr, factor.to(lr.dtype), 1 - beta1**count, correction2])
        apply = update if pairs[0][0].device.type == "cpu" else fastest()
        for parameter, gradient in pairs:
            state = self.state[parameter]
            apply(
                parameter,
                gradient,
                state["exp_avg"],
                state["exp_avg_sq"],
                shadow=self.shadows.get(parameter),
                average=averages.get(parameter),
                scalars=scalars,
                beta1=beta1,
                beta2=beta2,
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                average_decay=average_decay,
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of this class or of `torch.optim.AdamW`.

        Raises:
            ValueError: the parameters of one group have taken different numbers of steps.
        """
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            taken = {float(self.state[p]["step"]) for p in group["params"] if self.state[p]}
            if len(taken) > 1:
                raise ValueError(f"the parameters of one group have taken {sorted(taken)} steps: use torch.optim.AdamW")
            for parameter in group["params"]:
                if self.state[parameter]:
                    self.state[parameter]["step"] = self.state[parameter]["step"].to(parameter.device, torch.float32)

    def _count(self, parameters: list[Tensor]) -> Tensor:
        """Count this step for each of the parameters, which have all taken as many; returns the count."""
        known = [bool(self.state[parameter]) for parameter in parameters]
        if any(known) and not all(known):
            raise ValueError("a parameter got its first gradient after the others had theirs: use torch.optim.AdamW")
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                }
        counts = [self.state[parameter]["step"] for parameter in parameters]
        torch._foreach_add_(counts, 1)  # pyright: ignore[reportPrivateImportUsage]
        return counts[0]


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
        from sprint.kernels import adamw
    except ImportError:
        return update
    return adamw


def _norm(gradients: Iterable[Tensor]) -> Tensor:
    norms = torch._foreach_norm(list(gradients), 2, torch.float32)  # pyright: ignore[reportPrivateImportUsage]
    return torch.linalg.vector_norm(torch.stack(list(norms)))


class Shadows:
    """Copies of the weights of linear layers in autocast's dtype, which stand in for them while the model runs.

    Autocast would cast the same weights at every step, and their gradients back: the numbers are the same. Other parameters
    (norms, embeddings) stay as they are, as they do under autocast. After a weight was changed from outside (a checkpoint
    was loaded), the copies are made anew.

    Args:
        model: with float32 weights.
        dtype: of the copies.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.copies: dict[Tensor, Tensor] = {}
        self.places: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] = []
        for module in model.modules():
            if not isinstance(module, nn.Linear | SplitLinear):
                continue
            for name, parameter in module._parameters.items():
                if parameter is None or parameter.dtype != torch.float32:
                    continue
                if parameter not in self.copies:
                    copy = nn.Parameter(parameter.detach().to(dtype), requires_grad=parameter.requires_grad)
                    self.copies[parameter] = copy
                self.places.append((module, name, parameter, self.copies[parameter]))  # pyright: ignore[reportArgumentType]
        self.versions: list[int] = []
        self.remember()

    def __enter__(self) -> None:
        for module, name, _, copy in self.places:
            module._parameters[name] = copy

    def __exit__(self, *error: object) -> None:
        for module, name, parameter, _ in self.places:
            module._parameters[name] = parameter

    def remember(self) -> None:
        """The weights are now what their copies are of."""
        self.versions = [parameter._version for parameter in self.copies]

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy again if a weight was changed from outside."""
        if [parameter._version for parameter in self.copies] != self.versions:
            for parameter, copy in self.copies.items():
                copy.copy_(parameter)
            self.remember()

    def release(self) -> None:
        """Drop the copies' gradients."""
        for copy in self.copies.values():
            copy.grad = None
