"""A mistake in the command line, a configuration or a file is one line, not a traceback."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def plain_errors(about: str = "") -> Iterator[None]:
    """End the script with the message of an error that its user can mend; SPRINT_TRACEBACK=1 shows where it came from.

    Args:
        about: comes before the message, such as the name of a file.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("SPRINT_TRACEBACK"):
            raise
        raise SystemExit(f"{about}{': ' if about else ''}{error}") from error
