"""`SprintPipeline`: our SiT or a wrapped class-conditional transformer, a scheduler of diffusers, perhaps a VAE."""

import json
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor, nn

from sprint.checkpoint import PathLike, write_text
from sprint.diffusers.loading import from_pretrained
from sprint.flow.guidance import Guidance, predict
from sprint.hosts.outputs import first_tensor
from sprint.models.sit import SiT

_INDEX, _WEIGHTS = "model_index.json", "model.safetensors"


class _Velocity(nn.Module):
    """The transformer as `model(x, t, y)`, t in [0, 1]."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if isinstance(self.transformer, SiT):
            return self.transformer(x, t.to(x.dtype), y)
        return first_tensor(self.transformer(x, t * 1000, class_labels=y))[:, : x.shape[1]]  # without a learned variance

    def null_condition(self, batch: int) -> Tensor:
        """The row after the last class."""
        if isinstance(self.transformer, SiT):
            return self.transformer.null_condition(batch)
        return torch.full((batch,), self.transformer.config.num_embeds_ada_norm, device=self.transformer.device)


class SprintPipeline(DiffusionPipeline):
    """Class-conditional sampling with a flow-matching scheduler of diffusers.

    With `FlowMatchEulerDiscreteScheduler()` the images are those of `sprint.sample(..., solver="euler")`.

    Args:
        transformer: `SiT`, or a wrapped `DiTTransformer2DModel`, trained to predict the velocity.
        scheduler: whose `step` takes the velocity, such as `FlowMatchEulerDiscreteScheduler`.
        vae: `AutoencoderKL` that decodes the latents; without one the latents are the images.
    """

    _optional_components = ["vae"]  # noqa: RUF012, as diffusers declares it

    def __init__(self, transformer: Any, scheduler: Any, vae: Any = None) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)

    @torch.no_grad()
    def __call__(
        self,
        labels: Tensor,
        *,
        size: tuple[int, int],
        guidance: Guidance | None = None,
        num_inference_steps: int = 50,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        output_type: Literal["pt", "latent", "pil"] = "pt",
    ) -> Any:
        """Sample one image per label.

        Args:
            labels: class ids, (B,) int64.
            size: rows and columns of the latents.
            guidance: of `sprint`, such as `sprint.PathDropGuidance(2.0)`.
            num_inference_steps: steps of the scheduler, on a uniform grid.
            generator: for the noise.
            latents: noise, (B, C, rows, columns), instead of drawn noise.
            output_type: "pt" (tensor in [0, 1]), "latent" (as the transformer sees it), or "pil".

        Returns:
            Images, (B, C, H, W), or a list of PIL images.

        Raises:
            ValueError: labels of another shape or dtype, no step, or an unknown output type.
        """
        if labels.ndim != 1 or labels.dtype != torch.int64:
            raise ValueError(f"labels must be (B,) int64 class ids, got {tuple(labels.shape)} {labels.dtype}")
        if output_type not in ("pt", "latent", "pil"):
            raise ValueError(f"unknown output_type {output_type!r}: choose one of pt, latent, pil")
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be 1 or more, got {num_inference_steps}")
        like = next(self.transformer.parameters())
        labels, model = labels.to(like.device), _Velocity(self.transformer).eval()
        if latents is None:
            source = like.device if generator is None else generator.device
            shape = (len(labels), self.transformer.config.in_channels, *size)
            latents = torch.randn(shape, generator=generator, device=source, dtype=like.dtype)
        x = latents.to(like.device, like.dtype)
        sigmas = np.linspace(1, 1 / num_inference_steps, num_inference_steps)
        self.scheduler.set_timesteps(sigmas=sigmas, device=like.device)
        bar: Any = self.progress_bar
        for step in bar(self.scheduler.timesteps):
            t = step.item() / self.scheduler.config.num_train_timesteps
            v = predict(model, x, t, labels) if guidance is None else guidance(model, x, t, labels)
            x = self.scheduler.step(v, step, x, return_dict=False)[0]
        if output_type == "latent":
            return x
        images = x
        if self.vae is not None:
            shift = getattr(self.vae.config, "shift_factor", None) or 0.0
            images = self.vae.decode(x / self.vae.config.scaling_factor + shift, return_dict=False)[0]
        images = (images / 2 + 0.5).clamp(0, 1)
        return self.numpy_to_pil(images.permute(0, 2, 3, 1).float().cpu().numpy()) if output_type == "pil" else images

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, save_directory: PathLike, **kwargs: Any
    ) -> None:
        """Write all parts to a folder; `kwargs` go to the parts of diffusers."""
        folder = Path(save_directory)
        index: dict[str, Any] = {"_class_name": "SprintPipeline"}
        for name in ("transformer", "scheduler", "vae"):
            part = getattr(self, name)
            if part is None:
                continue
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
        kinds = {name: getattr(diffusers, index[name], None) for name in ("scheduler", "vae") if name in index}
        parts = {name: kind.from_pretrained(source / name, **kwargs) for name, kind in kinds.items() if kind is not None}
        if index["transformer"] == "SiT":
            transformer: Any = SiT.load(source / "transformer" / _WEIGHTS).to(kwargs.get("torch_dtype"))
        else:
            transformer = from_pretrained(getattr(diffusers, index["transformer"]), source / "transformer", **kwargs)
        return cls(transformer.eval(), **parts)
