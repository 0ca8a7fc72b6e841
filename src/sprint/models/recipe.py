"""How a model was trained, as far as sampling must know it: it travels with the weights."""

import dataclasses
import json

from sprint.flow.inputs import check_count, check_number
from sprint.flow.interpolants import get_interpolant

FORMAT = 1  # of the files; a newer one is refused


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What sampling and decoding need beside the weights; None is what nobody said.

    Args:
        interpolant: "linear", "cosine" or "ddpm".
        time: distribution of the training times, in words.
        latent_scale: that the latents were multiplied with.
        vae: hub name or folder of the VAE that decodes them; "none" for pixels.
        latent_side: rows and columns of the latents.

    Raises:
        ValueError: an interpolant of an unknown name, or numbers that are not positive.
    """

    interpolant: str | None = None
    time: str | None = None
    latent_scale: float | None = None
    vae: str | None = None
    latent_side: int | None = None

    def __post_init__(self) -> None:
        if self.interpolant is not None:
            get_interpolant(self.interpolant)
        if self.latent_scale is not None:
            check_number("latent_scale", self.latent_scale, positive=True)
        if self.latent_side is not None:
            check_count("latent_side", self.latent_side)

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
        if version != FORMAT:
            raise ValueError(f"{source} holds a recipe of format {version}, and this version reads {FORMAT}: update sprint")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(said.keys() - known):
            raise ValueError(f"{source} holds a recipe with {', '.join(unknown)}, unknown to this version: update sprint")
        return cls(**said)
