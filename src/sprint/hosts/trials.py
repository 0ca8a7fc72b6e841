"""The trials of `check`: what must hold of a wrapped model, each tried on the model and the inputs themselves.

Attention does not depend on the order of tokens once their positions travel with them. So keeping all tokens in a
random order for each sample must leave the full path's output as it is. A table that was forgotten, gathered twice or
gathered wrongly breaks that. And keeping some of them must give what the host itself gives with all of them, where its
attention sees the kept ones only: blocks that count their tokens, or number them, break that. Rows of a batch never mix,
and padded text is never seen.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from sprint.hosts.declare import Stream
from sprint.hosts.mechanism.masked import Masked
from sprint.hosts.mechanism.wrapped import Wrapped
from sprint.hosts.outputs import difference, tensors
from sprint.hosts.samples import Samples
from sprint.hosts.streams import Streams
from sprint.hosts.tried import Finding, generator
from sprint.middle.fusion import MaskRestore, SparseDenseResidual, TokenRouting
from sprint.middle.tokens import TokenSubset
from sprint.random import Device, uniform

ORDER, FEWER = "all tokens in any order = full", "fewer tokens = masked attention"
REACH = 1e-5  # share of the largest gradient from which on one counts
SMALL = 1e-2  # share of the largest gradient to which others are compared at least, for those that cancel to nothing
GRADIENTS = 100  # tolerances that gradients may be apart, which cancel more, but half of themselves at most


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


class Trials(Samples, Streams):
    """All trials of a wrapped model."""

    def middle_matters(self) -> bool:
        """Whether the output shows what the middle blocks do, well above the tolerance."""
        full = self.run("full")
        without = self._set("idle", "middle", "full")
        return difference(full, without) > min(10 * self.tolerance, 2 * self.tolerance + 0.01)

    def identity(self) -> Finding:
        """The full path is the host itself."""
        name = "full path = the host itself"
        full = self.run("full")
        kind = type(self.host)
        if kind.__mro__[1] is Wrapped:
            self.host.__class__ = kind.__mro__[2]
        try:
            host = self._set("bypassed", True, "full")
        finally:
            self.host.__class__ = kind
        passed = self._set("idle", "fusion", "full")
        if not passed.equal(host):
            detail = (
                f"relative difference {difference(host, passed):.1e}: does its forward ask for type(block), or use `is`?"
            )
            return Finding(name, False, f"{detail} Its blocks are stand-ins meanwhile: isinstance, or ==")
        apart = difference(host, full)
        if not _is_identity(self.host.sprint.fusion):  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
            return Finding(name, None, f"the fusion is not the identity (any more): relative difference {apart:.1e}")
        return Finding(name, full.equal(host), "bit by bit" if full.equal(host) else f"relative difference {apart:.1e}")

    def order(self) -> Finding:
        """Tokens may come in any order."""
        if any(place.unfolds for place, _ in self.state.places):
            return Finding(ORDER, None, "its blocks need tokens in grid order")
        if self.blind:
            return Finding(ORDER, None, "NOT PROVED: the output does not depend on what the middle blocks do")
        shuffled = _Shuffled(bool(getattr(self.state.drop, "shared", False)))
        full, reordered = self.run("full"), self.run("sparse", drop=shuffled, generator=generator(0))
        return self._compared(ORDER, full, reordered)

    def fewer(self) -> Finding | None:
        """Kept tokens alone, and all of them with attention masked to the kept ones."""
        if self.state.drop is None:
            return None
        reasons = {
            "NOT PROVED: its blocks need tokens in grid order": any(place.sides for place, _ in self.state.places),
            "NOT PROVED: the output does not depend on what the middle blocks do": self.blind,
        }
        for reason, holds in reasons.items():
            if holds:
                return Finding(FEWER, None, reason)
        sparse, apart, oracle = self.run("sparse", generator=generator(1)), math.inf, None
        # A joint attention may have either order, its queries may be of another stream than its keys, and an attention to a
        # text may have as many of both.
        for only, order, across in product((None, 0, 1), ("text+image", "image+text"), (False, True)):
            options = {"order": order, "across": across, "only": only}
            with self._masked(**options) as masked:
                expected = self.run("sparse", generator=generator(1))
            if masked.subset is not None and masked.subset.num_kept == masked.subset.num_tokens:
                return Finding(FEWER, None, f"NOT PROVED: the drop sampler keeps all {masked.subset.num_tokens} tokens")
            here, reached = difference(expected, sparse), masked.subset and len(masked.reached) == masked.blocks
            if (reached and not across and only is None) or here < self.tolerance:
                apart, oracle = min(apart, here), options
            if apart < self.tolerance:
                break
        if oracle is None:
            return Finding(
                FEWER,
                None,
                "NOT PROVED: attention goes through neither F.scaled_dot_product_attention nor a softmax over all tokens",
            )
        proved = apart < self.tolerance
        self.oracle = oracle if proved else None
        return Finding(FEWER, proved, f"relative difference {apart:.1e}, at most {self.tolerance:.0e}")

    @contextmanager
    def _masked(self, order: Stream, **options: Any) -> Iterator[Masked]:
        """Meanwhile, on the sparse path, all tokens run and attention is masked."""
        fastpath = torch.backends.mha.get_fastpath_enabled()
        self.state.masked = masked = Masked(order, **options)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield masked
        finally:
            self.state.masked = None
            torch.backends.mha.set_fastpath_enabled(fastpath)

    def outputs(self) -> Finding | None:
        """Features that the model returns from between its middle blocks have the kept tokens only, on the sparse path."""
        if self.state.drop is None:
            return None
        full, sparse = (tensors(self.call(name, self.args, self.kwargs)) for name in ("full", "sparse"))
        changed = [
            f"output {i}: {tuple(b.shape)}, full {tuple(a.shape)}"
            for i, (a, b) in enumerate(zip(full, sparse, strict=False))
            if a.shape != b.shape
        ]
        return Finding("outputs of kept tokens only", None, "; ".join(changed)) if changed else None

    def middle_calls(self) -> Finding:
        """The shallow path calls no middle block."""
        name, blocks = "shallow path skips the middle", [block for _, block in self._blocks()]
        if len({*blocks}) < len(blocks):
            return Finding(name, None, "some blocks are one and the same module, so that their calls cannot be told apart")
        calls = len(self._met("shallow"))
        return Finding(name, calls == 0, f"{calls} calls of {self.state.last - self.state.first + 1} middle blocks")

    def gradients(self) -> Finding:
        """Every parameter that learns on the full path learns on the sparse path, as it does with masked attention."""
        parameters = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        name = "sparse gradients reach parameters"
        if self.state.drop is None:
            return Finding(name, None, "wrapped without a drop sampler")
        if not parameters:
            return Finding(name, None, "no parameter requires gradients")

        own = [parameter for _, parameter in parameters]

        def of(path: str) -> list[Tensor]:
            options: dict[str, Any] = {} if path == "full" else {"generator": generator(1)}
            grads = gradients(lambda: self.run(path, **options).float().square().mean(), own)
            return [torch.zeros_like(p) if grad is None else grad for p, grad in zip(own, grads, strict=True)]

        full, sparse, apart = of("full"), of("sparse"), 0.0
        scale = max(float(grad.abs().max()) for grad in full)
        for (named, _), there, here in zip(parameters, full, sparse, strict=True):
            if not bool(here.isfinite().all()):
                return Finding(name, False, f"not finite for {named}")
            if float(there.abs().max()) > REACH * scale and not bool(here.any()):
                return Finding(name, False, f"none for {named}")
        if self.oracle is None or any("CheckpointWrapper" in type(module).__name__ for module in self.model.modules()):
            return Finding(name, True, f"{len(parameters)} parameters")
        with self._masked(**self.oracle):
            expected = of("sparse")
        scale = max(float(grad.abs().max()) for grad in expected)
        worst = ""
        for (named, _), there, here in zip(parameters, expected, sparse, strict=True):
            relative = float((here - there).abs().max()) / max(float(there.abs().max()), SMALL * scale, 1e-30)
            if not relative <= apart:
                apart, worst = relative, named
        limit = min(GRADIENTS * self.tolerance, 0.5)
        remark = f"{len(parameters)} parameters, apart from masked attention by {apart:.1e}, at most {limit:.0e}"
        return Finding(name, apart < limit, remark if apart < limit else f"{remark}, for {worst}")


def gradients(loss: Callable[[], Tensor], parameters: Sequence[nn.Parameter]) -> Sequence[Tensor | None]:
    """The gradients of a loss, which nothing keeps; None for parameters that it does not reach."""
    try:
        return torch.autograd.grad(loss(), parameters, allow_unused=True)
    except RuntimeError as error:
        if "reentrant" not in str(error):  # a checkpoint with use_reentrant=True works with backward alone
            raise
    before = [(parameter, parameter.grad) for parameter in parameters]
    hooks = [hook for parameter in parameters if (hook := parameter._post_accumulate_grad_hooks)]  # of an optimizer, say
    held = [dict(hook) for hook in hooks]
    for parameter in parameters:
        parameter.grad = None
    for hook in hooks:
        hook.clear()
    try:
        loss().backward()
        return [parameter.grad for parameter in parameters]
    finally:
        for parameter, grad in before:
            parameter.grad = grad
        for hook, own in zip(hooks, held, strict=True):
            hook.update(own)


def _is_identity(fusion: nn.Module) -> bool:
    """Whether the fusion hands all deep tokens on as they are."""
    if isinstance(fusion, TokenRouting | MaskRestore):
        return True  # by construction
    if not isinstance(fusion, SparseDenseResidual):
        return False  # an adapter's
    deep, *others = fusion.proj.weight.split(fusion.dim, dim=1)
    identity = torch.eye(fusion.dim, device=deep.device, dtype=deep.dtype)
    return deep.equal(identity) and not any(other.any() for other in (*others, fusion.proj.bias))
