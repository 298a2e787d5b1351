"""Files that are replaced by complete ones only, whatever happens while they are written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives the path of a new file beside `path`, with its ending, that then takes its place.

    Where the new file cannot be written, it is removed, and the old one stays. A process that is
    killed leaves it behind, as .NAME.part.ENDING, and the next one overwrites it.

    Raises:
        OSError: if it cannot be written.
    """
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        yield part
        os.replace(part, path)
    except Exception as error:  # a full disk makes some writers fail anywhere
        raise OSError(f"{path} could not be written, and is as it was: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def lock(file: IO) -> None:
    """Locks an open file for this process, until it is closed.

    Raises:
        ValueError: if another process has locked it.
        OSError: on Windows, which has no such locks.
    """
    try:
        import fcntl
    except ImportError as error:
        raise OSError(f"{file.name} cannot be locked: write it on Linux or macOS") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"{file.name} is being written by another process: wait until that has ended"
        ) from error
