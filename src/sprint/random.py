"""Random draws that honour a generator wherever it lives.

Every random choice of the library (kept tokens, noise, time, path-drop, label-drop) goes through these two functions.
With a generator, numbers are drawn on the generator's device and moved, so that a CPU generator gives the same run on
any hardware, and the global random stream is left untouched.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Device = torch.device | str | None


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
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw from the standard normal distribution.

    Examples:
        >>> normal((2,), generator=torch.Generator().manual_seed(0))
        tensor([ 1.5410, -0.2934])
    """
    if generator is None:
        return torch.randn(*shape, device=device, dtype=dtype)
    return torch.randn(*shape, device=generator.device, dtype=dtype, generator=generator).to(device)
