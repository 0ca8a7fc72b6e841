"""A YAML file of train.py's options, checked whole before anything else happens.

Sections (`model:`, `training:`, ...) may group options; they change nothing. `ALIASES` lists names of other projects that
are understood, and whole files of the SPRINT reference are read by reference_config.py. Unknown options are errors, and so
are options without effect: `representation_depth` while `representation_align` is not mentioned, say. Next to an explicit
`representation_align: false` it is understood as parked.
"""

import contextlib
import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any, Literal

import reference_config
import yaml
from config import Config, Finetune, check

ALIASES = {  # other projects' names
    "drop_ratio": "mask_ratio",
    "cfg_prob": "class_dropout_prob",
    "path_drop": "path_drop_prob",
    "proj_coeff": "representation_weight",
    "enc_type": "representation_encoder",
    "lr": "learning_rate",
    "lr_warmup_steps": "warmup_steps",
    "lr_scheduler": "lr_schedule",
    "ema": "ema_decay",
    "weight_decay": "adam_weight_decay",
    "gradient_checkpointing": "activation_checkpointing",
    "global_batch_size": "batch_size",
    "data_path": "data_dir",
}


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML itself takes the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := sorted({str(key) for key in keys if keys.count(key) > 1}):
            raise yaml.YAMLError(f"{', '.join(twice)} given twice in one section")
        return super().construct_mapping(node, deep)


def content(path: Path) -> dict[str, Any]:
    """What a YAML file holds.

    Raises:
        SystemExit: no file, no YAML, or no options by name.
    """
    if not path.is_file():
        raise SystemExit(f"there is no configuration at {path}")
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}  # a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SystemExit(f"{path} is no YAML: {error}") from error
    if not isinstance(found, dict):
        raise SystemExit(f"{path} must hold options by name, got {type(found).__name__}")
    return found


def read(path: Path, changes: list[str] | None = None) -> Config:
    """Read a YAML file, of ours or the reference's, with `name=value` changes from the command line, under our names.

    Raises:
        SystemExit: anything that is wrong with it, in one message.
    """
    found = content(path)
    try:
        if reference_config.is_sampling(found):
            raise ValueError("this is a file for sampling: give it to sample.py")
        return build(reference_config.training(found) if reference_config.is_training(found) else found, changes or [])
    except (ValueError, TypeError) as error:
        raise SystemExit(f"{path}: {error}") from error


def build(options_given: dict[str, Any], changes: list[str]) -> Config:
    """A configuration from what a file holds.

    Raises:
        ValueError, TypeError: unknown, contradictory or idle options, or values that do not fit.
    """
    options = _flat(options_given)
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"--set takes name=value, got {change!r}")
        section, _, inner = name.rpartition(".")
        place = options.setdefault("finetune", {}) if section == "finetune" else options
        try:
            place[_known(inner, Finetune if section == "finetune" else Config)] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {change}: {value!r} is no YAML value") from error
    finetune = options.pop("finetune", {})
    values = {name: _fit(name, value, Config) for name, value in options.items()}
    tuned = {name: _fit(f"finetune.{name}", value, Finetune) for name, value in finetune.items()}
    config = Config(**values, finetune=Finetune(**tuned))
    check(config, values)
    return config


def _flat(content: dict[str, Any]) -> dict[str, Any]:
    """Options by their own names, sections opened."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        if key == "finetune":
            if not isinstance(value, dict | None):
                raise TypeError(f"finetune is a section of options, got {value!r}")
            entries = {"finetune": {_known(str(name), Finetune): inner for name, inner in (value or {}).items()}}
        elif isinstance(value, dict):
            entries = _flat(value)
        else:
            entries = {_known(str(key), Config): value}
        for name, entry in entries.items():
            if name in found and found[name] != entry:
                raise ValueError(f"{name} is given twice, as {found[name]!r} and as {entry!r}")
            found[name] = entry
    return found


def _known(name: str, kind: Any) -> str:
    plain = name.replace("-", "_")
    plain = ALIASES.get(plain, plain)
    names = [field.name for field in dataclasses.fields(kind) if field.name != "finetune"]
    if plain not in names:
        near = difflib.get_close_matches(plain, [*names, *ALIASES], n=3)
        where = "the section finetune" if kind is Finetune else "train.py"
        raise ValueError(f"unknown option {name!r} of {where}: " + (f"did you mean {' or '.join(near)}?" if near else
                         f"it has {', '.join(names)}"))  # fmt: skip
    return plain


def _fit(name: str, value: Any, kind: Any) -> Any:
    """A value as its option's type."""
    wanted = typing.get_type_hints(kind)[name.rpartition(".")[2]]
    choices = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    for choice in choices:
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            return _converted(value, choice)
    names = [" or ".join(map(repr, typing.get_args(c))) if typing.get_origin(c) is Literal else c.__name__ for c in choices]
    raise TypeError(f"{name} must be {' or '.join(names)}, got {value!r}")


def _converted(value: Any, choice: Any) -> Any:
    """A value as one type; ValueError or TypeError if it is none. YAML reads 1e-4 as text."""
    if typing.get_origin(choice) is Literal:
        if value is False and "no" in typing.get_args(choice):
            return "no"  # which YAML reads as False
        if value not in typing.get_args(choice):
            raise ValueError
        return value
    if choice in (bool, str, type(None)) or isinstance(value, bool):
        if type(value) is not choice:
            raise TypeError
        return value
    number = float(value)
    if choice is int and number != int(number):
        raise ValueError
    return choice(number)
