"""Files that hold complete contents only, whatever happens while they are written."""

import csv
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from io import FileIO, StringIO
from itertools import count
from pathlib import Path
from typing import IO
from uuid import uuid4


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives the path of a new file beside `path`, with its ending, that then takes its place.

    Where the new file cannot be written, it is removed, the old one stays, and an OSError says so.
    It has a name of its own, .NAME.DIGITS.part.ENDING, so that several processes, of several
    machines, can write the same file; one that is killed leaves it behind.
    """
    part = path.with_name(f".{path.stem}.{uuid4().hex[:12]}.part{path.suffix}")
    try:
        yield part
        os.replace(part, path)
    except Exception as error:  # a full disk makes some writers fail anywhere
        raise OSError(f"{path} could not be written, and is as it was: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def try_folder(folder: Path) -> None:
    """Makes a folder if it is missing, and raises an OSError unless files can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        why = error.strerror or error
        raise OSError(f"{folder} cannot be written ({why}): name another folder") from error


def try_file(path: Path) -> None:
    """Does as :func:`try_folder` for a file, whose folder is made; one that is there stays.

    A device, a pipe, and a link to nothing are refused like a folder.
    """
    if (path.exists() or path.is_symlink()) and not path.is_file():
        what = "a folder" if path.is_dir() else "no file"
        raise OSError(f"{path} cannot be written, it is {what}: name a file")
    try_folder(path.parent)
    if path.exists() and not os.access(path, os.W_OK):
        raise OSError(f"{path} cannot be written (Permission denied): name another file")


@contextmanager
def appending(path: Path, complete: Callable[[bytes], int]) -> Iterator[Callable[[str], None]]:
    """Locks a file, and gives a function that appends a text, which waits until the disk has it.

    A missing file is made, with its folder. The text is appended whole or not at all. What a killed
    process left behind the `complete` bytes of the content is first moved to a new file,
    NAME.torn-1 or the next free number; where that function raises, the file stays as it is. A file
    to which nothing was appended, and that has nothing, goes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        lock(file)
        content = path.read_bytes()
        size = complete(content)
        if torn := content[size:]:
            names = (path.with_name(f"{path.name}.torn-{i}") for i in count(1))
            with next(name for name in names if not name.exists()).open("xb") as beside:
                beside.write(torn)
                os.fsync(beside.fileno())
            file.truncate(size)
        try:
            yield partial(_append, file)
        finally:
            if not os.fstat(file.fileno()).st_size:
                path.unlink()


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> str:
    """Returns rows as lines of CSV, without a header; what a row does not have is empty."""
    text = StringIO()
    csv.DictWriter(text, columns, restval="", lineterminator="\n").writerows(rows)
    return text.getvalue()


def _append(file: FileIO, text: str) -> None:
    size, content = file.seek(0, os.SEEK_END), memoryview(text.encode())
    try:
        while content:  # nothing is buffered, so that a part may be written
            content = content[file.write(content) :]
        os.fsync(file.fileno())
    except BaseException as error:
        file.truncate(size)
        if not isinstance(error, OSError):
            raise
        raise OSError(
            f"{file.name} could not be written ({error}): what it has is complete; free some disk "
            "space and run the same again"
        ) from error


def lock(file: IO) -> None:
    """Locks an open file for this process until it is closed; a ValueError: another has it."""
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
    except OSError as error:
        raise OSError(
            f"{file.name} cannot be locked ({error.strerror}): its file system has no locks; copy "
            "it to a local disk, name it there with --out, and copy it back when it is complete"
        ) from error
