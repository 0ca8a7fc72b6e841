"""Files that users keep: safetensors, written whole or not at all, read with clear errors.

Two kinds: `write_tensors`/`read_tensors` hold a flat dictionary of tensors with text metadata (model checkpoints), and
`save_state`/`load_state` hold a nested training state (model, EMA, optimiser, step), tensors as safetensors and the rest
as JSON, so that nothing is ever unpickled.
"""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sprint.arguments import checked

PathLike = str | os.PathLike[str]

_STATE = "sprint.state"  # metadata key that holds the structure of a training state


@checked
def write_tensors(path: PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to a safetensors file atomically: a crash or a full disk leaves the old file as it was.

    Args:
        path: its folder must exist.
        tensors: on any device; written contiguous, each with its own dtype.
        metadata: text by name.
    """
    own: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        # safetensors refuses tensors that share memory, and two names of one parameter are legitimate: those are cloned.
        if storage.data_ptr() in memory or storage.nbytes() != plain.nbytes:
            plain = plain.clone()
        memory.add(plain.untyped_storage().data_ptr())
        own[name] = plain
    _write(path, lambda temporary: save_file(own, temporary, metadata=dict(metadata or {})))


def write_text(path: PathLike, text: str) -> None:
    """Write a text file atomically."""
    _write(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def write_bytes(path: PathLike, content: bytes) -> None:
    """Write a file atomically."""
    _write(path, lambda temporary: Path(temporary).write_bytes(content))


def _write(path: PathLike, fill: Callable[[str], Any]) -> None:
    """Let `fill` write a temporary file in the same folder, then put it in the place of `path`."""
    target = Path(path)
    if target.is_dir():
        raise ValueError(f"cannot write {target}: it is a folder, add a file name")
    if not target.parent.is_dir():
        raise ValueError(f"cannot write {target}: the folder {target.parent} does not exist, create it first")
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    os.close(handle)
    try:
        try:
            fill(temporary)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(f"cannot write {target}: {error}") from error
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp makes private files; a checkpoint gets the user's usual rights
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@checked
def read_tensors(path: PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read all tensors (on the CPU) and the metadata of a safetensors file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is a pickle, truncated, or no safetensors file.
    """
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {source}")
    with source.open("rb") as file:
        start = file.read(9)
    # A safetensors file may start with a pickle's first byte too: eight bytes of header length come first, then "{".
    if start.startswith((b"PK\x03\x04", b"\x80")) and start[8:] != b"{":
        raise ValueError(
            f"{source} is a pickle (torch.save), expected safetensors: unpickling runs code, so it is not read; if you "
            "trust it, convert it: safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')"
        )
    try:
        with safe_open(source, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"{source} is not a whole safetensors file ({error}), {source.stat().st_size} bytes: copy or download it again"
        ) from error


@checked
def load_weights(
    module: nn.Module, tensors: Mapping[str, Tensor], *, source: str = "the state dictionary", assign: bool = False
) -> None:
    """Copy tensors into a module, all of them or, if any name or shape does not fit, none.

    `Module.load_state_dict` copies what fits before it raises; this checks first.

    Args:
        module: takes the tensors.
        tensors: by parameter and buffer name.
        source: what the error calls them.
        assign: let the module hold these very tensors, with their dtype and device, instead of copying.

    Raises:
        ValueError: names are missing or unexpected, or shapes differ; the module is left unchanged.
    """
    own = module.state_dict()
    problems = [
        *(f"missing {name}" for name in own if name not in tensors),
        *(f"unexpected {name}" for name in tensors if name not in own),
        *(
            f"{name} has shape {tuple(tensors[name].shape)}, expected {tuple(tensor.shape)}"
            for name, tensor in own.items()
            if name in tensors and tensors[name].shape != tensor.shape
        ),
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(
            f"{source} does not fit this {type(module).__name__}: {'; '.join(problems[:4])}{more}: "
            "build the model with the sizes of the checkpoint"
        )
    module.load_state_dict(dict(tensors), assign=assign)


@checked
def save_state(path: PathLike, state: Mapping[str, Any]) -> None:
    """Write a nested training state atomically, for example `{"model": model.state_dict(), "step": 100}`.

    Args:
        path: its folder must exist.
        state: dictionaries (keys text or integers), lists, tuples, tensors, numbers, text, booleans and None.

    Raises:
        TypeError: the state holds something else; nothing is written.
    """
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_flatten(state, tensors, "state"))
    write_tensors(path, tensors, {_STATE: structure})


@checked
def load_state(path: PathLike) -> dict[str, Any]:
    """Read what `save_state` wrote, tensors on the CPU.

    Raises:
        FileNotFoundError, ValueError: as `read_tensors`, or the file holds no training state.
    """
    tensors, metadata = read_tensors(path)
    if _STATE not in metadata:
        raise ValueError(f"{path} holds no training state: it was not written by save_state (is it a model checkpoint?)")
    try:
        return _unflatten(json.loads(metadata[_STATE]), tensors)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} holds a damaged training state ({type(error).__name__}: {error})") from error


def _flatten(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    """The JSON form of a value; tensors move to `tensors` and leave their name."""
    match value:
        case Tensor():
            name = where if where not in tensors else f"{where}#{len(tensors)}"  # {"a.b": …} beside {"a": {"b": …}}
            tensors[name] = value
            return {"tensor": name}
        case Mapping():
            if not all(isinstance(key, str | int) for key in value):
                raise TypeError(f"{where} has keys that are neither text nor integers: save_state cannot write them")
            return {"dict": [[key, _flatten(item, tensors, f"{where}.{key}")] for key, item in value.items()]}
        case list() | tuple():
            items = [_flatten(item, tensors, f"{where}.{i}") for i, item in enumerate(value)]
            return {"list" if isinstance(value, list) else "tuple": items}
        case None | bool() | int() | float() | str():
            return {"value": value}
        case _:
            raise TypeError(f"{where} is a {type(value).__name__}: save_state writes tensors, numbers, text and containers")


def _unflatten(form: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    (kind, content), *_ = form.items()
    match kind:
        case "tensor":
            return tensors[content]
        case "dict":
            return {key: _unflatten(item, tensors) for key, item in content}
        case "list":
            return [_unflatten(item, tensors) for item in content]
        case "tuple":
            return tuple(_unflatten(item, tensors) for item in content)
        case "value":
            return content
        case _:
            raise ValueError(f"{kind!r} is unknown to this version")
