"""The route of one forward pass through a wrapped model: what is captured, dropped, restored and fused, and where.

While the model's own `forward` runs, its block lists yield `Bound` blocks. The first middle block captures the
encoder's tokens and draws the subset, every middle block sees the kept tokens and their table rows, and the exit of the
last one restores and fuses. A route belongs to one call: a checkpointed recomputation finds the subset that its own
forward pass drew.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sprint.hosts.declare import Arguments, Stream
from sprint.hosts.mechanism.bound import Stop
from sprint.hosts.mechanism.guided import all_rows, strong_half, take
from sprint.hosts.mechanism.keep import Keeper
from sprint.hosts.mechanism.places import Place
from sprint.hosts.mechanism.proof import proved
from sprint.hosts.mechanism.recompute import Debt, draws
from sprint.hosts.mechanism.sides import hint, refuse_undeclared
from sprint.hosts.mechanism.tables import Tables, versions_of
from sprint.random import uniform

if TYPE_CHECKING:
    from sprint.hosts.mechanism.state import SprintState


class Route:
    """One call's path through the model; see the module."""

    def __init__(self, state: "SprintState", model: Any, arguments: Arguments) -> None:
        self.state, self.model, self.arguments = state, model, arguments
        self.path, self.subset, self.drop, self.generator = state.route
        self.fusion = model.sprint.fusion  # of the active adapter, where PEFT keeps one for each
        self.keeper = Keeper(state, model, arguments, drop=self.drop, generator=self.generator)
        self.debt = Debt()
        self.opened = False  # the host's forward has begun
        self.num_tokens: int | None = None  # N, of the image
        self.length = 0  # of the image stream now: N, or K inside the middle
        self.shallow: Tensor | None = None
        self.text: Tensor | None = None
        self.dropped: Tensor | None = None
        self.tables = Tables()
        self.order: Tensor | None = None  # (B, L), where captions differ in length: text first, then the image
        self.strong: slice | None = None  # rows that run the middle, when one half of the batch takes the shallow path
        self.returned: tuple[Any, int] = (None, 0)  # the run of the last middle block, and its length
        self.fused = False
        self.reached = -1  # index of the last block called
        self.between = False  # the host's forward is at work between middle blocks
        self.entered = self.late = -1  # where the middle began; the decoder block that fuses, if the last middle one did not
        self.finished = False  # the forward pass is over: what is called now is recomputed for the backward pass
        self.learns = torch.is_grad_enabled()
        self.captured_outside = True  # of a checkpoint of the host's with use_reentrant=True
        self.reentrant = False  # the last middle block runs in a checkpoint of the host's with use_reentrant=True
        self.single: dict[str, tuple[Place, int]] = {}  # runs of a single block, by attribute
        self._refuse()

    def step(self, stop: Stop, block: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """Call one block of the model."""
        place, index, first, last = stop.place, stop.number, self.state.first, self.state.last
        self.between = False
        if self.state.masked is not None:
            block = stop.block  # not in a checkpoint, whose recomputation would not be masked
        elif self.state.checkpoint and torch.is_grad_enabled():
            block = partial(_recomputed, block, place, preserve_rng_state=torch.compiler.is_compiling() or draws(stop.block))
        named = place.named(args, kwargs)
        self._in_order(index)
        if self.num_tokens is None:
            self._refuse_other_batch(place, named.get(place.image))
            self.num_tokens = self.length = self._count(named[place.image])
        if index > last and (not self.fused or index == self.late):
            self._fuse_late(place, index, named)
            return place.call(block, named, args, kwargs)
        if not first <= index <= last:
            if self.state.idle == "encoder" and index < first:
                return place.packed({part: named[place.argument(part)] for part in place.blocks.returns})
            output = block(*args, **kwargs)
            place.parts(output)
            return output
        entering = self.entered in (-1, index)
        if entering:
            self._enter(place, index, named)
        self._refuse_other_axes(place, named[place.image])
        if self.path == "shallow" or self.state.idle == "middle":
            parts = {part: named[place.argument(part)] for part in place.blocks.returns}
        else:
            if self.strong is not None and self.shallow is not None:
                take(place, named, self.strong, batch=len(self.shallow), model=self.model)
            if self.path == "sparse" and self.state.masked is None:
                self._gather(place, named, entering=entering)
            parts = place.parts(self._call(stop, block, named, args, kwargs))
            self._refuse_other_text(place, named, parts.get("text"))
        self.returned = place.blocks, parts["image"].shape[1]
        if index == last:
            parts = self._leave(place, parts)
        self.between = True
        return place.packed(parts)

    def _call(self, stop: Stop, block: Callable[..., Any], named: dict[str, Any], args: tuple, kwargs: dict) -> Any:
        place = stop.place
        if self.state.masked is not None and self.subset is not None:
            with self.state.masked.of(self.subset, self.order):
                return place.call(block, named, args, kwargs)
        if self.path != "sparse" or torch.compiler.is_compiling():
            return place.call(block, named, args, kwargs)
        try:

            def call(block: Any, named: dict[str, Any]) -> Any:
                return place.call(block, named, args, kwargs)

            return proved(call, block, named, stop=stop, state=self.state, model=self.model)
        except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as error:
            advice = hint(place, named, self.num_tokens or 0, shared=bool(getattr(self.drop, "shared", False)))
            if not advice:
                raise
            raise RuntimeError(f"{type(error).__name__}: {error}\n{advice}") from error

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
        if not torch.compiler.is_compiling():
            self._refuse_recomputed()
        if self.path == "full" and self.state.weak_half is None:
            return
        for name, reason in self.state.host.refused.items():
            if self.arguments.get(name) is not None:
                where = "with weak_half" if self.path == "full" else f"on the {self.path} path"
                raise ValueError(f"{name} cannot be given {where}, {reason}: leave it out, or use the full path")
        if self.path == "sparse" and getattr(self.model, "_parallel_config", None) is not None:
            raise ValueError(
                "context parallelism splits the tokens before they can be dropped: turn it off on the sparse path"
            )

    def _refuse_recomputed(self) -> None:
        """A checkpoint around the whole model runs it again in the backward pass, where only torch's own random stream is
        what it was."""
        if torch._C._current_graph_task_id() == -1:
            self.state.latest = self.state.route
            return
        drawn = self.generator is not None and (self.drop is not None or (self.state.training and self.state.path_drop > 0))
        if drawn or self.state.latest != self.state.route:
            raise RuntimeError(
                f"a checkpoint around the whole {type(self.model).__name__} recomputes it for the backward pass, where "
                + ("the generator would draw other tokens" if drawn else "another path is chosen than in the forward pass")
                + ": checkpoint its blocks instead, sprint.wrap(…, checkpoint=True), or leave generator out and call "
                "backward inside of the with statement"
            )

    def _refuse_other_batch(self, place: Place, tokens: Any) -> None:
        """Tokens are dropped along axis 1, and paths along axis 0, which must be the batch."""
        if not isinstance(tokens, Tensor) or tokens.ndim != 3:
            got = f"of the shape {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else f"as a {type(tokens).__name__}"
            raise ValueError(
                f"blocks {place.blocks.name!r} got {place.image!r} {got}, expected the tokens as one tensor (B, N, C): name "
                "the parameter that takes them, sprint.Blocks(…, image=…), and flatten a grid before the blocks"
            )
        drops = self.path == "sparse" or (self.state.training and self.state.path_drop > 0)
        if not drops or (self.state.declared and torch.compiler.is_compiling()):
            return  # before sizes are looked at, each of which would be a graph of its own
        sizes = [len(x) for x in self.arguments.values() if isinstance(x, Tensor) and x.ndim > 1]
        if not sizes or any(size == len(tokens) for size in sizes):  # no set, which would make each size a graph of its own
            return
        batches = {*sizes}
        if self.state.declared and tokens.shape[1] not in batches:
            return
        raise ValueError(
            f"blocks {place.blocks.name!r} got tokens of the shape {tuple(tokens.shape)} for a batch of "
            f"{', '.join(map(str, sorted(batches)))}, expected (B, N, C): build the blocks with batch_first=True"
            + (
                ""
                if tokens.shape[1] in batches
                else f", or, if axis 0 holds more than the batch, declare it, {_pasted(place)}"
            )
        )

    def _refuse_other_axes(self, place: Place, tokens: Tensor) -> None:
        """Blocks by turns over space and over time fold one of them into the batch; others join or merge tokens."""
        if self.finished or self.shallow is None:
            return
        if len(tokens) != len(self.shallow) and (self.strong is None or len(tokens) != len(self.shallow[self.strong])):
            raise ValueError(
                f"{type(self.model).__name__} folds its tokens anew between its blocks ({len(self.shallow)} rows, then "
                f"{len(tokens)} at {place.blocks.name!r}), as blocks by turns over space and time do: which tokens are "
                "kept cannot follow, and it cannot be wrapped over these blocks"
            )
        run, length = self.returned
        if run is place.blocks and place.blocks.stream == "image" and length != tokens.shape[1]:
            raise ValueError(
                f"{type(self.model).__name__} changes the number of its tokens between middle blocks of "
                f"{place.blocks.name!r}, from {length} to {tokens.shape[1]} (registers that join, tokens that merge): "
                "choose encoder_depth and decoder_depth so that the middle begins behind that or ends before it"
            )

    def _refuse_other_text(self, place: Place, named: dict[str, Any], text: Any) -> None:
        """What is declared as text goes in and comes out as the same kind of thing."""
        if isinstance(text, Tensor) and text.ndim != named[str(place.blocks.text)].ndim:
            raise ValueError(
                f"blocks {place.blocks.name!r} return a tensor of {text.ndim} axes as the text, and got "
                f"{place.blocks.text!r} with {named[str(place.blocks.text)].ndim}: correct returns= and text="
            )

    def _count(self, tokens: Tensor) -> int:
        if self.state.host.image_tokens is not None:
            return self.state.host.image_tokens(self.model, self.arguments, tokens.shape[1])
        return tokens.shape[1]

    def _enter(self, place: Place, index: int, named: dict[str, Any]) -> None:
        """Capture the encoder's tokens, and draw; a recomputation draws again, for the random stream, and discards."""
        self.entered = index
        self.length = self.num_tokens or 0  # a recomputation runs backwards, and left the length of the middle
        if self.state.host.image_starts is not None and self.order is None:
            self.order = self._text_then_image(named[place.image])
        image, text = self._split(place.blocks.stream, self._sorted(named[place.image]))
        if place.blocks.text is not None:
            text = named[place.blocks.text]
        if image.shape[-1] != self.fusion.dim:
            raise ValueError(
                f"the tokens of blocks {place.blocks.name!r} are {image.shape[-1]} wide, the fusion was made for "
                f"{self.fusion.dim}: declare the width, sprint.wrap(model, host=sprint.Host((sprint.Blocks("
                f"{place.blocks.name!r}),), width=lambda model: {image.shape[-1]}))"
            )
        again = self.shallow is not None
        if again and self.reentrant:
            self._pay(place, named, image, text)
        if again and self.generator is not None:
            return  # no checkpoint has turned it back
        subset, dropped = self.subset, None
        if self.path == "sparse" and self.drop is not None:
            subset = self.keeper.draw(image)
        if self.path != "shallow" and self.state.training and self.state.path_drop > 0:
            dropped = uniform((len(image),), device=image.device, generator=self.generator) < self.state.path_drop
        if again:
            return
        if self.path == "full":
            self.strong = strong_half(self.state, self.arguments, len(image))
        if self.path != "sparse" or self.state.masked is not None:  # the blocks get these very tensors, and may write there
            image = image.clone()
        if text is not None and (dropped is not None or self.strong is not None):
            text = text.clone()
        self.shallow, self.text, self.dropped = image, text, dropped
        self.captured_outside = torch.is_grad_enabled()
        if subset is not None:
            self.subset = self.keeper.in_cells(subset) if place.unfolds else subset

    def _pay(self, place: Place, named: dict[str, Any], image: Tensor, text: Tensor | None) -> None:
        """Give the first block's arguments the gradients of what was captured from them."""
        image = self.debt.pay("image", image)
        if text is not None:
            text = self.debt.pay("text", text)
        if place.blocks.text is not None:
            named[place.blocks.text], text = text, None
        named[place.image] = self._unsorted(self._join(place.blocks.stream, image, text))

    def _gather(self, place: Place, named: dict[str, Any], *, entering: bool) -> None:
        """Reduce the tokens (at the first block), and every table, to the kept ones."""
        assert self.subset is not None
        if not (self.state.declared and torch.compiler.is_compiling()):  # a guard more is a graph more
            refuse_undeclared(place, named, self.num_tokens or 0)
        if entering:
            image, text = self._split(place.blocks.stream, self._sorted(named[place.image]))
            named[place.image] = self._join(place.blocks.stream, self.subset.gather(image), text)
        self.length = self.subset.num_kept
        for name, table in place.blocks.tables.items():
            value = named.get(name)
            if value is None:
                continue
            shared = bool(getattr(self.drop, "shared", False))
            named[name] = self.tables.of(name, value, table, self.subset, shared=shared, order=self.order)
        if place.sides and place.sides[0] in named:
            group = self.keeper.cells(self.num_tokens or 0)
            if len(place.sides) == 1:
                (name,) = place.sides
                named[name] = type(named[name])(side // n for side, n in zip(named[name], group, strict=True))
            else:
                for name, n in zip(place.sides, group[-len(place.sides) :], strict=True):
                    named[name] = named[name] // n

    def _leave(self, place: Place, parts: dict[str, Any]) -> dict[str, Any]:
        """Restore and fuse after the last middle block; samples that lost their deep path get the encoder's text too."""
        gathered = self.path == "sparse" and self.state.masked is None
        stream = parts["image"] if gathered else self._sorted(parts["image"])
        image, text = self._split(place.blocks.stream, stream)
        if self.state.masked is not None and self.subset is not None:
            image = self.subset.gather(image)
        text = parts.get("text", text)
        self.length = self.num_tokens or 0
        assert self.shallow is not None
        if self.strong is not None and self.state.idle != "middle":
            image = all_rows(self.strong, image, self.shallow)
            text = all_rows(self.strong, text, self.text) if text is not None and self.text is not None else text
            self.dropped = torch.ones(len(image), dtype=torch.bool, device=image.device)
            self.dropped[self.strong] = False
        self.fused = True
        shallow, shallow_text = self._captured(image)
        if self.path == "shallow" or self.strong is not None:
            self.state.weak_ran = True
        if self.path == "shallow":
            image = self.fusion(shallow)
        elif self.state.idle != "fusion":
            image = self.fusion(shallow, image, self.subset, dropped=self.dropped)
            if self.dropped is not None and text is not None and shallow_text is not None:
                text = torch.where(self.dropped.view(-1, *[1] * (text.ndim - 1)), shallow_text, text)
        parts["image"] = self._unsorted(self._join(place.blocks.stream, image, text))
        if "text" in parts:
            parts["text"] = text
        return parts

    def _captured(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """The encoder's tokens and text to fuse with; in a reentrant checkpoint, on loan."""
        assert self.shallow is not None
        if not self.finished:
            self.reentrant = self.learns and not torch.is_grad_enabled()
            if self.reentrant and self.captured_outside:
                raise RuntimeError(
                    f"{type(self.model).__name__} checkpoints its last middle block with use_reentrant=True, but not its "
                    "first one, so that the fusion's gradients would be lost: use use_reentrant=False"
                )
        if not (self.finished and self.reentrant):
            return self.shallow, self.text
        if self.path == "shallow":  # the tokens that the middle passed on are the captured ones, and lead back to them
            return image, self.text
        return self.debt.borrow("image", self.shallow), None if self.text is None else self.debt.borrow("text", self.text)

    def _fuse_late(self, place: Place, index: int, named: dict[str, Any]) -> None:
        """Fuse before a decoder block, because the host skipped the last middle block, or all of them."""
        self.late = index
        if self.entered in (-1, index):  # all of them
            self._enter(place, index, named)
            if self.strong is not None:
                for name in filter(None, (place.image, place.blocks.text)):
                    named[name] = named[name][self.strong]
            image, text = self._split(place.blocks.stream, self._sorted(named[place.image]))
            if self.path == "sparse":
                assert self.subset is not None
                image = self.subset.gather(image)
                self.length = self.subset.num_kept
            named[place.image] = self._join(place.blocks.stream, image, text)
            if self.path != "sparse":
                named[place.image] = self._unsorted(named[place.image])
        elif self.path == "sparse":
            assert self.subset is not None
            self.length = self.subset.num_kept
        parts = {"image": named[place.image]}
        if place.blocks.text is not None:
            parts["text"] = named[place.blocks.text]
        for part, value in self._leave(place, parts).items():
            named[place.argument(part)] = value

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

    def _text_then_image(self, stream: Tensor) -> Tensor | None:
        """(B, L), the places of each sample's text and padding in a joint stream, and then of its image."""
        assert self.state.host.image_starts is not None
        starts = self.state.host.image_starts(self.model, self.arguments)
        if starts is None:
            return None
        starts = starts.to(stream.device).view(-1, 1)
        places = torch.arange(stream.shape[1], device=stream.device)
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


def _recomputed(block: Callable[..., Any], place: Place, *args: Any, preserve_rng_state: bool, **kwargs: Any) -> Any:
    """The block in a checkpoint; one that draws nothing needs no random state, which a CUDA graph could not read."""
    before = None if torch.compiler.is_compiling() else versions_of((args, kwargs))
    output = checkpoint(block, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state, **kwargs)
    if before is not None and before != versions_of((args, kwargs)):
        raise RuntimeError(
            f"blocks {place.blocks.name!r} change their arguments in place, from which a checkpoint would recompute them: "
            f"write {place.image} = {place.image} + …, or wrap without checkpoint=True"
        )
    return output


def _pasted(place: Place) -> str:
    """A line that declares these blocks."""
    return f"sprint.wrap(model, host=sprint.Host((sprint.Blocks({place.blocks.name!r}),)))"
