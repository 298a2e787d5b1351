"""Tables of results as CSV files that only grow, a whole cell at a time.

A cell is the unit of computation: a batch of images, a task, a method with its settings, a seed.
It gives one row an image. Cells are flushed to the disk as they are computed, so that a process
can be killed at any moment: the file may then end in a part of a cell, which readers leave out
and the next writer cuts off. Shards of a table lie beside it, `NAME.shard-1-of-4.csv`, and are
read with it.
"""

from __future__ import annotations

import csv
import fcntl
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from io import FileIO, StringIO
from pathlib import Path

METRICS = (
    *("psnr", "ssim", "mse", "residual_over_noise"),
    *("lpips_alex", "lpips_vgg", "lpips_alex_01"),
)
COUNTS = ("evaluations", "products")
ENVIRONMENT = ("versions", "device", "threads")
"""Where these and the precision are equal, so are the results, to the last digit."""

Row = dict[str, str]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cell:
    """What is computed at once.

    Attributes:
        prior: of the cell.
        precision: of the network, "bfloat16" or "float32". Results differ in rounding alone, and
            few CPUs are fast with both: cells that differ in nothing else count as the same.
        task, method: their names.
        nfe: the budget of evaluations an image.
        settings: the method's keyword arguments as JSON with sorted keys, see :func:`as_json`.
        seed: of mask, kernel, noise and sampler.
        images: their names; results depend on the batch, at the level of rounding.
    """

    prior: str
    precision: str = field(compare=False)
    task: str
    method: str
    nfe: int
    settings: str
    seed: int
    images: tuple[str, ...]

    @property
    def keywords(self) -> dict:
        """The settings as keyword arguments."""
        return json.loads(self.settings)

    def rows(self) -> list[Row]:
        """The columns that say what was computed, of every row of the cell."""
        common = {key: str(value) for key, value in asdict(self).items() if key != "images"}
        return [common | {"image": image, "batch": str(len(self.images))} for image in self.images]

    @classmethod
    def of(cls, rows: list[Row]) -> Cell:
        """The cell that rows belong to."""
        first, images = rows[0], tuple(row["image"] for row in rows)
        text = {key: first[key] for key in ("prior", "precision", "task", "method", "settings")}
        return cls(**text, nfe=int(first["nfe"]), seed=int(first["seed"]), images=images)


_CELL = tuple(field.name for field in fields(Cell)[:-1])
COLUMNS = (
    *(*_CELL, "batch", "image", "status", *METRICS, *COUNTS, "seconds", "error"),
    *("image_sha256", "weights_sha256", "operator", "protocol", "commit", *ENVIRONMENT),
)
"""Status is "ok", "failed" with its error, or "unsupported": the method cannot do the task."""


def as_json(settings: dict) -> str:
    """Keyword arguments as text that is the same for the same ones."""
    return json.dumps(settings, sort_keys=True)


def shard_path(path: Path, shard: tuple[int, int] | None) -> Path:
    """Where shard i of n, from 1, of a table is written; None is the table itself.

    Raises:
        ValueError: unless 1 <= i <= n.
    """
    if shard is None:
        return path
    i, n = shard
    if not 1 <= i <= n:
        raise ValueError(f"shard is {i}/{n}, expected i/n with 1 <= i <= n")
    return path.with_name(f"{path.stem}.shard-{i}-of-{n}{path.suffix}")


def read(path: Path) -> dict[Cell, list[Row]]:
    """The cells of a table and of its shards; incomplete ones at a file's end are left out.

    A cell that was computed again after it had failed counts as it is now.

    Args:
        path: of the table, which need not exist if shards do.

    Raises:
        FileNotFoundError: if there is neither.
        ValueError: if a file is no table of this version or is damaged, or if two of a cell's
            results differ.
    """
    shards = sorted(path.parent.glob(f"{path.stem}.shard-*-of-*{path.suffix}"))
    files = [file for file in (path, *shards) if file.exists()]
    if not files:
        raise FileNotFoundError(f"{path} is missing, and has no shards: expected a table there")
    cells: dict[Cell, list[Row]] = {}
    for file in files:
        for cell, rows in _parse(file)[0]:
            old = cells.get(cell)
            if old is None or old[0]["status"] == "failed":
                cells[cell] = rows
            elif rows[0]["status"] != "failed" and _results(old) != _results(rows):
                raise ValueError(
                    f"{file} has other results than an earlier record of {describe(cell)}: "
                    "remove one of them"
                )
    return cells


def describe(cell: Cell) -> str:
    """A cell in a few words."""
    return (
        f"{cell.method} {cell.settings}, {cell.task}, nfe {cell.nfe}, seed {cell.seed}, images "
        f"{cell.images[0]} to {cell.images[-1]}"
    )


class Writer:
    """Appends cells to a file; see :func:`writing`."""

    def __init__(self, file: FileIO) -> None:
        self._file = file

    def append(self, rows: list[Row]) -> None:
        """Writes all rows of a cell, and waits until the disk has them.

        Raises:
            OSError: if the disk does not take them; the file is then as it was.
        """
        text = StringIO()
        writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
        if self._file.tell() == 0:
            writer.writeheader()
        for row in rows:
            # One row a line, so that a torn one can be told by its missing end.
            row = row | {"error": " ".join(row.get("error", "").split())}
            if any("\n" in value or "\r" in value for value in row.values()):
                raise ValueError(f"rows have a line break in one of {list(row.values())}")
            writer.writerow(row)
        size, content = self._file.tell(), memoryview(text.getvalue().encode())
        try:
            while content:  # nothing is buffered, so that a part may be written
                content = content[self._file.write(content) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(size)
            self._file.seek(size)
            raise OSError(
                f"{self._file.name} could not be written ({error}): its cells so far are complete; "
                "free some disk space and run the same again"
            ) from error


@contextmanager
def writing(path: Path) -> Iterator[Writer]:
    """Opens a file for cells to be appended, once what is incomplete at its end is cut off.

    Raises:
        ValueError: if it is no table of this version, or another process writes it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{path} is being written by another process") from error
        file.truncate(_parse(path)[1])
        file.seek(0, os.SEEK_END)
        yield Writer(file)


def _parse(path: Path) -> tuple[list[tuple[Cell, list[Row]]], int]:
    """The complete cells of one file, and the number of bytes they take."""
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    torn = bool(lines) and not lines[-1].endswith(b"\n")
    whole = [line.decode() for line in (lines[:-1] if torn else lines)]
    header = ",".join(COLUMNS) + "\n"
    if not whole and header.startswith(content.decode(errors="replace")):
        return [], 0  # was stopped before its first cell
    if not whole or whole[0] != header:
        raise ValueError(f"{path} is no table of this version: remove it, or name another")
    found, start, size = [], 1, len(whole[0].encode())
    while start < len(whole):
        rows = _rows(path, whole[start : start + 1], start)
        batch = int(rows[0]["batch"])
        rows += _rows(path, whole[start + 1 : start + batch], start + 1)
        if len(rows) < batch:
            break
        cell = Cell.of(rows)
        if any({**row, **known} != row for row, known in zip(rows, cell.rows(), strict=True)):
            raise ValueError(f"{path} is damaged: lines {start + 1} ff. are not one cell")
        found.append((cell, rows))
        size += len("".join(whole[start : start + batch]).encode())
        start += batch
    if size < len(content):
        left = len(content) - size
        _LOG.warning("%s: %d bytes of an unfinished cell at its end are left out", path, left)
    return found, size


def _rows(path: Path, lines: list[str], start: int) -> list[Row]:
    rows = []
    for number, values in enumerate(csv.reader(lines), start + 1):
        if len(values) != len(COLUMNS):
            raise ValueError(
                f"{path} is damaged: line {number} has {len(values)} columns, expected "
                f"{len(COLUMNS)}"
            )
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def _results(rows: list[Row]) -> list[list[str]]:
    return [[row[key] for key in ("status", *METRICS)] for row in rows]
