"""Files that are replaced by complete ones only, whatever happens while they are written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
