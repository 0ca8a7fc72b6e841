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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from sprint.hosts.declare import Stream
from sprint.hosts.mechanism.holders import leaves
from sprint.hosts.mechanism.masked import Masked
from sprint.hosts.mechanism.state import SprintState
from sprint.hosts.mechanism.wrapped import Wrapped
from sprint.hosts.outputs import difference, tensors
from sprint.middle.drop import Drop
from sprint.middle.fusion import MaskRestore, SparseDenseResidual, TokenRouting
from sprint.middle.tokens import TokenSubset
from sprint.random import Device, uniform

ORDER, FEWER, IMAGE = "all tokens in any order = full", "fewer tokens = masked attention", "dropped tokens are the image's"
JUNK = 10.0  # standard deviation of what stands in padded text
REACH = 1e-5  # share of the largest gradient from which on one counts
SMALL = 1e-2  # share of the largest gradient to which others are compared at least, for those that cancel to nothing
GRADIENTS = 100  # tolerances that gradients may be apart, which cancel more, but half of themselves at most


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
        self.drop, self.subset = copy.copy(drop), fixed
        self.grid: tuple[int, ...] = ()

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
        blind: the output does not depend on what the middle blocks do.
        oracle: how attention had to be masked for the trial of fewer tokens, once it is proved.
    """

    model: nn.Module
    host: nn.Module
    state: SprintState
    call: Callable[..., Any]
    output: Callable[[Any], Tensor]
    args: tuple
    kwargs: dict[str, Any]
    tolerance: float
    blind: bool = False
    oracle: "dict[str, Any] | None" = None

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
        sparse, apart, oracle = self.run("sparse", generator=_generator(1)), math.inf, None
        # A joint attention may have either order, its queries may be of another stream than its keys, and an attention to a
        # text may have as many of both.
        for only, order, across in product((None, 0, 1), ("text+image", "image+text"), (False, True)):
            options = {"order": order, "across": across, "only": only}
            with self._masked(**options) as masked:
                expected = self.run("sparse", generator=_generator(1))
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

    def image(self) -> Finding:
        """What may be dropped is of the image, and stands where its grid says: another image changes each such token, and
        another pixel the token that it lies in."""
        x, drop = self._first(), self.state.drop
        if drop is None:
            return Finding(IMAGE, None, "wrapped without a drop sampler")
        if not all(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in tree_leaves(x)):
            return Finding(IMAGE, None, "NOT PROVED: the first argument is no image")
        draws = Draws(drop)
        self.run("sparse", drop=draws.drop)
        here, grid = self._captured(self._inputs_with(x)), draws.grid
        length, ends = math.prod(grid), self.state.host.always_kept == "first"
        part = slice(here.shape[1] - length, None) if ends else slice(0, length)

        def changed(image: Any) -> Tensor:
            return (self._captured(self._inputs_with(image)) != here).any(dim=-1)[:, part].all(dim=0)

        moved = changed(tree_map(lambda leaf: leaf + _noise(leaf), x))
        name = next(iter(self._named()))
        if not moved.any():
            return Finding(IMAGE, None, f"NOT PROVED: no token depends on {name!r}, the first argument")
        if not moved.all():
            numbers = ", ".join(map(str, (~moved).nonzero().flatten().tolist()[:5]))
            return Finding(
                IMAGE,
                False,
                f"{int((~moved).sum())} of {length} do not depend on {name!r} (token {numbers}, …): class tokens, "
                "registers, a text or a reference among them; correct stream=, image_tokens= or grid=",
            )
        if isinstance(x, Tensor) and x.ndim > 3 and self.state.host.grid is None and len(grid) > 1:
            corner = x.clone()
            corner[..., 0, -1] += 1
            moved, (*_, rows, columns) = changed(corner), grid
            ends = [columns - 1] if rows != columns else [columns - 1, (columns - 1) * rows]  # by rows, or by columns
            if not moved.all() and not any(moved[end] for end in ends):
                found = ", ".join(map(str, moved.nonzero().flatten().tolist()[:3]))
                return Finding(
                    IMAGE,
                    False,
                    f"the last pixel of the first row is not in token {ends[0]} of a grid {grid}, but in {found}",
                )
        return Finding(IMAGE, True, f"all {length} depend on {name!r}")

    def _captured(self, inputs: "Inputs") -> Tensor:
        """The image tokens that would enter the middle, had the encoder's blocks not mixed them."""
        captured: list[Tensor] = []
        hook = self.host.sprint.fusion.register_forward_pre_hook(  # pyright: ignore
            lambda module, args: captured.append(args[0].clone())
        )
        try:
            self._set("idle", "encoder", "shallow", inputs)
        finally:
            hook.remove()
        return captured[0]

    def _inputs_with(self, image: Any) -> "Inputs":
        """The inputs with another image."""
        first = self._first()
        return tree_map(
            lambda value: image if value is first else value, (self.args, self.kwargs), is_leaf=lambda value: value is first
        )

    def counts(self) -> Finding | None:
        """No argument of the blocks is how many tokens each sample has; None if so."""
        place, _ = next(pair for pair in reversed(self.state.places) if pair[1] <= self.state.first)
        found: list[str] = []

        def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
            named = place.named(args, kwargs)
            length = named[place.image].shape[1]
            for name, value in named.items():
                told = name in (place.image, place.blocks.text, *place.blocks.tables, *place.blocks.others, *place.sides)
                for leaf in () if told else leaves(value):
                    whole = isinstance(leaf, Tensor) and not leaf.is_floating_point() and leaf.ndim == 1
                    if whole and len(leaf) and bool((leaf == length).all()):
                        found.append(name)

        hook = self._first_block(place).register_forward_pre_hook(look, with_kwargs=True)
        try:
            self.run("full")
        finally:
            hook.remove()
        if self.state.drop is None or not found:
            return None
        return Finding(
            "no argument counts tokens", False, f"{found[0]!r} of the blocks is the number of all tokens: see others="
        )

    def _first_block(self, place: Any) -> nn.Module:
        blocks = self.host.get_submodule(place.blocks.name)
        return next(iter(blocks)) if isinstance(blocks, nn.ModuleList | nn.Sequential) else blocks

    def tokens(self) -> str:
        """What is dropped: image tokens, their grid, those that are kept."""
        if self.state.drop is None:
            return ""
        draws, length = Draws(self.state.drop), 0
        place, _ = next(pair for pair in reversed(self.state.places) if pair[1] <= self.state.first)

        def measure(module: nn.Module, args: tuple, kwargs: dict) -> None:
            nonlocal length
            length = place.named(args, kwargs)[place.image].shape[1]

        hook = self._first_block(place).register_forward_pre_hook(measure, with_kwargs=True)
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
        if batch < 1 or self.state.drop is None:
            return Finding(name, None, "NOT PROVED: no batch" if batch < 1 else "wrapped without a drop sampler")
        try:
            several = self._rows(batch if batch > 1 else 3)
            single = [self._rows(1, start=i) for i in range(batch)]
            fulls = [self.run("full", inputs) for inputs in single]
            full = self.run("full", several)
        except Exception as error:  # whatever the host raises
            return Finding(name, None, f"NOT PROVED: the host takes no other batch, {_text(error)}")
        batch = max(batch, 3) if batch == 1 else batch
        fulls, single = fulls * (batch // len(fulls)), single * (batch // len(single))
        if not self._same(full, torch.cat(fulls)):
            return Finding(name, None, "NOT PROVED: in the host itself, samples depend on their batch")
        draws, kept = Draws(self.state.drop), []
        sparse = self.run("sparse", several, drop=draws.drop, generator=_generator(2))
        if draws.subset is None:
            return Finding(name, None, "NOT PROVED: nothing was drawn")
        for i, inputs in enumerate(single):
            only = Draws(self.state.drop, TokenSubset(draws.subset.keep[i : i + 1], draws.subset.num_tokens))
            kept.append(self.run("sparse", inputs, drop=only.drop))
        return self._compared(name, torch.cat([full, sparse]), torch.cat([*fulls, *kept]))

    def halves(self) -> Finding:
        """Both branches of guidance in one batch are what they are apart, in batches of several sizes."""
        found = [self._halves(size) for size in sorted({self._batch(), 1, 2, 3} - {0})]
        worst = [finding for finding in found if finding.ok is False]
        own = found[sorted({self._batch(), 1, 2, 3} - {0}).index(self._batch())] if self._batch() else found[0]
        return (worst or [own])[0]

    def _halves(self, batch: int) -> Finding:
        name, mine = "a guided batch = its two halves", self._rows(batch)
        other = self._inputs(
            lambda value: value.roll(1, 0) if isinstance(value, Tensor) else value[1:] + value[:1], image=False, of=mine
        )
        both = self._inputs(_twice, others=other, of=mine)
        try:
            strong, weak, control = self.run("full", mine), self.run("shallow", other), self.run("full", both)
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
            return Finding(name, False, f"{2 * batch} rows: {_text(error)}")
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
        """Every parameter that learns on the full path learns on the sparse path, as it does with masked attention."""
        parameters = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        name = "sparse gradients reach parameters"
        if self.state.drop is None:
            return Finding(name, None, "wrapped without a drop sampler")
        if not parameters:
            return Finding(name, None, "no parameter requires gradients")

        own = [parameter for _, parameter in parameters]

        def of(path: str) -> list[Tensor]:
            options: dict[str, Any] = {} if path == "full" else {"generator": _generator(1)}
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

    def _same(self, one: Tensor, other: Tensor) -> bool:
        return one.shape == other.shape and difference(one, other) < self.tolerance

    def _compared(self, name: str, one: Tensor, other: Tensor) -> Finding:
        apart = difference(one, other)
        return Finding(name, apart < self.tolerance, f"relative difference {apart:.1e}, at most {self.tolerance:.0e}")

    def _named(self) -> dict[str, Any]:
        return self.state.arguments(self.args, self.kwargs)

    def _first(self) -> Any:
        """The image: the first argument by the signature of forward."""
        return next(iter(self._named().values()), None)

    def _batch(self) -> int:
        return _length(self._first())

    def _rows(self, count: int, *, start: int = 0) -> "Inputs":
        """The inputs of so many samples, from one on, and again from the first."""
        batch = max(self._batch(), 1)
        places = [(start + i) % batch for i in range(count)]
        if places == [*range(batch)]:
            return self.args, self.kwargs
        return self._inputs(lambda x: x[places] if isinstance(x, Tensor) else [x[i] for i in places])

    def _inputs(
        self, change: Callable[..., Any], *, image: bool = True, others: "Inputs | None" = None, of: "Inputs | None" = None
    ) -> "Inputs":
        """The inputs, or those given, with a change of whatever has a row for each sample, of the image too or not; or a
        change of these and of `others`."""
        inputs = of or (self.args, self.kwargs)
        first = next(iter(self.state.arguments(*inputs).values()), None)
        batch = _length(first)

        def rows(value: Any) -> bool:
            return (
                isinstance(value, (Tensor, list))
                and not (isinstance(value, Tensor) and not value.ndim)
                and len(value) == batch
            )

        def changed(value: Any, *other: Any) -> Any:
            return change(value, *other) if rows(value) and (image or value is not first) else value

        return tree_map(changed, inputs, *([] if others is None else [others]), is_leaf=rows)


def _length(x: Any) -> int:
    return len(x) if isinstance(x, (list, tuple)) or (isinstance(x, Tensor) and x.ndim) else 0


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
