"""What a network of torch-fidelity says of images, gathered a batch at a time.

Fréchet distances need the mean and the covariance alone, whose memory does not grow with the number of images. The other
metrics need all features: 8 kB per image of Inception's.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from compared import Images
from torch import Tensor
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor, resolve_feature_layer_for_metric


class Moments:
    """Mean and covariance of rows that come in batches, in float64, about the first batch's mean."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, rows: Tensor) -> None:
        """Take in a batch, (B, D)."""
        rows = rows.double()
        if not self.count:
            self.about = rows.mean(dim=0)
            self.sum, self.products = torch.zeros_like(self.about), rows.new_zeros(rows.shape[1], rows.shape[1])
        rows = rows - self.about
        self.count += len(rows)
        self.sum += rows.sum(dim=0)
        self.products.addmm_(rows.T, rows)

    def result(self) -> dict[str, np.ndarray]:
        """`mu` (D,) and `sigma` (D, D)."""
        mean = self.sum / self.count
        sigma = (self.products - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return {"mu": (self.about + mean).cpu().numpy(), "sigma": sigma.cpu().numpy(), "count": np.array(self.count)}


@dataclass
class Gathered:
    """Of one set of images."""

    count: int = 0
    """Images that were read."""
    size: tuple[int, ...] = ()
    """Of each, (height, width)."""
    statistics: dict[str, np.ndarray] | None = None
    """For a Fréchet distance."""
    features: dict[str, Tensor] = field(default_factory=dict)
    """By metric, (N, D); metrics of the same layer share them."""


def gather(images: Images, extractor: str, metrics: list[str], options: dict[str, Any]) -> Gathered:
    """Show images to a network, once for all metrics.

    Args:
        images: that are shown.
        extractor: torch-fidelity's name of the network.
        metrics: of "fid", "isc", "kid", "prc".
        options: for torch-fidelity.

    Raises:
        SystemExit: unknown network, images that cannot be read, fewer than two, or features that are not finite.
    """
    if extractor not in FEATURE_EXTRACTORS_REGISTRY:
        raise SystemExit(f"torch-fidelity has no extractor {extractor!r}, only {', '.join(FEATURE_EXTRACTORS_REGISTRY)}")
    layers = {metric: resolve_feature_layer_for_metric(metric, feature_extractor=extractor) for metric in metrics}
    network = create_feature_extractor(extractor, sorted(set(layers.values())), **options)
    moments, kept, count = Moments(), {layer: list[Tensor]() for metric, layer in layers.items() if metric != "fid"}, 0
    size: tuple[int, ...] = ()
    with torch.no_grad():
        for batch in images.batches(options["batch_size"]):
            said = network.convert_features_tuple_to_dict(network(batch.cuda() if options["cuda"] else batch))
            if not all(features.isfinite().all() for features in said.values()):
                raise SystemExit(f"{images.source}: {extractor} gives numbers that are not finite from image {count} on")
            if "fid" in layers:
                moments.add(said[layers["fid"]])
            for layer, features in kept.items():
                features.append(said[layer].cpu())
            count, size = count + len(batch), tuple(batch.shape[2:])
    if count < 2:
        path, why = [*images.left_out.items()][-1]
        raise SystemExit(f"{images.source}: only {count} of {len(images)} images could be read, not {path.name} ({why})")
    whole = {layer: torch.cat(features) for layer, features in kept.items()}
    found = moments.result() if "fid" in layers else None
    return Gathered(count, size, found, {metric: whole[layer] for metric, layer in layers.items() if metric != "fid"})
