"""A model from a file, whoever wrote it: `SiT.save`, train.py's checkpoint (its average), or the SPRINT authors."""

from typing import Any

from sprint.arguments import checked
from sprint.checkpoint import PathLike, load_state, read_tensors
from sprint.models import released
from sprint.models.config import SiTConfig
from sprint.models.recipe import Recipe
from sprint.models.sit import SiT


@checked
def load_model(path: PathLike, *, device: Any = None) -> SiT:
    """A model from a checkpoint.

    Args:
        path: a file, or the name of a released one, which is fetched where it is not there (see `sprint.models.released`).
        device: to put the model on.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is another kind of file.
    """
    path = released.locate(path)
    _, metadata = read_tensors(path)
    if "sprint.state" in metadata:
        return from_state(load_state(path), str(path)).to(device)
    if "sprint.config" in metadata:
        return SiT.load(path, device=device)
    return SiT.from_reference(path, device=device)


def from_state(state: dict[str, Any], source: str) -> SiT:
    """The averaged model of a state that train.py wrote.

    Raises:
        ValueError: it is of another script.
    """
    if not {"sit", "ema"} <= state.keys():
        raise ValueError(f"{source} is a training state of another script: it holds {', '.join(state)}")
    config = SiTConfig.from_json(state["sit"], state["ema"], source=source)
    model = SiT._from_tensors(config, state["ema"], source, None)
    model.recipe = Recipe.from_json(state.get("recipe"), source=source)
    return model
