"""The predictions in what models return, and how far apart two are."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def first_tensor(output: Any) -> Tensor:
    """The prediction in whatever a model returns: a tensor, a tuple, a list of equal tensors, or an output with `sample`."""
    output = getattr(output, "sample", output)
    if isinstance(output, tuple):
        output = output[0]
    if isinstance(output, list) and output and all(isinstance(item, Tensor) for item in output):
        output = _stacked(output)
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the model returned {type(output).__name__}, in which no prediction was found: say where it is, "
            "check(…, output=lambda returned: returned['x'])"
        )
    return output


def _stacked(tensors: list[Tensor]) -> Tensor:
    """Samples of one size or of several, with zeros behind the smaller ones."""
    largest = [max(sides) for sides in zip(*(tensor.shape for tensor in tensors), strict=True)]
    stacked = tensors[0].new_zeros((len(tensors), *largest))
    for i, tensor in enumerate(tensors):
        stacked[(i, *(slice(side) for side in tensor.shape))] = tensor
    return stacked


def tensors(output: Any) -> list[Tensor]:
    """All of them, in order."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return [tensor for value in values for tensor in tensors(value)]


def difference(one: Tensor, other: Tensor) -> float:
    """Largest difference relative to the largest value."""
    return ((one - other).abs().max() / one.abs().max().clamp_min(1e-12)).item()
