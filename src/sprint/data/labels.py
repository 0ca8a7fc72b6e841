"""Labels by name in a `dataset.json`, as StyleGAN, EDM and REPA keep them: `{"labels": [["00000/img.png", 6], ...]}`."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from sprint.checkpoint import PathLike


def read_labels(path: PathLike, files: Iterable[str] | None = None, *, gaps: bool = False) -> dict[str, int]:
    """Read and check one.

    Args:
        path: of the file.
        files: names that it must label, all of them and no others; None does not look.
        gaps: whether classes may lack, between 0 and the highest.

    Returns:
        Class ids by name.

    Raises:
        ValueError: what is wrong, with an example.
    """
    where = Path(path)
    try:
        content = json.loads(where.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{where} is no JSON: {error}") from error
    pairs: Any = content.get("labels") if isinstance(content, dict) else None
    if pairs is None and isinstance(content, dict) and "labels" in content:
        raise ValueError(f"{where} has null for its labels, as sets without classes have: sort the files into class folders")
    if not isinstance(pairs, list) or not pairs:
        raise ValueError(f'{where} holds no labels, expected {{"labels": [["NAME", CLASS], ...]}}: mend it, or take it away')
    odd = [pair for pair in pairs if not (isinstance(pair, list) and len(pair) == 2 and _plain(pair[0]))]
    _refuse(where, odd, "entries are no pair of a relative name and a class")
    odd = [pair for pair in pairs if type(pair[1]) is not int or pair[1] < 0]
    _refuse(where, odd, "names have no class, expected an integer from 0")
    _refuse(
        where, [name for name, count in Counter(name for name, _ in pairs).items() if count > 1], "names are there twice"
    )
    labels = dict(pairs)
    if files is not None:
        present = set(files)
        _refuse(where, sorted(set(labels) - present), "names have no file: the copy is not whole, or not finished")
        _refuse(where, sorted(present - set(labels)), "files have no label")
    top, found = max(labels.values()), set(labels.values())
    if not gaps and len(found) <= top:  # counted first: the highest may be any number
        lacks = next(number for number in range(top) if number not in found)
        raise ValueError(
            f"{where}: classes go to {top}, but only {len(found)} of them have files (the first without is {lacks}): number "
            "them from 0 without gaps"
        )
    return labels


def _plain(name: Any) -> bool:
    """Whether it is the name of a file in the folder or below."""
    return isinstance(name, str) and bool(name) and not name.startswith("/") and ".." not in PurePosixPath(name).parts


def _refuse(where: Path, odd: Sequence[Any], what: str) -> None:
    if odd:
        raise ValueError(f"{where}: {len(odd)} {what}, such as {json.dumps(odd[0])[:200]}")
