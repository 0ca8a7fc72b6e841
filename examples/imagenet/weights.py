"""Weights for the scripts here, whoever wrote them: `SiT.save`, a run's checkpoint (its average), or the SPRINT authors."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

import sprint
from sprint.checkpoint import load_weights, read_tensors
from sprint.models import released


def locate(path: Path) -> Path:
    """A file, or one of the released checkpoints by its name, fetched from the Hugging Face hub where it is not there."""
    return Path(released.locate(path))


def load(path: Path, device: Any = None) -> sprint.SiT:
    """A model from a checkpoint.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is another kind of file.
    """
    path = locate(path)
    _, metadata = read_tensors(path)
    if "sprint.state" in metadata:
        return from_state(sprint.load_state(path), str(path)).to(device)
    if "sprint.config" in metadata:
        return sprint.SiT.load(path, device=device)
    return sprint.SiT.from_reference(path, device=device)


def fingerprint(path: Path) -> str:
    """Tells a checkpoint from another of the same name: a hash of parts of it."""
    found, size, part = hashlib.sha256(), path.stat().st_size, 2**16
    found.update(str(size).encode())
    with path.open("rb") as file:
        for place in range(64):
            file.seek(max(0, size - part) * place // 63)
            found.update(file.read(part))
    return found.hexdigest()[:16]


def from_state(state: dict[str, Any], source: str) -> sprint.SiT:
    """The averaged model of a state that train.py wrote."""
    if not {"sit", "ema"} <= state.keys():
        raise ValueError(f"{source} is a training state of another script: it holds {', '.join(state)}")
    with torch.device("meta"):
        model = sprint.SiT(sprint.SiTConfig(**json.loads(state["sit"])))
    load_weights(model, state["ema"], source=source, assign=True)
    return model
