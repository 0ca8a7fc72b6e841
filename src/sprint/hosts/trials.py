"""The trials of `check`: what must hold of a wrapped model, each tried on the model and the inputs themselves.

Attention does not depend on the order of tokens once their positions travel with them. So keeping all tokens in a
random order for each sample must leave the full path's output as it is. A table that was forgotten, gathered twice or
gathered wrongly breaks that. And keeping some of them must give what the host itself gives with all of them, where its
attention sees the kept ones only: blocks that count their tokens, or number them, break that. Rows of a batch never mix,
and padded text is never seen.
"""

import copy
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from sprint.hosts.declare import Stream
from sprint.hosts.mechanism.masked import Masked
from sprint.hosts.mechanism.state import SprintState
from sprint.hosts.outputs import difference, tensors
from sprint.middle.drop import Drop
from sprint.middle.fusion import MaskRestore, SparseDenseResidual, TokenRouting
from sprint.middle.tokens import TokenSubset
from sprint.random import Device, uniform

ORDER, FEWER = "all tokens in any order = full", "fewer tokens = masked attention"
JUNK = 10.0  # standard deviation of what stands in padded text


@dataclass(frozen=True)
class Finding:
    """One line of a report."""

    name: str
    ok: bool | None
    """None: does not apply to this model, or was not proved."""
    detail: str


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


class Draws:
    """A drop sampler like another one, that notes what was drawn, or draws what was noted.

    Args:
        drop: the other one; a copy of it is used, since a route asks for more than `sample`.
        fixed: what is drawn.
    """

    def __init__(self, drop: Drop, fixed: TokenSubset | None = None) -> None:
        self.drop, self.subset, self.grid = copy.copy(drop), fixed, ()

        def sample(batch: int, grid: Sequence[int], **options: Any) -> TokenSubset:
            self.grid = tuple(grid)
            self.subset = fixed if fixed is not None else drop.sample(batch, grid, **options)
            return self.subset

        object.__setattr__(self.drop, "sample", sample)


@dataclass
class Trials:
    """A wrapped model, and the inputs that it is tried with.

    Args:
        model: as the user has it.
        host: the wrapped model inside.
        state: what `wrap` added.
        call: of the model, on the path that is chosen.
        output: takes the prediction out of what it returns.
        args: its arguments by position.
        kwargs: and by name.
        tolerance: largest difference relative to the largest output.
        perturbed: the parameters are not the model's own, which would show nothing.
        blind: nor do these.
    """

    model: nn.Module
    host: nn.Module
    state: SprintState
    call: Callable[..., Any]
    output: Callable[[Any], Tensor]
    args: tuple
    kwargs: dict[str, Any]
    tolerance: float
    perturbed: bool = False
    blind: bool = False

    def run(self, name: str, inputs: "Inputs | None" = None, **route: Any) -> Tensor:
        """The prediction on a path, with the user's inputs or others."""
        args, kwargs = inputs or (self.args, self.kwargs)
        return self.output(self.call(name, args, kwargs, **route))

    def _set(self, name: str, value: Any, path: str, inputs: "Inputs | None" = None) -> Tensor:
        """The prediction with one attribute of the state set meanwhile."""
        before = getattr(self.state, name)
        setattr(self.state, name, value)
        try:
            return self.run(path, inputs)
        finally:
            setattr(self.state, name, before)

    def middle_matters(self) -> bool:
        """Whether the output shows what the middle blocks do, well above the tolerance."""
        full = self.run("full")
        without = self._set("idle", "middle", "full")
        return difference(full, without) > 10 * self.tolerance

    def identity(self) -> Finding:
        """The full path is the host itself."""
        name = "full path = the host itself"
        full = self.run("full")
        host = self._set("bypassed", True, "full")
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
        full, reordered = self.run("full"), self.run("sparse", drop=shuffled, generator=_generator(0))
        return self._compared(ORDER, full, reordered, ", parameters perturbed" if self.perturbed else "")

    def fewer(self) -> Finding:
        """Kept tokens alone, and all of them with attention masked to the kept ones."""
        reasons = {
            "wrapped without a drop sampler": self.state.drop is None,
            "NOT PROVED: its blocks need tokens in grid order": any(place.sides for place, _ in self.state.places),
            "NOT PROVED: the output does not depend on what the middle blocks do": self.blind,
        }
        for reason, holds in reasons.items():
            if holds:
                return Finding(FEWER, None, reason)
        sparse, apart, proved = self.run("sparse", generator=_generator(1)), math.inf, False
        # A joint attention may have either order, and its queries may be of another stream than its keys.
        for order, across in product(("text+image", "image+text"), (False, True)):
            expected, masked = self._masked(order, across=across)
            if masked.subset is None or masked.attentions < masked.blocks:
                continue
            if masked.subset.num_kept == masked.subset.num_tokens:
                return Finding(FEWER, None, f"NOT PROVED: the drop sampler keeps all {masked.subset.num_tokens} tokens")
            here = difference(expected, sparse)
            if not across or here < self.tolerance:
                apart, proved = min(apart, here), True
            if apart < self.tolerance:
                break
        if not proved:
            return Finding(FEWER, None, "NOT PROVED: attention does not go through F.scaled_dot_product_attention")
        return Finding(FEWER, apart < self.tolerance, f"relative difference {apart:.1e}, at most {self.tolerance:.0e}")

    def _masked(self, order: Stream, *, across: bool) -> tuple[Tensor, Masked]:
        """What the host gives on the sparse path when all tokens run and attention is masked, for the same draw."""
        fastpath = torch.backends.mha.get_fastpath_enabled()
        self.state.masked = masked = Masked(order, across=across)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            return self.run("sparse", generator=_generator(1)), masked
        finally:
            self.state.masked = None
            torch.backends.mha.set_fastpath_enabled(fastpath)

    def tokens(self) -> str:
        """What is dropped: image tokens, their grid, those that are kept."""
        if self.state.drop is None:
            return ""
        draws, length = Draws(self.state.drop), 0
        place, _ = next(pair for pair in reversed(self.state.places) if pair[1] <= self.state.first)

        def measure(module: nn.Module, args: tuple, kwargs: dict) -> None:
            nonlocal length
            length = place.named(args, kwargs)[place.image].shape[1]

        blocks = self.host.get_submodule(place.blocks.name)
        block = next(iter(blocks)) if isinstance(blocks, nn.ModuleList | nn.Sequential) else blocks
        hook = block.register_forward_pre_hook(measure, with_kwargs=True)
        try:
            self.run("full")
            self.run("sparse", drop=draws.drop)
        finally:
            hook.remove()
        if draws.subset is None:
            return ""
        drawn, grid = draws.subset.num_tokens, "x".join(map(str, draws.grid))
        stream = "" if length == drawn else f" of {length}"
        kept = draws.subset.num_kept
        return f"image tokens {drawn}{stream}, grid {grid}, kept {kept} ({100 * kept / drawn:.3g} %)"

    def alone(self) -> Finding:
        """A sample gives alone what it gives in its batch."""
        name, batch = "samples alone = in their batch", self._batch()
        if batch < 2 or self.state.drop is None:
            return Finding(name, None, "a batch of one" if batch < 2 else "wrapped without a drop sampler")
        draws = Draws(self.state.drop)
        full, sparse = self.run("full"), self.run("sparse", drop=draws.drop, generator=_generator(2))
        if draws.subset is None or len(full) != batch:
            return Finding(name, None, "NOT PROVED: its output has no row for each sample")
        whole, kept = torch.cat([full, sparse]), []
        try:
            single = [self._inputs(lambda value, i=i: value[i : i + 1]) for i in range(batch)]
            fulls = torch.cat([self.run("full", inputs) for inputs in single])
        except Exception as error:  # whatever the host raises
            return Finding(name, None, f"NOT PROVED: the host takes no single sample, {_text(error)}")
        if not self._same(full, fulls):
            return Finding(name, None, "NOT PROVED: in the host itself, samples depend on their batch")
        for i, inputs in enumerate(single):
            only = Draws(self.state.drop, TokenSubset(draws.subset.keep[i : i + 1], draws.subset.num_tokens))
            kept.append(self.run("sparse", inputs, drop=only.drop))
        return self._compared(name, whole, torch.cat([fulls, *kept]))

    def halves(self) -> Finding:
        """Both branches of guidance in one batch are what they are apart."""
        name, batch = "a guided batch = its two halves", self._batch()
        other = self._inputs(
            lambda value: value.roll(1, 0) if isinstance(value, Tensor) else value[1:] + value[:1], image=False
        )
        both = self._inputs(_twice, others=other)
        try:
            strong, weak, control = self.run("full"), self.run("shallow", other), self.run("full", both)
            control_weak = self.run("full", other)
        except Exception as error:  # whatever the host raises
            return Finding(name, None, f"NOT PROVED: the host takes no batch twice as large, {_text(error)}")
        if len(strong) != batch or not self._same(torch.cat([strong, control_weak]), control):
            return Finding(name, None, "NOT PROVED: in the host itself, samples depend on their batch")
        try:
            guided = self._set("weak_half", "second", "full", both)
        except ValueError as error:
            return Finding(name, None, f"refused: {_text(error)}")
        except RuntimeError as error:
            return Finding(name, False, _text(error))
        return self._compared(name, torch.cat([strong, weak]), guided)

    def padding(self) -> Finding | None:
        """Padded text is not seen with fewer tokens if it is not seen with all; None without a mask of text."""
        name, batch = "padded text is not seen", self._batch()
        image, named = self._first(), self._named()
        leaves = [(key, leaf) for key, value in named.items() for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        masks = [leaf for key, leaf in leaves if re.search("mask", key) and leaf.ndim == 2 and len(leaf) == batch]
        pairs = [
            (mask, text)
            for mask in masks
            for _, text in leaves
            if text.ndim == 3 and text.is_floating_point() and text.shape[:2] == mask.shape and text is not image
        ]
        if not pairs or self.state.drop is None:
            return None
        padded = {id(mask): mask.clone() for mask, _ in pairs}
        for mask in padded.values():
            if mask.shape[1] > 1 and bool(mask.bool().all()):
                mask[0, -1] = 0
        junk = {id(text): text + JUNK * _noise(text) * ~padded[id(mask)].bool()[..., None] for mask, text in pairs}

        def inputs(replaced: dict[int, Tensor]) -> Inputs:
            return tree_map(lambda value: replaced.get(id(value), value), (self.args, self.kwargs))

        clean, spoilt = inputs(padded), inputs(padded | junk)
        if not self._same(self.run("full", clean), self.run("full", spoilt)):
            return Finding(name, None, "the host itself sees it")
        sparse = [self.run("sparse", each, generator=_generator(3)) for each in (clean, spoilt)]
        return self._compared(name, sparse[0], sparse[1])

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
        calls, hooks, index = 0, [], 0
        seen: set[nn.Module] = set()

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        for place, _ in self.state.places:
            blocks = self.host.get_submodule(place.blocks.name)
            for block in blocks if isinstance(blocks, nn.ModuleList | nn.Sequential) else [blocks]:
                if self.state.first <= index <= self.state.last:
                    hooks.append(block.register_forward_hook(count))
                seen.add(block)
                index += 1
        name = "shallow path skips the middle"
        try:
            if len(seen) < index:
                return Finding(
                    name, None, "some blocks are one and the same module, so that their calls cannot be told apart"
                )
            self.run("shallow")
        finally:
            for hook in hooks:
                hook.remove()
        return Finding(name, calls == 0, f"{calls} calls of {len(hooks)} middle blocks")

    def gradients(self) -> Finding:
        """Every parameter that learns on the full path learns on the sparse path."""
        parameters = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        name = "sparse gradients reach parameters"
        if self.state.drop is None:
            return Finding(name, None, "wrapped without a drop sampler")
        if not parameters:
            return Finding(name, None, "no parameter requires gradients")

        def reached(path: str) -> set[str]:
            grads = gradients(lambda: self.run(path).float().square().mean(), [p for _, p in parameters])
            return {name for (name, _), grad in zip(parameters, grads, strict=True) if grad is not None}

        missing = sorted(reached("full") - reached("sparse"))
        return Finding(
            name, not missing, f"none for {', '.join(missing[:3])}" if missing else f"{len(parameters)} parameters"
        )

    def _same(self, one: Tensor, other: Tensor) -> bool:
        return one.shape == other.shape and difference(one, other) < self.tolerance

    def _compared(self, name: str, one: Tensor, other: Tensor, remark: str = "") -> Finding:
        apart = difference(one, other)
        return Finding(
            name, apart < self.tolerance, f"relative difference {apart:.1e}, at most {self.tolerance:.0e}{remark}"
        )

    def _named(self) -> dict[str, Any]:
        return self.state.arguments(self.args, self.kwargs)

    def _first(self) -> Any:
        """The image: the first argument by the signature of forward."""
        return next(iter(self._named().values()), None)

    def _batch(self) -> int:
        first = self._first()
        return len(first) if isinstance(first, (list, tuple)) or (isinstance(first, Tensor) and first.ndim) else 0

    def _inputs(self, change: Callable[..., Any], *, image: bool = True, others: "Inputs | None" = None) -> "Inputs":
        """The inputs with a change of whatever has a row for each sample, of the image too or not; or a change of these and
        of `others`."""
        batch, first = self._batch(), self._first()

        def rows(value: Any) -> bool:
            return (
                isinstance(value, (Tensor, list))
                and not (isinstance(value, Tensor) and not value.ndim)
                and len(value) == batch
            )

        def changed(value: Any, *other: Any) -> Any:
            return change(value, *other) if rows(value) and (image or value is not first) else value

        inputs = (self.args, self.kwargs)
        return tree_map(changed, inputs, *([] if others is None else [others]), is_leaf=rows)


Inputs = tuple[tuple, dict[str, Any]]


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


def _twice(value: Any, other: Any) -> Any:
    return torch.cat([value, other]) if isinstance(value, Tensor) else value + other


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _noise(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=_generator(4)).to(like)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _is_identity(fusion: nn.Module) -> bool:
    """Whether the fusion hands all deep tokens on as they are."""
    if isinstance(fusion, TokenRouting | MaskRestore):
        return True  # by construction
    if not isinstance(fusion, SparseDenseResidual):
        return False  # an adapter's
    deep, *others = fusion.proj.weight.split(fusion.dim, dim=1)
    identity = torch.eye(fusion.dim, device=deep.device, dtype=deep.dtype)
    return deep.equal(identity) and not any(other.any() for other in (*others, fusion.proj.bias))
