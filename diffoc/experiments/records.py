"""Tables of results as CSV files that only grow, a whole cell at a time.

A cell is the unit of computation: a batch of images, a task, a method with its settings, a seed.
It gives one row an image. Cells are flushed to the disk as they are computed, so that a process
can be killed at any moment: the file may then end in the beginning of one cell, which readers leave
out and the next writer moves to `NAME.csv.torn-1`. A file that is damaged in another way is refused
by both. Shards of a table lie beside it, `NAME.shard-1-of-4.csv`, and are read with it.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import pandas as pd

from diffoc.checks import check_at_least, check_member
from diffoc.data.files import appending, csv_text

REQUIRED = ("psnr", "ssim", "mse", "residual_over_noise")
"""The metrics of every row whose status is "ok"; others need the weights of LPIPS."""

METRICS = (*REQUIRED, "lpips_alex", "lpips_vgg", "lpips_alex_01")

COUNTS = ("evaluations", "products")
ENVIRONMENT = ("versions", "device", "threads")
"""Where these and the precision are equal, so are the results, to the last digit."""

Row = dict[str, str]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cell:
    """What is computed at once.

    Attributes:
        prior, task, method: their names.
        precision: that of the network, "bfloat16" or "float32". Results differ only by rounding:
            cells that differ in nothing else count as the same, and a table has one of them.
        nfe: the budget of evaluations an image.
        settings: the method's keyword arguments as JSON with sorted keys, see :func:`as_json`.
        seed: what mask, kernel, noise and sampler are drawn from.
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
        """Returns the settings as keyword arguments."""
        return json.loads(self.settings)

    def rows(self) -> list[Row]:
        """Returns the columns that say what was computed, of every row of the cell."""
        common = {key: str(value) for key, value in asdict(self).items() if key != "images"}
        return [common | {"image": image, "batch": str(len(self.images))} for image in self.images]

    @classmethod
    def of(cls, rows: list[Row]) -> Cell:
        """Returns the cell that rows belong to."""
        first, images = rows[0], tuple(row["image"] for row in rows)
        text = {key: first[key] for key in ("prior", "precision", "task", "method", "settings")}
        return cls(**text, nfe=int(first["nfe"]), seed=int(first["seed"]), images=images)


_CELL = tuple(field.name for field in fields(Cell)[:-1])
COLUMNS = (
    *(*_CELL, "batch", "image", "status", *METRICS, *COUNTS, "seconds", "error"),
    *("image_sha256", "weights_sha256", "operator", "protocol", "commit", *ENVIRONMENT),
)
"""Status is "ok", "failed" with its error, or "unsupported": the method cannot do the task."""

_HEADER = ",".join(COLUMNS) + "\n"
_OWN = ("image", "image_sha256", "operator", *METRICS, *COUNTS)
_SHARED = tuple(key for key in COLUMNS if key not in _OWN)
_NUMBERS = (*METRICS, *COUNTS, "seconds")


def as_json(settings: dict) -> str:
    """Returns keyword arguments as text that is the same for the same ones."""
    return json.dumps(settings, sort_keys=True)


def in_batches(names: Sequence[str], batch: int) -> list[tuple[str, ...]]:
    """Returns names as tuples of `batch` each, the last perhaps shorter."""
    check_at_least(1, batch=batch)
    return [tuple(names[i : i + batch]) for i in range(0, len(names), batch)]


def shard_path(path: Path, shard: tuple[int, int] | None) -> Path:
    """Returns where shard i of n, from 1 to n, of a table is written; None is the table itself."""
    if shard is None:
        return path
    i, n = shard
    if not 1 <= i <= n:
        raise ValueError(f"shard is {i}/{n}, expected i/n with 1 <= i <= n")
    return path.with_name(f"{path.stem}.shard-{i}-of-{n}{path.suffix}")


def read(path: Path) -> dict[Cell, list[Row]]:
    """Returns the cells of a table and of its shards, but for incomplete ones at a file's end.

    What was computed again after it had failed counts as it is now, image by image: a cell that
    failed has only those of its images that have no other record. The table need not exist if
    shards do; a FileNotFoundError says that neither does. A ValueError refuses a file that is no
    table of this version or is damaged, and two results of a cell that differ.
    """
    shards = sorted(path.parent.glob(f"{path.stem}.shard-*-of-*{path.suffix}"))
    files = [file for file in (path, *shards) if file.exists()]
    if not files:
        raise FileNotFoundError(f"{path} is missing, and has no shards: expected a table there")
    if wrong := [file for file in files if not file.is_file()]:
        raise ValueError(f"{wrong[0]} is no file: expected a table there")
    cells: dict[Cell, list[Row]] = {}
    for file in files:
        for cell, rows in _parse(file, file.read_bytes())[0]:
            old = cells.get(cell)
            if old is None or old[0]["status"] == "failed":
                cells[cell] = rows
            elif rows[0]["status"] != "failed" and _results(old) != _results(rows):
                raise ValueError(
                    f"{file} has other results than an earlier record of {describe(cell)}: "
                    "remove one of them"
                )
    return _counting(cells)


def alone(cell: Cell) -> list[Cell]:
    """Returns a cell for each image of one."""
    return [replace(cell, images=(image,)) for image in cell.images]


def by_image(known: Mapping[Cell, list[Row]]) -> dict[Cell, Row]:
    """Returns the rows of a table by cells of one image, whatever batches they were in.

    Where an image failed in one batch and not in another, the latter counts; where it failed in
    several, the last of them.
    """
    failed_first = sorted(known.items(), key=lambda item: item[1][0]["status"] != "failed")
    return {
        one: row for cell, rows in failed_first for one, row in zip(alone(cell), rows, strict=True)
    }


def _counting(known: dict[Cell, list[Row]]) -> dict[Cell, list[Row]]:
    """Returns the cells without the failed rows of images whose record is in another batch."""
    counts = by_image(known)
    cells: dict[Cell, list[Row]] = {}
    for cell, rows in known.items():
        if rows[0]["status"] == "failed":
            pairs = zip(alone(cell), rows, strict=True)
            rows = [row for one, row in pairs if counts[one] is row]
            cell = Cell.of(rows) if rows else cell
        if rows:
            cells[cell] = rows
    return cells


def rows_of(path: Path) -> pd.DataFrame:
    """Returns the rows of all cells of a table, as :func:`read` finds them and :func:`frame` types.

    >>> rows = rows_of(path)
    >>> rows[rows["status"] == "ok"].groupby(["method", "task"])["psnr"].mean()
    """
    return frame([row for rows in read(path).values() for row in rows])


def frame(rows: Sequence[Row]) -> pd.DataFrame:
    """Returns rows with a column for each keyword of their settings, and numbers as numbers.

    What a row does not have is NaN. A keyword with the name of another column is left out.
    """
    table = pd.DataFrame(rows, columns=COLUMNS).astype({"nfe": int})
    numbers = list(_NUMBERS)
    table[numbers] = table[numbers].replace("", "nan").astype(float)
    settings = pd.DataFrame([json.loads(text) for text in table["settings"]], index=table.index)
    return table.join(settings[settings.columns.difference(COLUMNS)])


def describe(cell: Cell) -> str:
    """Returns a cell in a few words."""
    return (
        f"{cell.method} {cell.settings}, {cell.task}, nfe {cell.nfe}, seed {cell.seed}, images "
        f"{cell.images[0]} to {cell.images[-1]}"
    )


@contextmanager
def writing(path: Path) -> Iterator[Callable[[list[Row]], None]]:
    """Opens a file for cells, and gives a function that appends all rows of one, or none."""
    with appending(path, lambda content: _parse(path, content)[1]) as append:

        def append_cell(rows: list[Row]) -> None:
            # One row a line, so that a torn one can be told by its missing end.
            rows = [row | {"error": " ".join(row.get("error", "").split())} for row in rows]
            for row in rows:
                if any("\n" in value or "\r" in value for value in row.values()):
                    raise ValueError(f"rows have a line break in one of {list(row.values())}")
            text = csv_text(COLUMNS, rows)
            # What could not be read back is not written.
            if len(_parse(path, (_HEADER + text).encode())[0]) != 1:
                raise ValueError(f"rows are {len(rows)}, expected those of one whole cell")
            append(_HEADER * (path.stat().st_size == 0) + text)

        yield append_cell


def _parse(path: Path, content: bytes) -> tuple[list[tuple[Cell, list[Row]]], int]:
    """Returns the complete cells of a file's content, and the number of bytes they take."""
    *lines, torn = content.split(b"\n")
    if not lines and _HEADER.encode().startswith(torn):
        return [], 0  # was stopped before its first cell
    if not lines or lines[0] + b"\n" != _HEADER.encode():
        raise ValueError(f"{path} is no table of this version: name another")
    cells: list[tuple[Cell, list[Row]]] = []
    rows: list[Row] = []
    size = done = len(_HEADER)
    for number, line in enumerate(lines[1:], 2):
        try:
            values = next(csv.reader([line.decode()]), [])
            if len(values) != len(COLUMNS):
                raise ValueError(f"it has {len(values)} columns, expected {len(COLUMNS)}")
            row = dict(zip(COLUMNS, values, strict=True))
            _check(row, (rows or [row])[0])
            if row["image"] in (one["image"] for one in rows):
                raise ValueError(f"image is {row['image']!r} a second time")
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{path} is damaged: line {number}: {error}") from error
        rows.append(row)
        size += len(line) + 1
        if len(rows) == int(row["batch"]):
            cells.append((Cell.of(rows), rows))
            rows, done = [], size
    # A torn line is the beginning of a row of the same cell, but for its last value.
    values = next(csv.reader([torn.decode(errors="replace")]), [])[:-1]
    begun = [rows[0][key] for key in COLUMNS[: COLUMNS.index("image")]] if rows else values
    if len(values) >= len(COLUMNS) or any(a != b for a, b in zip(values, begun, strict=False)):
        raise ValueError(f"{path} is damaged: line {len(lines) + 1} is no beginning of a row")
    if done < len(content):
        left = len(content) - done
        _LOG.warning("%s: %d bytes of an unfinished cell at its end are left out", path, left)
    return cells, done


def _check(row: Row, first: Row) -> None:
    """Raises a ValueError unless a row is one that runs write, and of the cell of another."""
    for key in _SHARED:
        if row[key] != first[key]:
            raise ValueError(f"{key} is {row[key]!r}, but {first[key]!r} in its cell's first row")
    for key in ("nfe", "seed", "batch"):
        if not re.fullmatch(r"0|-?[1-9]\d*", row[key]) or (key == "batch" and int(row[key]) < 1):
            raise ValueError(f"{key} is {row[key]!r}, expected a whole number")
    settings = json.loads(row["settings"])
    if not isinstance(settings, dict) or as_json(settings) != row["settings"]:
        raise ValueError(f"settings are {row['settings']!r}, expected JSON with sorted keys")
    check_member(("ok", "failed", "unsupported"), status=row["status"])
    for key in _NUMBERS:
        if row[key] and not math.isfinite(float(row[key])):
            raise ValueError(f"{key} is {row[key]}, expected a finite number")
        if bool(row[key]) != bool(first[key]):
            raise ValueError(f"{key} is in some rows of its cell only")
        if key in METRICS and row[key] and row["status"] != "ok":
            raise ValueError(f"{key} is {row[key]}, but status {row['status']}")
        if key in REQUIRED and not row[key] and row["status"] == "ok":
            raise ValueError(f"{key} is missing, but status ok")
    if row["status"] == "failed" and not row["error"]:
        raise ValueError("error is missing, but status failed")
    if not row["image"]:
        raise ValueError("image is missing")


def _results(rows: list[Row]) -> list[list[str]]:
    return [[row[key] for key in ("status", *METRICS)] for row in rows]
