"""A SiT as a folder and on the Hugging Face hub: weights with their options and recipe, and a card that says what they are.

huggingface_hub is imported where something is fetched or pushed.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Protocol

from sprint.checkpoint import PathLike, write_text
from sprint.models.config import SiTConfig
from sprint.models.recipe import Recipe

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


class Model(Protocol):
    """What a `SiT` has."""

    config: SiTConfig
    recipe: Recipe

    def save(self, path: PathLike) -> None: ...
    def parameters(self) -> Any: ...


def save(model: Model, folder: PathLike, *, license: str | None = None, repository: str | None = None) -> Path:  # noqa: A002
    """Write a model's folder: weights (all that loading needs), its options to read, and a card.

    Args:
        model: to write.
        folder: made if it is not there. A card that is there already stays, so that it may be edited.
        license: of these weights, such as "apache-2.0", for a new card.
        repository: that the card names.

    Raises:
        ValueError: a license for a card that is there already.
    """
    target = Path(folder)
    if license is not None and (target / CARD).exists():
        raise ValueError(f"{target / CARD} is there already and says its own license: edit it, or leave license out")
    target.mkdir(parents=True, exist_ok=True)
    model.save(target / WEIGHTS)
    said = {"model": dataclasses.asdict(model.config), "recipe": json.loads(model.recipe.to_json())}
    write_text(target / CONFIG, json.dumps(said, indent=2) + "\n")
    if not (target / CARD).exists():
        write_text(target / CARD, card(model, license=license, repository=repository or str(folder)))
    return target


def locate(source: PathLike, *, revision: str | None = None, token: str | None = None) -> Path:
    """The weights of a folder, or of a repository on the hub, fetched to its cache.

    Args:
        source: folder that `save` wrote, a file, or "owner/name" of a repository.
        revision: branch, tag or commit, of a repository.
        token: of the hub.

    Raises:
        FileNotFoundError: neither a folder with a model nor a repository that can be fetched.
        ModuleNotFoundError: it is to be fetched, and huggingface_hub is not installed.
    """
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / WEIGHTS).is_file():
            raise FileNotFoundError(f"{path} has no {WEIGHTS}: expected a folder that SiT.save_pretrained wrote")
        return path / WEIGHTS
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HFValidationError
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{source} is not there, and fetching it from the hub needs huggingface_hub: pip install huggingface_hub",
            name="huggingface_hub",
        ) from error
    try:
        return Path(hf_hub_download(str(source), WEIGHTS, revision=revision, token=token))
    except (OSError, HFValidationError) as error:
        raise FileNotFoundError(
            f"there is no folder {source}, and {WEIGHTS} could not be fetched from a repository of this name on the hub "
            f"({type(error).__name__}): give the path of the folder, or owner/name"
        ) from error


def push(
    model: Model,
    repository: str,
    *,
    license: str | None = None,  # noqa: A002, the hub's word
    private: bool | None = None,
    token: str | None = None,
    message: str = "Upload a SPRINT model",
) -> str:
    """Upload a model's folder, to a repository that is made if it is not there; a card that is there stays.

    Returns:
        Address of the commit.

    Raises:
        ModuleNotFoundError: huggingface_hub is not installed.
        ValueError: a license for a card that is there already.
    """
    import tempfile

    try:
        from huggingface_hub import HfApi
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "push_to_hub needs huggingface_hub: pip install huggingface_hub", name="huggingface_hub"
        ) from error
    hub = HfApi(token=token)
    name = hub.create_repo(repository, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        kept = [CARD] if hub.file_exists(name, CARD) else None
        if kept and license is not None:
            raise ValueError(f"{name} has a {CARD} that says its own license: edit it there, or leave license out")
        save(model, folder, license=license, repository=name)
        return str(hub.upload_folder(repo_id=name, folder_path=folder, ignore_patterns=kept, commit_message=message))


def card(model: Model, *, license: str | None = None, repository: str) -> str:  # noqa: A002
    """A model card: front matter, the method, how to load it, and what is known of its training."""
    front = {"library_name": "sprint-diffusion", "pipeline_tag": "unconditional-image-generation", "tags": ["sprint", "sit"]}
    if license is not None:
        front["license"] = license
    config, recipe = dataclasses.asdict(model.config), dataclasses.asdict(model.recipe)
    told = {name: value for name, value in {**config, **recipe}.items() if value is not None}
    count = sum(parameter.numel() for parameter in model.parameters())
    lines = [
        "---",
        *(f"{name}: {json.dumps(value)}" for name, value in front.items()),  # JSON is YAML
        "---",
        "",
        f"# A SiT with SPRINT's sparse middle, {count / 1e6:.1f} M parameters",
        "",
        "A diffusion transformer whose middle blocks were trained on a part of the tokens (SPRINT,",
        "[arXiv 2510.21986](https://arxiv.org/abs/2510.21986)), with",
        "[sprint-diffusion](https://pypi.org/project/sprint-diffusion/).",
        "",
        "```python",
        "import sprint",
        "",
        f"model = sprint.SiT.from_pretrained({json.dumps(repository)}).eval()",
        "guidance = sprint.PathDropGuidance(2.0)",
        "latents = sprint.sample(model, noise, y=labels, guidance=guidance)",
        "```",
        "",
        f"License of these weights: {license or 'not said'}.",
        "",
        "| option | |",
        "|---|---|",
        *(f"| `{name}` | {_short(value)} |" for name, value in told.items()),
        "",
    ]
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{len(value)} numbers, see {CONFIG}" if isinstance(value, list | tuple) else str(value)
