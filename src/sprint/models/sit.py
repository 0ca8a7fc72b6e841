"""SiT with a sparse middle: the SPRINT model of the paper, in its four sizes and any other.

encoder (dense) -> SparseMiddle (all tokens, a subset, or none) -> decoder (dense) -> final layer
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from sprint import checkpoint
from sprint.arguments import checked
from sprint.kernels.fused import Kernels, check_kernels
from sprint.middle.fusion import SparseDenseResidual
from sprint.middle.sparse import Path, SparseMiddle, run
from sprint.middle.tokens import TokenSubset
from sprint.models import hub, reference, released
from sprint.models.config import PRESETS, Options, Preset, SiTConfig
from sprint.models.inputs import check_classes, check_inputs
from sprint.models.layers import (
    Attention,
    AttentionBackend,
    Block,
    FinalLayer,
    LabelEmbedder,
    PatchEmbedder,
    TimestepEmbedder,
    VectorEmbedder,
    axial_rope,
    check_backend,
    sincos_positions,
)
from sprint.models.recipe import Recipe
from sprint.random import Device

if TYPE_CHECKING:
    from typing_extensions import Unpack

_CONFIG = "sprint.config"  # metadata key of our checkpoints
_RECIPE = "sprint.recipe"  # likewise, how it was trained


class Aligned(NamedTuple):
    """Output of `SiT.forward(..., repa=True)`."""

    v: Tensor
    """Velocity, (B, C_in, H, W)."""
    repa: Tensor
    """Projected tokens for REPA, (B, N, repa_dim), or (B, K, repa_dim) for kept tokens in the order of `repa_subset`."""
    repa_subset: TokenSubset | None
    """The tokens that `repa` holds; None for all of them (full path, or a head that taps the encoder or decoder)."""


@checked
class SiT(nn.Module):
    """Scalable interpolant transformer with SPRINT's sparse middle. Predicts the velocity at time t (0 data, 1 noise).

    Args:
        config: sizes and options.

    Examples:
        >>> model = SiT.preset("S/2", middle_depth=1, num_classes=10)
        >>> x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([3, 7])
        >>> model(x, t, y).shape
        torch.Size([2, 4, 8, 8])
    """

    shares_encoder = True  # forward takes path="both": guidance with the same condition runs the encoder once

    def __init__(self, config: SiTConfig) -> None:
        super().__init__()
        self.recipe = Recipe()
        """How it was trained, where somebody said so; `save` writes it and `load` reads it."""
        self.config = c = config
        blocks = [Block(c.dim, c.heads, mlp_ratio=c.mlp_ratio, qk_norm=c.qk_norm) for _ in range(c.depth)]
        first, last = c.encoder_depth, c.encoder_depth + c.middle_depth
        self.x_embedder = PatchEmbedder(c.patch_size, c.in_channels, c.dim)
        self.t_embedder = TimestepEmbedder(c.dim, scale=c.time_scale)
        self.y_embedder: LabelEmbedder | VectorEmbedder | None = None
        if c.num_classes is not None:
            self.y_embedder = LabelEmbedder(c.num_classes, c.dim, label_drop=c.label_drop)
        elif c.cond_dim is not None:
            self.y_embedder = VectorEmbedder(c.cond_dim, c.dim, label_drop=c.label_drop)
        self.encoder = nn.ModuleList(blocks[:first])
        fusion = SparseDenseResidual(c.dim, path_drop=c.path_drop, sources=c.sources, learnable_mask=c.learnable_mask)
        self.middle = SparseMiddle(blocks[first:last], fusion)
        self.decoder = nn.ModuleList(blocks[last:])
        self.final_layer = FinalLayer(c.dim, c.in_channels * c.patch_size**2)
        if c.repa_dim is not None:
            wide = c.repa_hidden
            head = (nn.Linear(c.dim, wide), nn.SiLU(), nn.Linear(wide, wide), nn.SiLU(), nn.Linear(wide, c.repa_dim))
            self.projectors = nn.Sequential(*head)
        self.reset_parameters()

    @classmethod
    def preset(cls, name: Preset | str, **overrides: "Unpack[Options]") -> "SiT":
        """Build one of the paper's sizes: "S/2", "B/2", "L/2" or "XL/2".

        Args:
            name: size and patch size.
            **overrides: any field of `SiTConfig`.

        Raises:
            ValueError: there is no such preset.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
        return cls(SiTConfig(**{**PRESETS[name]._asdict(), **overrides}))

    def reset_parameters(self) -> None:
        """Initialise as DiT does: Xavier for linear maps, N(0, 0.02) for embedders, zero for adaLN and the output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        embedders = (self.t_embedder, self.y_embedder) if self.y_embedder is not None else (self.t_embedder,)
        for embedder in embedders:
            for module in embedder.modules():
                if isinstance(module, nn.Linear | nn.Embedding):
                    nn.init.normal_(module.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, Block | FinalLayer):
                output = module.adaLN_modulation[1]
                assert isinstance(output, nn.Linear)
                nn.init.zeros_(output.weight)
                nn.init.zeros_(output.bias)
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.zeros_(self.final_layer.linear.bias)
        self.middle.fusion.reset_parameters()

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        *,
        subset: TokenSubset | None = None,
        path: Path | Literal["both"] | None = None,
        repa: bool = False,
        generator: torch.Generator | None = None,
    ) -> Any:
        """Predict the velocity.

        Args:
            x: noisy input, (B, C_in, H, W), sides divisible by the patch size, of the parameters' dtype or under autocast.
            t: time in [0, 1], (B,), floating point.
            y: class ids (B,) int64, or condition vectors (B, cond_dim), or None for a model without condition.
            subset: tokens that the middle blocks see (sparse path).
            path: "full", "sparse", "shallow" (the middle never runs); by default "sparse" with a subset, else "full".
                "both" returns the pair (full or sparse, shallow) and runs the encoder once.
            repa: also return the projected tokens for REPA.
            generator: for the label-drop and path-drop draws in training.

        Returns:
            v, (B, C_in, H, W); a pair of them for path="both"; `Aligned` with `repa`.

        Raises:
            ValueError: ranks, sizes, devices or class ids that do not fit (class ids on a GPU are checked by `sample` only,
                since reading them here would stall the device).
            TypeError: dtypes that do not fit.
        """
        check_inputs(self.config, x, t, y, like=self.x_embedder.proj.weight)
        c = self.config
        grid = self.token_grid(x)
        tokens, rope = self.x_embedder(x), None
        if c.positions == "rope":
            rope = axial_rope(grid, c.dim // c.heads, device=x.device)
        else:
            tokens = tokens + sincos_positions(grid, c.dim, device=x.device).to(tokens.dtype)
        cond = self.t_embedder(t)
        if self.y_embedder is not None:
            cond = cond + self.y_embedder(y, generator=generator)

        if path == "both":
            if repa:
                raise ValueError(
                    "path='both' is for sampling and gives no REPA tokens: call the full or sparse path for them"
                )
            tokens, _ = run(self.encoder, tokens, cond, rope=rope)
            fused = (
                self.middle(tokens, cond, rope=rope, subset=subset),
                self.middle(tokens, cond, rope=rope, path="shallow"),
            )
            strong, weak = (run(self.decoder, tokens, cond, rope=rope)[0] for tokens in fused)
            return self._velocity(strong, cond, grid), self._velocity(weak, cond, grid)

        tap = self._tap() if repa else 0
        tokens, early = run(self.encoder, tokens, cond, rope=rope, tap=tap)
        tap -= c.encoder_depth
        inner = tap if 0 < tap <= c.middle_depth else 0
        tokens = self.middle(tokens, cond, rope=rope, subset=subset, path=path, tap=inner, generator=generator)
        tokens, middle = tokens if inner else (tokens, None)
        tokens, late = run(self.decoder, tokens, cond, rope=rope, tap=tap - c.middle_depth)
        v = self._velocity(tokens, cond, grid)
        if not repa:
            return v
        features = next(tapped for tapped in (early, middle, late) if tapped is not None)
        return Aligned(v, self.projectors(features), subset if inner else None)

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters; pipelines ask for it."""
        return self.x_embedder.proj.weight.dtype

    @property
    def device(self) -> torch.device:
        """Of the parameters; pipelines ask for it."""
        return self.x_embedder.proj.weight.device

    def token_grid(self, x: Tensor) -> tuple[int, int]:
        """(rows, columns) of the tokens of x, (B, C_in, H, W)."""
        p = self.config.patch_size
        return x.shape[-2] // p, x.shape[-1] // p

    def null_condition(self, batch: int) -> Tensor:
        """The condition that label-drop trains and guidance uses: (B,) int64, or (B, cond_dim).

        Raises:
            ValueError: the model has no condition.
        """
        if self.y_embedder is None:
            raise ValueError("this model has no condition, so it has no null condition: sample without guidance")
        return self.y_embedder.null(batch)

    def check_condition(self, y: Tensor) -> None:
        """Raise ValueError for class ids out of range, on any device (this waits for the device)."""
        check_classes(self.config, y)

    def set_attention(self, backend: AttentionBackend) -> "SiT":
        """Choose the attention kernel of all blocks, "sdpa" or "xformers"; returns self.

        Raises:
            ValueError: unknown backend.
            ImportError: it is not installed.
        """
        check_backend(backend)
        return self._set(Attention, backend=backend)

    def set_kernels(self, kernels: Kernels) -> "SiT":
        """Choose what computes the element-wise part of all blocks; returns self.

        "torch" leaves it to PyTorch and its compiler. "triton" takes our kernels for adaLN, the residual between attention
        and MLP, q/k-norm and rotary positions: the same numbers up to rounding, in fewer passes over memory.

        Raises:
            ValueError: unknown choice, a device that has no such kernels, or blocks without q/k-norm or rotary positions.
            ImportError: Triton is not installed.
        """
        check_kernels(kernels, self.x_embedder.proj.weight.device)
        if kernels == "triton" and not (self.config.qk_norm and self.config.positions == "rope"):
            raise ValueError(
                f"kernels 'triton' need qk_norm=True and positions='rope', this model has qk_norm={self.config.qk_norm} and "
                f"positions={self.config.positions!r}: use 'torch'"
            )
        return self._set(Attention, Block, kernels=kernels)

    def set_checkpointing(self, enabled: bool = True) -> "SiT":
        """Recompute each block in the backward pass instead of storing its activations; returns self.

        Less memory for about a third more work. Drops and fusion are not recomputed.
        """
        return self._set(Block, recompute=enabled)

    def _set(self, *kinds: type[nn.Module], **option: Any) -> "SiT":
        """Set an option of all modules of some kinds."""
        for module in self.modules():
            if isinstance(module, kinds):
                vars(module).update(option)
        return self

    def save(self, path: checkpoint.PathLike) -> None:
        """Write weights, configuration and recipe to one safetensors file, atomically."""
        about = {_CONFIG: json.dumps(dataclasses.asdict(self.config)), _RECIPE: self.recipe.to_json()}
        checkpoint.write_tensors(path, self.state_dict(), about)

    @classmethod
    def load(cls, path: checkpoint.PathLike, *, device: Device = None) -> "SiT":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a whole safetensors file, or not one written by `save`.
        """
        tensors, metadata = checkpoint.read_tensors(path)
        if _CONFIG not in metadata:
            raise ValueError(
                f"{path} holds no SiT configuration, so SiT.save did not write it: "
                "for a checkpoint of the SPRINT authors use SiT.from_reference(path)"
            )
        config = SiTConfig.from_json(metadata[_CONFIG], tensors, source=str(path))
        model = cls._from_tensors(config, tensors, str(path), device)
        model.recipe = Recipe.from_json(metadata.get(_RECIPE), source=str(path))
        return model

    def save_pretrained(self, folder: checkpoint.PathLike, *, license: str | None = None) -> None:  # noqa: A002
        """Write a folder: model.safetensors, as `save` writes it, config.json to read, and a card, README.md.

        Args:
            folder: made if it is not there; a card that is there stays.
            license: of these weights, such as "apache-2.0", for a new card.

        Raises:
            ValueError: a license for a card that is there already.
        """
        hub.save(self, folder, license=license)

    @classmethod
    def from_pretrained(
        cls, source: checkpoint.PathLike, *, revision: str | None = None, token: str | None = None, device: Device = None
    ) -> "SiT":
        """Load what `save_pretrained` wrote or `push_to_hub` uploaded.

        Args:
            source: folder, or "owner/name" of a repository on the Hugging Face hub, which is fetched to its cache.
            revision: branch, tag or commit of a repository.
            token: of the hub, for private ones.
            device: to put the model on.

        Raises:
            FileNotFoundError: neither.
            ModuleNotFoundError: it is to be fetched, and huggingface_hub is not installed.
            ValueError: as `load`.
        """
        return cls.load(hub.locate(source, revision=revision, token=token), device=device)

    def push_to_hub(
        self,
        repository: str,
        *,
        license: str | None = None,  # noqa: A002
        private: bool | None = None,
        token: str | None = None,
    ) -> str:
        """Upload the folder of `save_pretrained` to the Hugging Face hub; returns the address of the commit.

        Args:
            repository: "owner/name"; made if it is not there. A card that is there stays.
            license: of these weights, for a new card.
            private: of a new repository.
            token: by default the one of `hf auth login`.

        Raises:
            ModuleNotFoundError: huggingface_hub is not installed.
            ValueError: a license for a card that is there already.
        """
        return hub.push(self, repository, license=license, private=private, token=token)

    @classmethod
    def from_reference(
        cls,
        source: checkpoint.PathLike | Mapping[str, Tensor],
        *,
        prefix: str | None = None,
        patch_size: int | None = None,
        repa_depth: int | None = None,
        device: Device = None,
    ) -> "SiT":
        """Load a checkpoint in the layout of the SPRINT authors; all sizes come from the tensors.

        Args:
            source: safetensors file, state dictionary, or the name of a released file
                ("sprint_XL_imagenet256.safetensors"), fetched from the authors' repository with huggingface_hub, under their
                licence.
            prefix: of the model's keys, such as "model."; found by itself unless several models are in the file.
            patch_size: no tensor tells it apart from the channels; by default what the file's metadata says, else 2.
            repa_depth: blocks that have run where the REPA head taps (the reference's `representation_depth` less one);
                by default what the file's metadata says, else unknown until `repa=True` asks for it.
            device: to put the model on.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a pickle, truncated, several models, or tensors that are no SPRINT model.
        """
        name, metadata = "the state dictionary", {}
        if isinstance(source, Mapping):
            tensors = {key: tensor.detach().clone() for key, tensor in source.items()}
        else:
            name = str(source)
            tensors, metadata = checkpoint.read_tensors(released.locate(source))
        tensors = reference.to_ours(tensors, prefix=prefix, source=name)
        config = reference.infer_config(tensors, metadata, patch_size=patch_size, repa_depth=repa_depth, source=name)
        model = cls._from_tensors(config, tensors, name, device)
        model.recipe = Recipe.from_json(metadata.get(_RECIPE), source=name)
        return model

    def to_reference(self, path: checkpoint.PathLike | None = None) -> dict[str, Tensor]:
        """The weights in the layout of the SPRINT authors, also written to `path` if given, with the recipe beside them.

        The recipe is metadata, which `from_reference` of that file reads; the dictionary that is returned holds none.

        Raises:
            ValueError: the model has options that the layout cannot express.
        """
        tensors = reference.to_theirs(self.state_dict(), self.config)
        if path is not None:
            about = {**reference.metadata(self.config), _RECIPE: self.recipe.to_json()}
            checkpoint.write_tensors(path, tensors, about)
        return tensors

    @classmethod
    def _from_tensors(cls, config: SiTConfig, tensors: Mapping[str, Tensor], source: str, device: Device) -> "SiT":
        try:
            with torch.device("meta"):  # no random initialisation, and each tensor keeps its dtype
                model = cls(config)
        except (RuntimeError, ArithmeticError) as error:  # sizes beyond all measure
            raise ValueError(f"{source} holds a configuration that cannot be built ({error})") from error
        checkpoint.load_weights(model, tensors, source=source, assign=True)
        return model.to(device)

    def _velocity(self, tokens: Tensor, cond: Tensor, grid: tuple[int, int]) -> Tensor:
        patches = self.final_layer(tokens, cond)
        p = self.config.patch_size
        return rearrange(patches, "b (h w) (c p q) -> b c (h p) (w q)", h=grid[0], w=grid[1], p=p, q=p)

    def _tap(self) -> int:
        if self.config.repa_dim is None:
            raise ValueError("repa=True needs a REPA head: build the model with repa_dim (768 for DINOv2-B) and repa_depth")
        if self.config.repa_depth is None:
            raise ValueError(
                "the REPA head's depth is unknown (the checkpoint does not say): pass from_reference(..., repa_depth=…)"
            )
        return self.config.repa_depth
