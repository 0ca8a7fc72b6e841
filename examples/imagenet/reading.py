"""The options of train.py, from a YAML file and the command line, checked whole before anything else happens.

Types, choices, defaults and `--help` are jsonargparse's, from the dataclass in config.py. Sections (`model:`,
`training:`, ...) may group options; they change nothing. `ALIASES` lists names of other projects that are understood, and
whole files of the SPRINT reference are read by reference_config.py. Unknown options are errors, and so are options without
effect: `representation_depth` while `representation_align` is not mentioned, say. Next to an explicit
`representation_align: false` it is understood as parked.
"""

import contextlib
import dataclasses
import difflib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import reference_config
import yaml
from config import Config, Finetune, check
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

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


def parse(description: str | None, arguments: Sequence[str] | None = None) -> tuple[Config, Path]:
    """The command line of train.py: `--config FILE`, `--set NAME=VALUE ...`, or any option by its own name.

    Returns:
        The options, and the file.

    Raises:
        SystemExit: anything that is wrong with them, in one message.
    """
    parser = ArgumentParser(
        description=description, usage="%(prog)s --config FILE [--set NAME=VALUE ...] [--OPTION VALUE ...]"
    )
    parser.add_argument("--config", type=str, required=True, help="YAML file, of ours or of the SPRINT reference")
    parser.add_argument(
        "--set", nargs="+", action="extend", type=str, metavar="NAME=VALUE", help="options that differ from the file"
    )
    _describe(parser)
    named = parser.parse_args(arguments, defaults=False).as_dict()
    path, changes = Path(named.pop("config")), named.pop("set", [])
    return read(path, changes, named), path


def read(path: Path, changes: Sequence[str] = (), named: dict[str, Any] | None = None) -> Config:
    """Read a YAML file, of ours or the reference's, with changes under our names.

    Args:
        path: of the file.
        changes: "name=value", as `--set` takes them.
        named: options by name, which go before both.

    Raises:
        SystemExit: anything that is wrong with it, in one message.
    """
    found = content(path)
    try:
        if reference_config.is_sampling(found):
            raise ValueError("this is a file for sampling: give it to sample.py")
        options = reference_config.training(found) if reference_config.is_training(found) else found
        return build(options, changes, named)
    except (ValueError, TypeError) as error:
        raise SystemExit(f"{path}: {error}") from error


def build(found: dict[str, Any], changes: Sequence[str] = (), named: dict[str, Any] | None = None) -> Config:
    """A configuration from what a file holds.

    Raises:
        ValueError, TypeError: unknown, contradictory or idle options, or values that do not fit.
    """
    options = _flat(found)
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"--set takes name=value, got {change!r}")
        section, _, inner = name.rpartition(".")
        kind, place = (Finetune, options.setdefault("finetune", {})) if section == "finetune" else (Config, options)
        try:
            place[_known(inner, kind)] = _plain(yaml.load(value, _Loader))  # a SafeLoader
        except yaml.YAMLError as error:
            raise ValueError(f"--set {change}: {value!r} is no YAML value") from error
    if options.get("mixed_precision") is False:
        options["mixed_precision"] = "no"  # which YAML reads as False
    named = dict(named or {})
    options["finetune"] = {**options.pop("finetune", {}), **named.pop("finetune", {})}
    parser = ArgumentParser(exit_on_error=False)
    _describe(parser)
    try:
        given = parser.parse_object({**options, **named}, defaults=False).as_dict()
    except ArgumentError as error:
        raise ValueError(" ".join(str(error).split())) from error
    tuned = given.pop("finetune", {})
    for values, kind in ((given, Config), (tuned, Finetune)):
        for name, value in values.items():
            if value is None and type(None) not in typing.get_args(typing.get_type_hints(kind)[name]):
                raise ValueError(f"{name} has no value: leave it out for its default")
    config = Config(**given, finetune=Finetune(**tuned))
    check(config, given)
    return config


def _describe(parser: ArgumentParser) -> None:
    """Give a parser the options, with their types, defaults and texts."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser.add_class_arguments(Config)


def _flat(content: dict[str, Any]) -> dict[str, Any]:
    """Options by their own names, sections opened."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        if key == "finetune":
            if not isinstance(value, dict | None):
                raise TypeError(f"finetune is a section of options, got {value!r}")
            tuned = {_known(str(name), Finetune): _plain(inner) for name, inner in (value or {}).items()}
            entries: dict[str, Any] = {"finetune": tuned}
        elif isinstance(value, dict):
            entries = _flat(value)
        else:
            entries = {_known(str(key), Config): _plain(value)}
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


def _plain(value: Any) -> Any:
    """Numbers as people mean them: 4.0e+5 steps is whole, and so is 4e5, which YAML takes for text."""
    if isinstance(value, str) and "e" in value.lower():
        with contextlib.suppress(ValueError):
            value = float(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value
