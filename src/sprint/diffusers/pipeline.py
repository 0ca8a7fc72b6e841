"""`SprintPipeline`: our SiT or any model as its `Velocity`, a scheduler of diffusers, perhaps a VAE."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from sprint.checkpoint import PathLike, write_text
from sprint.data.vae import scaling, unscaled
from sprint.diffusers.loading import from_pretrained
from sprint.flow.guidance import Guidance
from sprint.flow.holders import held, unwrapped
from sprint.flow.inputs import check_count
from sprint.flow.sampling import trajectory
from sprint.flow.velocity import Velocity
from sprint.hosts.wrapping import OPTIONS_FILE
from sprint.models.sit import SiT
from sprint.random import Generators, normal

_INDEX, _WEIGHTS = "model_index.json", "model.safetensors"


class SprintPipeline(DiffusionPipeline):
    """Sampling with a scheduler of diffusers, from noise to latents or images.

    With `FlowMatchEulerDiscreteScheduler()` the images are those of `sprint.sample(..., solver="euler")`; schedulers of
    DDPM's schedule, such as `DDIMScheduler`, are for models of that interpolant.

    Args:
        transformer: `SiT`; a `sprint.Velocity` of any model, wrapped or not; or a model that `Velocity` knows by its class,
            as it was pretrained (`DiTTransformer2DModel`: it predicts noise). Another one may take its place later,
            `pipe.transformer = …`: a `Velocity` is taken as it is, a model of the same class (compiled, wrapped, with
            adapters) keeps the options, and one of another class is refused where options were given.
        scheduler: of the model's interpolant.
        vae: `AutoencoderKL` that decodes the latents; without one the latents are the images.

    Raises:
        ValueError: it is not known what the transformer predicts.
    """

    _optional_components = ["vae"]  # noqa: RUF012, as diffusers declares it

    def __init__(self, transformer: Any, scheduler: Any, vae: Any = None) -> None:
        super().__init__()
        self._model = _as_called(transformer)
        self.register_modules(transformer=_transformer(self._model), scheduler=scheduler, vae=vae)

    @property
    def model(self) -> Any:
        """The transformer as samplers call it."""
        if _transformer(self._model) is not self.transformer:  # a user has replaced it
            self._model = _as_called(self.transformer, before=self._model)
            self.transformer = _transformer(self._model)
        return self._model

    @property
    def _velocity(self) -> Velocity | None:
        """The `Velocity` that is called, or none for a `SiT`."""
        return inner if isinstance(inner := held(self.model), Velocity) else None

    @torch.no_grad()
    def __call__(
        self,
        labels: Any,
        *,
        size: tuple[int, ...],
        guidance: Guidance | None = None,
        num_inference_steps: int = 50,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: Literal["pt", "latent", "pil"] = "pt",
    ) -> Any:
        """Sample one image per condition.

        Args:
            labels: class ids, (B,) int64 or a list of whole numbers; or what else the transformer takes as y, such as a
                dictionary of embeddings.
            size: rows and columns of the latents; of a video also its frames, first.
            guidance: of `sprint`, such as `sprint.PathDropGuidance(2.0)`.
            num_inference_steps: steps of the scheduler, on a uniform grid where it takes one.
            generator: for the noise; one, or one per image.
            latents: noise, (B, C, *size), instead of drawn noise.
            output_type: "pt" (tensor in [0, 1]), "latent" (as the transformer sees it), or "pil".

        Returns:
            Images, (B, C, H, W), or a list of PIL images.

        Raises:
            ValueError: labels of another shape or dtype, no step, an unknown output type, or a scheduler that is not of the
                model's interpolant.
        """
        if output_type not in ("pt", "latent", "pil"):
            raise ValueError(f"unknown output_type {output_type!r}: choose one of pt, latent, pil")
        if not isinstance(size, tuple | list):
            raise ValueError(f"size must be (rows, columns) of the latents, got {size!r}")
        if output_type == "pil" and len(size) != 2:
            raise ValueError(f"output_type='pil' is for images, got latents of {len(size)} axes: use 'pt'")
        if latents is not None and tuple(latents.shape[2:]) != tuple(size):
            raise ValueError(f"latents are {tuple(latents.shape)}, and size={tuple(size)}: give size as theirs")
        if self.vae is not None and output_type != "latent":
            self._scaling()
        check_count("num_inference_steps", num_inference_steps)
        model, velocity = self.model, self._velocity  # first, since a transformer may have been replaced
        like = next(self.transformer.parameters())
        y, batch = _conditions(labels, like.device)
        if latents is None:
            part = self.transformer.config if velocity is None else velocity
            shape = (batch, part.in_channels, *size)
            latents = normal(shape, device=like.device, dtype=like.dtype, generator=generator)
        with _evaluating(model):
            x = self._integrated(latents.to(like.device, like.dtype), y, guidance, num_inference_steps, generator)
        x = x.to(like.dtype)
        if output_type == "latent":
            return x
        images = self._pixels(x) if self.vae is None else self._decoded(x)
        images = (images / 2 + 0.5).clamp(0, 1)
        return self.numpy_to_pil(images.permute(0, 2, 3, 1).float().cpu().numpy()) if output_type == "pil" else images

    def _integrated(self, noise: Tensor, y: Any, guidance: Guidance | None, steps: int, generator: Generators) -> Tensor:
        states = trajectory(
            self.model,
            noise,
            y=y,
            guidance=guidance,
            solver=self.scheduler,
            steps=steps,
            generator=generator,
            state_dtype=torch.float32,
        )
        x = next(states).x
        bar: Any = self.progress_bar
        for _ in bar(range(len(self.scheduler.timesteps))):
            x = next(states).x
        return x

    def _decoded(self, latents: Tensor) -> Tensor:
        """Images of latents."""
        z = unscaled(latents.to(self.vae.dtype), *self._scaling())
        if type(self.vae).__name__ == "AutoencoderKLFlux2":
            z = torch.nn.functional.pixel_shuffle(z, 2)
        return self.vae.decode(z, return_dict=False)[0]

    def _pixels(self, x: Tensor) -> Tensor:
        """What a model of pixels was trained on, unscaled."""
        recipe = getattr(held(self.transformer), "recipe", None)
        return (
            x
            if recipe is None or recipe.vae != "none"
            else unscaled(x, recipe.latent_scale or 1.0, recipe.latent_shift or 0.0)
        )

    def _scaling(self) -> tuple[Any, Any]:
        """Scale and shift: those that the model was trained with or, where it does not say, the VAE's own.

        Raises:
            ValueError: neither says.
        """
        recipe = getattr(held(self.transformer), "recipe", None)
        said = (None, None) if recipe is None else (recipe.latent_scale, recipe.latent_shift)
        try:
            own = scaling(self.vae) if None in said else said
        except ValueError as error:
            raise ValueError(f"{error}: use output_type='latent', and decode them yourself") from error
        return own[0] if said[0] is None else said[0], own[1] if said[1] is None else said[1]

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, save_directory: PathLike, **kwargs: Any
    ) -> None:
        """Write all parts to a folder; `kwargs` go to the parts of diffusers. What is compiled is written as what it was.

        Raises:
            ValueError: a part that could not be loaded again: adapters, classes that are not of diffusers, or functions
                among the options of its `Velocity`; nothing is written.
        """
        folder = Path(save_directory)
        index: dict[str, Any] = {"_class_name": "SprintPipeline"}
        if (velocity := self._velocity) is not None:
            index["velocity"] = velocity.options()
        names = [name for name in ("transformer", "scheduler", "vae") if getattr(self, name) is not None]
        parts = {name: _written(name, getattr(self, name)) for name in names}
        for name, part in parts.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            if isinstance(part, SiT):
                part.save(folder / name / _WEIGHTS)
            else:
                part.save_pretrained(folder / name, **kwargs)
            index[name] = type(part).__name__
        write_text(folder / _INDEX, json.dumps(index, indent=2))

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, folder: PathLike, **kwargs: Any
    ) -> "SprintPipeline":
        """Read what `save_pretrained` wrote; `kwargs` go to the parts of diffusers, and `torch_dtype` to all parts.

        Raises:
            FileNotFoundError: no pipeline in this folder.
            ValueError: a pipeline of another class.
        """
        source = Path(folder)
        if not (source / _INDEX).is_file():
            raise FileNotFoundError(f"{source} has no {_INDEX}: expected a folder that SprintPipeline.save_pretrained wrote")
        index = json.loads((source / _INDEX).read_text(encoding="utf-8"))
        if index.get("_class_name") != cls.__name__:
            raise ValueError(
                f"{source} holds a {index.get('_class_name')}, expected a {cls.__name__}: load it with its own class"
            )
        for name in ("scheduler", "vae", "transformer"):
            if name in index and index[name] != "SiT" and not hasattr(diffusers, str(index[name])):
                raise ValueError(f"{source / _INDEX} names the {name} {index[name]!r}, unknown to this diffusers: update it")
        kinds = {name: getattr(diffusers, index[name]) for name in ("scheduler", "vae") if name in index}
        parts = {name: kind.from_pretrained(source / name, **kwargs) for name, kind in kinds.items()}
        if index["transformer"] == "SiT":
            transformer: Any = SiT.load(source / "transformer" / _WEIGHTS).to(kwargs.get("torch_dtype"))
        else:
            kind, place = getattr(diffusers, index["transformer"]), source / "transformer"
            wrapped = (place / OPTIONS_FILE).is_file()
            transformer = from_pretrained(kind, place, **kwargs) if wrapped else kind.from_pretrained(place, **kwargs)
            transformer = Velocity(transformer, **index.get("velocity", {}))
        return cls(transformer.eval(), **parts)


def _as_called(transformer: Any, *, before: Any = None) -> Any:
    """A transformer as samplers call it: our SiT, a Velocity or what holds either, as it is; any other as a Velocity."""
    if isinstance(inner := held(transformer), Velocity) or hasattr(inner, "token_grid"):
        return transformer
    replaced = held(before)
    return replaced.around(transformer) if isinstance(replaced, Velocity) else Velocity(transformer)


def _transformer(model: Any) -> Any:
    """What the pipeline holds of it."""
    return inner.model if isinstance(inner := held(model), Velocity) else model


def _written(name: str, part: Any) -> Any:
    """What is written of a part.

    Raises:
        ValueError: it could not be loaded again.
    """
    part = unwrapped(part)
    modules = part.modules() if isinstance(part, torch.nn.Module) else ()
    if any(type(module).__module__.startswith("peft.") for module in modules):
        raise ValueError(
            f"the {name} has adapters of PEFT, which a pipeline's files do not hold: merge them first, pipe.{name} = "
            f"pipe.{name}.merge_and_unload(), or save them apart"
        )
    kind = getattr(diffusers, type(part).__name__, None)
    if not isinstance(part, SiT) and not (isinstance(kind, type) and isinstance(part, kind)):
        raise ValueError(
            f"the {name} is a {type(part).__name__}, which is no class of diffusers, so that from_pretrained would not find "
            "it: save this part yourself, and make the pipeline anew"
        )
    return part


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """In `eval()`, and afterwards each part in the mode in which it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _conditions(labels: Any, device: torch.device) -> tuple[Any, int]:
    """What the transformer takes as y, and the batch."""
    if isinstance(labels, Mapping):
        tensors = [value for value in labels.values() if isinstance(value, Tensor) and value.ndim]
        if not tensors:
            raise ValueError("labels is a dictionary without a tensor, so that the number of images is unknown")
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in labels.items()}
        return moved, len(tensors[0])
    if isinstance(labels, list | tuple) and all(isinstance(label, int) for label in labels):
        labels = torch.tensor(labels)
    got = f"{tuple(labels.shape)} {labels.dtype}" if isinstance(labels, Tensor) else repr(labels)
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.dtype != torch.int64:
        raise ValueError(f"labels must be (B,) int64 class ids, or a list of whole numbers, got {got}")
    return labels.to(device), len(labels)
