"""Trials of `check` on the samples of a batch: they never mix, and padded text is never seen."""

import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from sprint.hosts.mechanism.holders import leaves
from sprint.hosts.tried import Draws, Finding, Inputs, Tried, generator, noise, text_of
from sprint.middle.tokens import TokenSubset

LONGEST = 64  # samples of the largest batch that is tried
JUNK = 10.0  # standard deviation of what stands in padded text


class Samples(Tried):
    """Trials of whole samples."""

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
            return Finding(name, None, f"NOT PROVED: the host takes no other batch, {text_of(error)}")
        batch = max(batch, 3) if batch == 1 else batch
        fulls, single = fulls * (batch // len(fulls)), single * (batch // len(single))
        if not self._same(full, torch.cat(fulls)):
            return Finding(name, None, "NOT PROVED: in the host itself, samples depend on their batch")
        draws, kept = Draws(self.state.drop), []
        sparse = self.run("sparse", several, drop=draws.drop, generator=generator(2))
        if draws.subset is None:
            return Finding(name, None, "NOT PROVED: nothing was drawn")
        for i, inputs in enumerate(single):
            only = Draws(self.state.drop, TokenSubset(draws.subset.keep[i : i + 1], draws.subset.num_tokens))
            kept.append(self.run("sparse", inputs, drop=only.drop))
        return self._compared(name, torch.cat([full, sparse]), torch.cat([*fulls, *kept]))

    def halves(self) -> Finding:
        """Both branches of guidance in one batch are what they are apart, in batches of several sizes, those among them that
        another argument of the blocks is as long as."""
        shared, own = self._shared(), self._batch() or 1
        found = {size: self._halves(size) for size in sorted({own, 1, 2, 3, *(n // 2 for n in shared if n <= LONGEST)})}
        size, finding = next(((n, each) for n, each in found.items() if each.ok is False), (own, found[own]))
        longer = [f"{name} of {length}" for length, name in shared.items() if length > LONGEST and finding.ok]
        remark = f"; not tried in a batch as long as {longer[0]}, which would be halved" if longer else ""
        if finding.ok is False and 2 * size in shared:
            remark = f"; {shared[2 * size]} is as long as the batch, and halved: keep it as a buffer of the model"
        return replace(finding, detail=finding.detail + remark)

    def _shared(self) -> dict[int, str]:
        """Even lengths of tensors that middle blocks get and that follow no batch, with their names."""
        try:
            two, three = (
                [
                    (len(leaf), name)
                    for place, named in self._met(inputs=self._rows(batch))
                    for name, value in named.items()
                    for leaf in (() if name in place.blocks.tables else leaves(value))
                    if isinstance(leaf, Tensor) and leaf.ndim
                ]
                for batch in (2, 3)
            )
        except Exception:  # whatever the host raises: the trials say so
            return {}
        return {length: repr(name) for length, name in {*two} & {*three} if not length % 2}

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
            return Finding(name, None, f"NOT PROVED: the host takes no batch twice as large, {text_of(error)}")
        if len(strong) != batch or not self._same(torch.cat([strong, control_weak]), control):
            return Finding(name, None, "NOT PROVED: in the host itself, samples depend on their batch")
        try:
            guided = self._set("weak_half", "second", "full", both)
        except ValueError as error:
            return Finding(name, None, f"refused: {text_of(error)}")
        except RuntimeError as error:
            return Finding(name, False, f"{2 * batch} rows: {text_of(error)}")
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
        junk = {id(text): text + JUNK * noise(text) * ~padded[id(mask)].bool()[..., None] for mask, text in pairs}

        def inputs(replaced: dict[int, Tensor]) -> Inputs:
            return tree_map(lambda value: replaced.get(id(value), value), (self.args, self.kwargs))

        clean, spoilt = inputs(padded), inputs(padded | junk)
        if not self._same(self.run("full", clean), self.run("full", spoilt)):
            return Finding(name, None, "the host itself sees it")
        sparse = [self.run("sparse", each, generator=generator(3)) for each in (clean, spoilt)]
        return self._compared(name, sparse[0], sparse[1])


def _twice(value: Any, other: Any) -> Any:
    return torch.cat([value, other]) if isinstance(value, Tensor) else value + other
