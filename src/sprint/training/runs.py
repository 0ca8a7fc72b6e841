"""The checkpoints of a run: the newest whole one is always there, whatever interrupts the writing of the next.

run/checkpoints/00005000.safetensors        one training state, as `save_state` writes it
"""

import re
import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sprint.arguments import checked
from sprint.checkpoint import PathLike, load_state, save_state

_HOLDERS: weakref.WeakValueDictionary[Path, "FolderLock"] = weakref.WeakValueDictionary()


class FolderLock:
    """A folder claimed for this process until it ends, however it ends, or lets go of this object.

    A POSIX lock: unlike `flock`, it is not inherited by forked workers, which outlive a killed process by some seconds. It
    is lost if this process itself opens and closes the folder's `.lock`, as in copying the whole folder.

    Args:
        folder: that is there.
        doing: what its holder does, for the error: "is training in".

    Raises:
        ValueError: another process has it, or another object of this one.
    """

    def __init__(self, folder: PathLike, doing: str) -> None:
        try:
            import fcntl
        except ImportError:  # Windows
            return
        place = Path(folder).resolve()
        if _HOLDERS.setdefault(place, self) is not self:
            raise ValueError(f"another part of this process {doing} {folder}: use its lock, or another folder")
        self._file = (place / ".lock").open("w")
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # POSIX allows either
            del _HOLDERS[place]
            raise ValueError(f"another process {doing} {folder}: wait for it, stop it, or use another folder") from error


def sweep(folder: PathLike) -> None:
    """Delete what writing left of a process that was killed; only for the holder of the folder."""
    for leftover in Path(folder).glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


@checked
class RunFolder:
    """Training states of one run, by step.

    Args:
        folder: made if it is not there.
        keep: states kept, at least 1; older ones are deleted after a new one is whole.

    Examples:
        >>> import tempfile
        >>> run = RunFolder(tempfile.mkdtemp(), keep=2)
        >>> for step in (10, 20, 30):
        ...     _ = run.save(step, {"step": step})
        >>> run.steps, run.newest()[1]
        ([20, 30], {'step': 30})
    """

    def __init__(self, folder: PathLike, *, keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1 checkpoint, got {keep}")
        self.folder, self.keep = Path(folder) / "checkpoints", keep
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock: FolderLock | None = None

    def lock(self) -> None:
        """Claim the folder for this process, until it ends or lets go of this object; see `FolderLock`."""
        if self._lock is None:
            self._lock = FolderLock(self.folder.parent, "is training in")

    def path(self, step: int) -> Path:
        """Where the state of a step is."""
        return self.folder / f"{step:08d}.safetensors"

    @property
    def steps(self) -> list[int]:
        """Steps whose states are there, ascending."""
        return sorted(int(path.stem) for path in self.folder.iterdir() if re.fullmatch(r"\d{8,}\.safetensors", path.name))

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write a state, whole or not at all, then delete the oldest ones.

        Raises:
            OSError: it could not be written (a full disk); the older states are untouched.
        """
        sweep(self.folder)
        path = self.path(step)
        save_state(path, state)
        for old in [other for other in self.steps if other < step][: -self.keep + 1 or None]:
            self.path(old).unlink(missing_ok=True)
        return path

    def newest(self) -> tuple[int, dict[str, Any]] | None:
        """Step and state of the newest whole checkpoint; None if there is none. A broken file is named and passed over."""
        for step in reversed(self.steps):
            try:
                return step, load_state(self.path(step))
            except (ValueError, OSError) as error:  # broken, a dangling link, a folder
                warnings.warn(f"{error}; going back to the one before", RuntimeWarning, stacklevel=2)
        return None
