"""The order of the data as a function of the position in it, so that a run resumes there without having kept a state.

An epoch is a permutation of all samples that depends on the seed and the epoch alone. A step takes the next samples,
whatever the number of processes: each process takes its share of them.
"""

from collections.abc import Iterator

import numpy as np
import torch

from sprint.arguments import checked
from sprint.training.schedule import TwoStage


@checked
def seed_of(*keys: int) -> int:
    """One seed of several numbers (seed of the run, step, process), none negative, all its bits mixed.

    Examples:
        >>> seed_of(0, 1) == seed_of(0, 1), seed_of(0, 1) == seed_of(1, 0), seed_of(1) == seed_of(1, 0)
        (True, False, False)
    """
    keyed = np.random.SeedSequence([len(keys), *keys])  # the length, or trailing zeros would not count
    return int(keyed.generate_state(1, np.uint64)[0] >> 1)


@checked
class DataOrder:
    """Samples by position: epoch after epoch, each in an order of its own.

    Args:
        count: samples of the dataset.
        seed: of the permutations.

    Examples:
        >>> order = DataOrder(5, seed=0)
        >>> sorted(order.take(5, 5)), order.take(3, 4) == order.take(3, 2) + order.take(5, 2)
        ([0, 1, 2, 3, 4], True)
    """

    def __init__(self, count: int, *, seed: int = 0) -> None:
        if count < 1:
            raise ValueError(f"count must be at least 1 sample, got {count}")
        self.count, self.seed = count, seed
        self._epoch, self._permutation = -1, torch.zeros(0, dtype=torch.int64)

    def take(self, position: int, number: int) -> list[int]:
        """Indices of the `number` samples from a position on."""
        taken: list[int] = []
        while len(taken) < number:
            epoch, at = divmod(position + len(taken), self.count)
            if epoch != self._epoch:
                generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
                self._epoch, self._permutation = epoch, torch.randperm(self.count, generator=generator)
            taken += self._permutation[at : at + number - len(taken)].tolist()
        return taken


@checked
class Batches:
    """Index lists for the `batch_sampler` of a data loader: what one process sees from a step on, until another.

    Args:
        order: of the data.
        schedule: tells the batch of each step.
        start: first step.
        end: one past the last.
        share: (index of this process, number of processes).
        accumulate: calls per update; each yields a list of its own.

    Raises:
        ValueError: a batch does not split.

    Examples:
        >>> from sprint.training import Stage, TwoStage
        >>> schedule = TwoStage(Stage(steps=2, batch=4, lr=1e-4))
        >>> halves = [list(Batches(DataOrder(8), schedule, 0, 2, share=(p, 2))) for p in (0, 1)]
        >>> halves[0][1] + halves[1][1] == DataOrder(8).take(4, 4)
        True
    """

    def __init__(
        self,
        order: DataOrder,
        schedule: TwoStage,
        start: int,
        end: int,
        *,
        share: tuple[int, int] = (0, 1),
        accumulate: int = 1,
    ) -> None:
        self.order, self.schedule, self.start, self.end = order, schedule, start, end
        self.share, self.accumulate = share, accumulate
        for step in (start, end - 1):
            batch, parts = schedule.at(step).batch, share[1] * accumulate
            if batch % parts:
                raise ValueError(
                    f"a batch of {batch} images does not split into {share[1]} processes of {accumulate} calls per update: "
                    f"choose a multiple of {parts}"
                )

    def each(self, step: int) -> int:
        """Images of one call on one process."""
        return self.schedule.at(step).batch // (self.share[1] * self.accumulate)

    def __iter__(self) -> Iterator[list[int]]:
        process, processes = self.share
        for step in range(self.start, self.end):
            for call in range(self.accumulate):
                first = self.schedule.at(step).images + (call * processes + process) * self.each(step)
                yield self.order.take(first, self.each(step))

    def __len__(self) -> int:
        return (self.end - self.start) * self.accumulate
