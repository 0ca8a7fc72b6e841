"""The weights that the SPRINT authors released: their files, where they are, and what their tensors say.

They are under the licence of their repository, which is not ours: read it before you use them.
"""

from pathlib import Path

from sprint.checkpoint import PathLike
from sprint.models import hub

REPOSITORY = "snap-research/SPRINT"  # on the Hugging Face hub
FILES = (
    "sprint_XL_imagenet256.safetensors",
    "sprint_XL_REPA_imagenet256.safetensors",
    "sprint_XL_imagenet512.safetensors",
)


def locate(source: PathLike) -> PathLike:
    """Where a checkpoint is: the file of this name, or a released one of it, fetched to the hub's cache.

    Args:
        source: a file, a folder of `SiT.save_pretrained`, or the name of a released file, with or without folders before it.

    Returns:
        The file that is there, or `source` itself where there is none of the name.

    Raises:
        ModuleNotFoundError: it is to be fetched, and huggingface_hub is not installed.
        OSError: it cannot be fetched.
    """
    path = Path(source)
    if path.is_dir():
        return hub.locate(path)
    if path.exists() or path.name not in FILES:
        return source
    try:
        from huggingface_hub import hf_hub_download
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{source} is not there, and fetching it from {REPOSITORY} needs huggingface_hub: pip install huggingface_hub, "
            "or download the file yourself",
            name="huggingface_hub",
        ) from error
    try:
        return hf_hub_download(REPOSITORY, path.name)
    except OSError as error:
        raise FileNotFoundError(
            f"there is no checkpoint at {source}, and it could not be fetched from {REPOSITORY} on the Hugging Face hub "
            f"({type(error).__name__}): give the path of the file"
        ) from error
