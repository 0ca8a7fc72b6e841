"""Random draws that honour a generator wherever it lives.

Every random choice of the library (kept tokens, noise, time, path-drop, label-drop) goes through these two functions.
With a generator, numbers are drawn on the generator's device and moved, so that a CPU generator gives the same run on
any hardware, and the global random stream is left untouched.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Device = torch.device | str | None
Generators = torch.Generator | Sequence[torch.Generator] | None


def uniform(
    shape: Sequence[int],
    *,
    device: Device = None,
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw from the uniform distribution on [0, 1).

    Examples:
        >>> uniform((2,), generator=torch.Generator().manual_seed(0))
        tensor([0.4963, 0.7682])
    """
    if generator is None:  # not passed on as None: torch.compile with dynamic shapes cannot trace that
        return torch.rand(*shape, device=device, dtype=dtype)
    return torch.rand(*shape, device=generator.device, dtype=dtype, generator=generator).to(device)


def normal(
    shape: Sequence[int],
    *,
    device: Device = None,
    dtype: torch.dtype = torch.float32,
    generator: Generators = None,
) -> Tensor:
    """Draw from the standard normal distribution.

    With a sequence of generators, one per sample (axis 0), each sample's numbers do not depend on the batch it is in.

    Examples:
        >>> normal((2,), generator=torch.Generator().manual_seed(0))
        tensor([ 1.5410, -0.2934])
    """
    if generator is None:
        return torch.randn(*shape, device=device, dtype=dtype)
    if isinstance(generator, Sequence):
        if len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for {shape[0]} samples: give one, or one per sample")
        each = [normal(shape[1:], device=device, dtype=dtype, generator=one) for one in generator]
        return torch.stack(each)
    return torch.randn(*shape, device=generator.device, dtype=dtype, generator=generator).to(device)
