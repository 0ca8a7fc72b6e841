"""The route of one forward pass through a wrapped model: what is captured, dropped, restored and fused, and where.

While the model's own `forward` runs, its block lists yield `Bound` blocks. The first middle block captures the
encoder's tokens and draws the subset, every middle block sees the kept tokens and their table rows, and the exit of the
last one restores and fuses. A route belongs to one call: a checkpointed recomputation finds the subset that its own
forward pass drew.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sprint.drop import Drop, StructuredDrop
from sprint.hosts.declare import Arguments, Stream
from sprint.hosts.places import Place
from sprint.hosts.tables import gather_rows
from sprint.random import uniform
from sprint.tokens import TokenSubset

if TYPE_CHECKING:
    from sprint.hosts.wrapping import SprintState


class Bound:
    """A block on its route: called like the block, and otherwise the block itself."""

    def __init__(self, block: nn.Module, place: Place, index: int, route: "Route") -> None:
        self.block, self.place, self.index, self.route = block, place, index, route

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.route.step(self, self.block, args, kwargs)

    def checkpointed(self, recompute: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """The step with only the block itself inside the checkpoint; what is drawn and captured stays outside."""
        return self.route.step(self, partial(recompute, self.block), args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)


class Route:
    """One call's path through the model; see the module."""

    def __init__(self, state: "SprintState", model: nn.Module, arguments: Arguments) -> None:
        self.state, self.model, self.arguments = state, model, arguments
        self.path, self.subset, self.drop, self.generator = state.route
        self.num_tokens: int | None = None  # N, of the image
        self.length = 0  # of the image stream now: N, or K inside the middle
        self.shallow: Tensor | None = None
        self.text: Tensor | None = None
        self.dropped: Tensor | None = None
        self.tables: dict[str, tuple[Any, Any]] = {}
        self.order: Tensor | None = None  # (B, L), where captions differ in length: text first, then the image
        self.strong: slice | None = None  # rows that run the middle, when one half of the batch takes the shallow path
        self.fused = False
        self.reached = -1  # index of the last block called
        self.finished = False  # the forward pass is over: what is called now is recomputed for the backward pass
        self.single: dict[str, tuple[Place, int]] = {}  # runs of a single block, by attribute
        self._refuse()

    def step(self, bound: Bound, block: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """Call one block of the model."""
        place, first, last = bound.place, self.state.first, self.state.last
        if self.state.checkpoint and torch.is_grad_enabled():
            block = partial(checkpoint, block, use_reentrant=False)
        named = place.named(args, kwargs)
        self._in_order(bound.index)
        if self.num_tokens is None:
            self.num_tokens = self.length = self._count(place, named[place.image])
        if not first <= bound.index <= last:
            return block(*args, **kwargs)
        if bound.index == first:
            self._enter(place, named)
        if self.path == "shallow":
            names = {"image": place.image, "text": str(place.blocks.text)}
            passed = [named[names[part]] for part in place.blocks.returns]
            output = tuple(passed) if len(passed) > 1 else passed[0]
        else:
            if self.strong is not None:
                self._take_strong(place, named)
            if self.path == "sparse":
                self._gather(place, named, entering=bound.index == first)
            output = place.call(block, named, args, kwargs)
        return self._leave(place, output) if bound.index == last else output

    def _in_order(self, index: int) -> None:
        if self.finished:
            return
        if index <= self.reached:
            raise RuntimeError(
                f"{type(self.model).__name__} called block {index} after block {self.reached}: its blocks must run once "
                "and in the order of the list (or of the declaration)"
            )
        self.reached = index

    def _refuse(self) -> None:
        """What cannot work with fewer tokens raises before anything runs."""
        if self.path == "full":
            return
        for name, reason in self.state.host.refused.items():
            if self.arguments.get(name) is not None:
                raise ValueError(
                    f"{name} cannot be given on the {self.path} path, {reason}: leave it out, or use the full path"
                )
        if self.path == "sparse" and getattr(self.model, "_parallel_config", None) is not None:
            raise ValueError(
                "context parallelism splits the tokens before they can be dropped: turn it off on the sparse path"
            )

    def _count(self, place: Place, tokens: Tensor) -> int:
        if self.state.host.image_tokens is not None:
            return self.state.host.image_tokens(self.model, self.arguments, tokens.shape[1])
        return tokens.shape[1]

    def _enter(self, place: Place, named: dict[str, Any]) -> None:
        """Capture the encoder's tokens, and draw; a recomputation draws again, for the random stream, and discards."""
        self.length = self.num_tokens or 0  # a recomputation runs backwards, and left the length of the middle
        if self.state.host.image_starts is not None and self.order is None:
            self.order = self._text_then_image(named[place.image].shape[1])
        image, text = self._split(place.blocks.stream, self._sorted(named[place.image]))
        if place.blocks.text is not None:
            text = named[place.blocks.text]
        subset, dropped = self.subset, None
        if self.path == "sparse" and (self.drop is not None):
            subset = self._draw(self.drop, image)
        if self.path != "shallow" and self.state.training and self.state.path_drop > 0:
            dropped = uniform((len(image),), device=image.device, generator=self.generator) < self.state.path_drop
        if self.shallow is not None:
            return
        self._split_batch(len(image))
        self.shallow, self.text, self.dropped = image, text, dropped
        if subset is not None:
            self.subset = self._in_cells(subset) if place.blocks.sides else subset

    def _gather(self, place: Place, named: dict[str, Any], *, entering: bool) -> None:
        """Reduce the tokens (at the first block), and every table, to the kept ones."""
        assert self.subset is not None
        if not self.state.declared:
            self._refuse_undeclared(place, named)
        if entering:
            image, text = self._split(place.blocks.stream, self._sorted(named[place.image]))
            named[place.image] = self._join(place.blocks.stream, self.subset.gather(image), text)
        self.length = self.subset.num_kept
        for name, table in place.blocks.tables.items():
            value = named.get(name)
            if value is None:
                continue
            if name not in self.tables or self.tables[name][0] is not value:
                shared = bool(getattr(self.drop, "shared", False))
                rows = gather_rows(value, table, self.subset, name=name, shared=shared, order=self.order)
                self.tables[name] = (value, rows)
            named[name] = self.tables[name][1]
        if place.blocks.sides is not None:
            group = self._cells()
            for name, side in zip(place.blocks.sides, group, strict=True):
                named[name] = named[name] // side

    def _leave(self, place: Place, output: Any) -> Any:
        """Restore and fuse after the last middle block; samples that lost their deep path get the encoder's text too."""
        returned = output if isinstance(output, (tuple, list)) else (output,)
        if len(returned) != len(place.blocks.returns):
            raise ValueError(
                f"blocks {place.blocks.name!r} return {len(returned)} values, declared are {place.blocks.returns}: "
                "declare what they return, sprint.Blocks(…, returns=…)"
            )
        parts: dict[str, Any] = dict(zip(place.blocks.returns, returned, strict=True))
        stream = parts["image"] if self.path == "sparse" else self._sorted(parts["image"])
        image, text = self._split(place.blocks.stream, stream)
        text = parts.get("text", text)
        self.length, self.fused = self.num_tokens or 0, True
        assert self.shallow is not None
        if self.strong is not None:
            image, text = self._all_rows(image, text)
        if self.path == "shallow":
            image = self.state.fusion(self.shallow)
        else:
            image = self.state.fusion(self.shallow, image, self.subset, dropped=self.dropped)
            if self.dropped is not None and text is not None and self.text is not None:
                text = torch.where(self.dropped.view(-1, *[1] * (text.ndim - 1)), self.text, text)
        parts["image"] = self._unsorted(self._join(place.blocks.stream, image, text))
        if "text" in parts:
            parts["text"] = text
        return tuple(parts.values()) if len(parts) > 1 else parts["image"]

    def _draw(self, drop: Drop, image: Tensor) -> TokenSubset:
        """Draw the kept tokens, and add those that are always kept in front of them and behind."""
        grid = self._grid()
        subset = drop.sample(len(image), grid, device=image.device, generator=self.generator)
        first, last = self._always_kept()
        if not first + last:
            return subset
        places = torch.arange(image.shape[1], device=image.device).expand(len(image), -1)
        keep = [places[:, :first], subset.keep + first, places[:, image.shape[1] - last :]]
        return TokenSubset(torch.cat(keep, dim=1), image.shape[1])

    def _always_kept(self) -> tuple[int, int]:
        kept = self.state.host.always_kept
        return (0, 0) if kept is None else kept(self.model, self.arguments)

    def _split_batch(self, batch: int) -> None:
        """Decide whether this batch holds both guidance branches: the same input twice, in two halves."""
        if self.state.weak_half is None or self.path != "full" or batch % 2:
            return
        x, *_ = *self.arguments.values(), None
        if not isinstance(x, Tensor) or len(x) != batch or not torch.equal(x[: batch // 2], x[batch // 2 :]):
            return
        self.strong = slice(batch // 2, None) if self.state.weak_half == "first" else slice(0, batch // 2)
        self.state.split_calls += 1

    def _take_strong(self, place: Place, named: dict[str, Any]) -> None:
        assert self.shallow is not None
        batch, strong = len(self.shallow), self.strong

        def take(value: Any) -> Any:
            if isinstance(value, (tuple, list)):
                return type(value)(take(item) for item in value)
            return value[strong] if isinstance(value, Tensor) and value.ndim and len(value) == batch else value

        for name, value in named.items():
            table = place.blocks.tables.get(name)
            if table is None or table.batched:
                named[name] = take(value)

    def _all_rows(self, image: Tensor, text: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Back to the whole batch, whose weak half has lost its deep path."""
        assert self.shallow is not None
        assert self.strong is not None
        whole = torch.zeros_like(self.shallow)
        whole[self.strong] = image
        self.dropped = torch.ones(len(whole), dtype=torch.bool, device=whole.device)
        self.dropped[self.strong] = False
        if text is not None and self.text is not None:
            text, strong_text = self.text.clone(), text
            text[self.strong] = strong_text
        return whole, text

    def _split(self, stream: Stream, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        if stream == "image":
            return tokens, None
        if stream == "text+image":
            return tokens[:, tokens.shape[1] - self.length :], tokens[:, : tokens.shape[1] - self.length]
        return tokens[:, : self.length], tokens[:, self.length :]

    def _join(self, stream: Stream, image: Tensor, text: Tensor | None) -> Tensor:
        if stream == "image" or text is None:
            return image
        return torch.cat([text, image] if stream == "text+image" else [image, text], dim=1)

    def _text_then_image(self, length: int) -> Tensor:
        """(B, L), the places of each sample's text and padding in a joint stream, and then of its image."""
        assert self.state.host.image_starts is not None
        starts = self.state.host.image_starts(self.model, self.arguments).view(-1, 1)
        places = torch.arange(length, device=starts.device)
        is_image = (places >= starts) & (places < starts + (self.num_tokens or 0))
        return is_image.int().argsort(dim=1, stable=True)

    def _sorted(self, stream: Tensor) -> Tensor:
        if self.order is None:
            return stream
        order = self.order if len(stream) == len(self.order) else self.order[self.strong]
        return stream.gather(1, order.unsqueeze(-1).expand(-1, -1, stream.shape[-1]))

    def _unsorted(self, stream: Tensor) -> Tensor:
        if self.order is None:
            return stream
        return stream.gather(1, self.order.argsort(dim=1).unsqueeze(-1).expand(-1, -1, stream.shape[-1]))

    def _refuse_undeclared(self, place: Place, named: dict[str, Any]) -> None:
        per_sample = named[place.image].shape[::2]  # (B, C): a condition
        for name, value in named.items():
            for tensor in value if isinstance(value, (tuple, list)) else (value,):
                if not isinstance(tensor, Tensor) or tensor.ndim < 2 or name == place.image or tensor.shape == per_sample:
                    continue
                if self.num_tokens in tensor.shape[:2]:
                    raise ValueError(
                        f"argument {name!r} of the blocks has the shape {tuple(tensor.shape)} and seems to "
                        f"hold one row per token: "
                        f"declare it, sprint.register({type(self.model).__name__!r}, sprint.Host(blocks=("
                        f"sprint.Blocks({place.blocks.name!r}, tables={{{name!r}: sprint.Table(…)}}),))), "
                        "or without the table if it does not"
                    )

    def _grid(self) -> tuple[int, ...]:
        """The token grid of the image, from wherever it is known."""
        num_tokens = (self.num_tokens or 0) - sum(self._always_kept())
        grid = self.state.grid
        if grid is None and self.state.host.grid is not None:
            grid = self.state.host.grid(self.model, self.arguments)
        if grid is None:
            x, *_ = *self.arguments.values(), None
            if isinstance(x, Tensor) and x.ndim == 4 and (x.shape[2] * x.shape[3]) % num_tokens == 0:
                patch = math.isqrt(x.shape[2] * x.shape[3] // num_tokens)
                grid = (x.shape[2] // patch, x.shape[3] // patch)
        if grid is None or math.prod(grid) != num_tokens:
            if not isinstance(self.drop, StructuredDrop):
                return (num_tokens,)
            raise ValueError(
                f"the token grid of {type(self.model).__name__} is {'unknown' if grid is None else grid} "
                f"for {num_tokens} tokens: "
                "give it, sprint.wrap(…, grid=(rows, columns)) or sprint.path(model, 'sparse', grid=…), or use RandomDrop"
            )
        return grid

    def _cells(self) -> tuple[int, ...]:
        if not isinstance(self.drop, StructuredDrop):
            raise ValueError(
                f"{type(self.model).__name__} unfolds its tokens into a grid inside its blocks: "
                "use a drop sampler that keeps one token per group, StructuredDrop(0.75)"
            )
        group, kept = self.drop.cells(self._grid())
        if kept != 1:
            raise ValueError(
                f"{type(self.model).__name__} unfolds its tokens into a grid inside its blocks, so one "
                f"token per group can be kept, "
                f"got {kept} of {group}: use StructuredDrop(0.75)"
            )
        return group

    def _in_cells(self, subset: TokenSubset) -> TokenSubset:
        """The same tokens in the order of their groups, so that they form a smaller grid."""
        (rows, columns), (_, width) = self._cells(), self._grid()
        row, column = subset.keep // width, subset.keep % width
        order = (row // rows * (width // columns) + column // columns).argsort(dim=1)
        return TokenSubset(subset.keep.gather(1, order), subset.num_tokens)
