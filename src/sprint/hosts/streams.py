"""Trials of `check` on the stream of tokens: what may be dropped is of the image, stands where its grid says, and nobody
counts it."""

import math
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from sprint.hosts.mechanism.holders import leaves
from sprint.hosts.tried import Draws, Finding, Inputs, Tried, noise

IMAGE = "dropped tokens are the image's"


class Streams(Tried):
    """Trials of what the stream holds."""

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

        moved = changed(tree_map(lambda leaf: leaf + noise(leaf), x))
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
