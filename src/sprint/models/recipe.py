"""How a model was trained, as far as sampling must know it: it travels with the weights."""

import dataclasses
import json
from collections.abc import Sequence

from sprint.flow.inputs import check_count, check_number
from sprint.flow.interpolants import get_interpolant

FORMAT = 2  # of the files; 1, without shift and image size, is read too, a newer one is refused

Numbers = float | Sequence[float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What sampling and decoding need beside the weights and options; None is what nobody said.

    The model sees `(z - latent_shift) * latent_scale` of a latent z.

    Args:
        interpolant: "linear", "cosine" or "ddpm".
        time: distribution of the training times, in words.
        latent_scale: one number, or one per channel.
        latent_shift: likewise.
        vae: hub name or folder of the VAE that decodes them; "none" for pixels.
        latent_side: rows and columns of the latents.
        image_size: rows and columns of the images.

    Raises:
        ValueError: an interpolant of an unknown name, or numbers that are not finite, or not positive where they must be.
    """

    interpolant: str | None = None
    time: str | None = None
    latent_scale: Numbers | None = None
    latent_shift: Numbers | None = None
    vae: str | None = None
    latent_side: int | None = None
    image_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("interpolant", "time", "vae"):
            if not isinstance(value := getattr(self, name), str | None):
                raise TypeError(f"{name} must be text, got {value!r}")
        if self.interpolant is not None:
            get_interpolant(self.interpolant)
        for name in ("latent_scale", "latent_shift"):
            value = getattr(self, name)
            if isinstance(value, list | tuple):
                object.__setattr__(self, name, tuple(value))  # JSON has lists
            for number in () if value is None else value if isinstance(value, list | tuple) and value else (value,):
                check_number(name, number, positive=name == "latent_scale")
        for name in ("latent_side", "image_size"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))

    def to_json(self) -> str:
        """As a file holds it."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def from_json(cls, text: str | None, *, source: str) -> "Recipe":
        """What a file holds; without a text, a recipe that says nothing.

        Raises:
            ValueError: it was written by a newer version, or is none.
        """
        if text is None:
            return cls()
        try:
            said = json.loads(text)
            version = said.pop("format")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{source} holds a damaged recipe of how it was trained: {text[:80]!r}") from error
        if version not in (1, FORMAT):
            raise ValueError(
                f"{source} holds a recipe of format {version}, this version reads up to {FORMAT}: update sprint"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(said.keys() - known):
            raise ValueError(f"{source} holds a recipe with {', '.join(unknown)}, unknown to this version: update sprint")
        try:
            return cls(**said)
        except TypeError as error:
            raise ValueError(f"{source} holds a damaged recipe of how it was trained: {error}") from error
