"""The ledger: the paper's claims, what became of them, and the numbers behind each verdict.

`data/claims.yaml` is a list of claims. A claim has an `id`, its `place` in the paper, what it
`says`, a `verdict` with its `reason`, and `numbers`; a claim that was not run has `planned` in
place of numbers. A number says `what` it is and in which `unit`, is a `value` or a bound,
`at_most`, and has one source:

- `notebook`: a text that the cell of this id prints in a file; the number is in the text;
- `records`: the mean over images of a column of a table, in the rows that agree with `where`, or,
  if there is `minus`, the mean of its differences to the rows that agree with `minus`;
- `recompute`: the function of that name in :mod:`diffoc.theory.claims`, the number of that name in
  :data:`diffoc.experiments.paper_tables.NUMBERS`, or the group of that name in
  :mod:`diffoc.theory.identities`, which stands for its largest error.

A value that is recomputed may be off by as much as `within`, one from records by half of the last
digit that is shown. A difference in records is told with its interval. By how much rounding on
another CPU moves a mean of records is in :mod:`diffoc.experiments.spread`; a difference that is
smaller is no claim.
"""

import inspect
import json
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from diffoc.checks import check_member
from diffoc.data.provenance import ROOT
from diffoc.experiments import paper_tables
from diffoc.experiments.spread import of_mean
from diffoc.experiments.summary import by_image, mean_and_interval, paired, select
from diffoc.theory import claims, identities
from diffoc.theory.linear_gaussian import Identity

LEDGER = ROOT / "data" / "claims.yaml"
NOTEBOOKS = ROOT / "notebooks"
RECORDS = ROOT / "data" / "records"
NOT_RUN = "not run"
VERDICTS = (
    "exact",
    "holds under a condition",
    "reproduced at small scale",
    "undecided or not comparable",
    "refuted",
    "erratum of the paper",
    NOT_RUN,
)
DIGITS = {"ssim": 3}
"""The number of digits behind the point, by column of records; two for all others."""
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")


@dataclass(frozen=True)
class Printed:
    """A text in the output of a notebook's cell."""

    file: str
    cell: str
    prints: str

    def __str__(self) -> str:
        return f"{self.file.removesuffix('.ipynb')}, {self.cell}"


@dataclass(frozen=True)
class Recorded:
    """A mean over images in a table of records, or of differences; see the module."""

    file: str
    column: str
    where: dict[str, Any]
    minus: dict[str, Any] | None = None

    def __str__(self) -> str:
        return f"records, {self.file}"


@dataclass(frozen=True)
class Computed:
    """What a function returns."""

    name: str

    def __str__(self) -> str:
        return f"computed, {self.name}"


@dataclass(frozen=True)
class Number:
    """A number behind a verdict: a value, give or take `within`, or a bound."""

    what: str
    unit: str
    source: Printed | Recorded | Computed
    value: float | None = None
    at_most: float | None = None
    within: float | None = None

    def __str__(self) -> str:
        number = f"at most {self.at_most:g}" if self.value is None else f"{self.value:g}"
        return f"{number} {self.unit}".rstrip()

    def disagreement(self, value: float) -> str | None:
        """Returns how the number disagrees with its source's value; None if it does not."""
        within = self.within
        if isinstance(self.source, Recorded):
            within = 0.5 * 10.0 ** -DIGITS.get(self.source.column, 2)
        # A NaN agrees with nothing.
        if self.value is not None and within is not None:
            agrees = abs(value - self.value) <= within
        else:
            agrees = self.at_most is not None and value <= self.at_most
        return None if agrees else f"the ledger has {self}, {self.source} gives {value:.6g}"


@dataclass(frozen=True)
class Claim:
    """What the paper says, and the verdict."""

    id: str
    place: str
    says: str
    verdict: str
    reason: str
    numbers: tuple[Number, ...] = ()
    planned: str | None = None


def read(path: Path = LEDGER) -> list[Claim]:
    """Returns the claims of a ledger, in its order; a ValueError names one that is malformed."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: expected the ledger there")
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name} is no YAML: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path.name} must be a list of claims")
    ledger = []
    for position, entry in enumerate(entries, start=1):
        name = entry.get("id", position) if isinstance(entry, dict) else position
        try:
            ledger.append(_claim(entry))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path.name}, claim {name}: {error}") from None
    name, uses = Counter(claim.id for claim in ledger).most_common(1)[0]
    if uses > 1:
        raise ValueError(f"{path.name} has the id {name} more than once")
    return ledger


def check(
    number: Number, notebooks: Path = NOTEBOOKS, records: Path = RECORDS, quick: bool = False
) -> str | None:
    """Returns how a number disagrees with its source; None if it does not.

    Sources lie in the folders of executed notebooks and of tables of records. What would have to be
    computed is left out if `quick`.
    """
    source = number.source
    if isinstance(source, Computed):
        return None if quick else number.disagreement(recomputable()[source.name]())
    if isinstance(source, Recorded):
        moves = rounding(source)
        if source.minus is not None and number.value and moves and abs(number.value) <= moves:
            return f"{number} is a difference, and rounding moves it by {moves:.2g}"
        try:
            return number.disagreement(_mean(source, records / source.file)[0])
        except (FileNotFoundError, ValueError) as error:
            return str(error)
    path = notebooks / source.file
    if not path.is_file():
        return f"there is no notebook {source.file}"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = [_printed(cell) for cell in cells if cell.get("id") == source.cell]
    if not texts:
        return f"{source.file} has no cell {source.cell}"
    if source.prints not in texts[0]:
        return f"{source} does not print {source.prints!r}"
    there = [float(text.replace(",", "")) for text in _NUMBER.findall(source.prints)]
    if (number.at_most if number.value is None else number.value) not in there:
        return f"the ledger has {number}, but {source} prints {source.prints!r}"
    return None


def told(number: Number, records: Path = RECORDS) -> str:
    """Returns a number as text; a difference in records with the half-width of its interval."""
    source = number.source
    if not isinstance(source, Recorded) or source.minus is None:
        return str(number)
    try:
        half = _mean(source, records / source.file)[1]
    except (FileNotFoundError, ValueError):
        return str(number)
    digits = DIGITS.get(source.column, 2)
    return f"{number.value:+.{digits}f} ± {half:.{digits}f} {number.unit}".rstrip()


def rounding(source: Recorded) -> float | None:
    """Returns by how much rounding moves a number from records; None where it was not measured."""
    first, second = source.where, source.minus or {}
    changes = [
        of_mean(source.column, row["method"], row["task"])
        for row in (first, second)
        if {"method", "task"} <= row.keys()
    ]
    known = [change for change in changes if change is not None]
    return sum(known) if known and len(known) == 1 + bool(second) else None


@cache
def recomputable() -> dict[str, Callable[[], float]]:
    """Returns the functions that a number may name, by name."""
    groups = {group.__name__: partial(_largest_error, group) for group in identities.IDENTITIES}
    functions = {
        name: function
        for name, function in inspect.getmembers(claims, inspect.isfunction)
        if function.__module__ == claims.__name__ and not name.startswith("_")
    }
    return {**groups, **functions, **paper_tables.NUMBERS}


def _largest_error(group: Callable[[], Iterator[Identity]]) -> float:
    return float(np.max([row.error for row in group()]))  # nan if one is


def counts(ledger: list[Claim]) -> dict[str, int]:
    """Returns how many claims have each verdict, in the order of :data:`VERDICTS`."""
    verdicts = Counter(claim.verdict for claim in ledger)
    return {verdict: verdicts[verdict] for verdict in VERDICTS}


def run(
    path: Path = LEDGER, notebooks: Path = NOTEBOOKS, records: Path = RECORDS, quick: bool = False
) -> int:
    """Prints the ledger, and what disagrees with its source: returns 1 if anything does, else 0.

    Other arguments are those of :func:`check`.
    """
    ledger = read(path)
    print(f"{len(ledger)} claims")
    for verdict, count in counts(ledger).items():
        print(f"{count:4d} {verdict}")
    compared, wrong = 0, []
    for claim in ledger:
        print(f"\n{claim.verdict.upper()}  {claim.place}  [{claim.id}]")
        _print_wrapped(f"The paper: {claim.says}")
        if claim.planned:
            _print_wrapped(f"{claim.reason} Planned: {claim.planned}")
        else:
            _print_wrapped(f"Found: {claim.reason}")
        for number in claim.numbers:
            problem = check(number, notebooks, records, quick)
            skipped = quick and isinstance(number.source, Computed)
            compared += not skipped
            moves = rounding(number.source) if isinstance(number.source, Recorded) else None
            spread = ", rounding not measured" if isinstance(number.source, Recorded) else ""
            spread = spread if moves is None else f", moved by {moves:.2g} by rounding"
            mark = "  DISAGREES" if problem else "  not recomputed" if skipped else ""
            print(
                f"    {told(number, records)}: {number.what} ({number.source}{spread}){mark}",
                flush=True,
            )
            if problem:
                wrong.append(f"{claim.id}, {number.what}: {problem}")
    print(f"\n{compared - len(wrong)} of {compared} numbers agree with their sources")
    for line in wrong:
        print(f"DISAGREES: {line}")
    return int(bool(wrong))


def _claim(entry: Any) -> Claim:
    claim = Claim(**_mapping(entry))
    for key in ("id", "place", "says", "reason"):
        if not (isinstance(text := getattr(claim, key), str) and text.strip()):
            raise ValueError(f"{key} is {text!r}, expected a text")
    check_member(VERDICTS, verdict=claim.verdict)
    if claim.verdict == NOT_RUN and (claim.numbers or not claim.planned):
        raise ValueError("what was not run has planned, and no numbers")
    if claim.verdict != NOT_RUN and (claim.planned or not claim.numbers):
        raise ValueError("a claim with a verdict has numbers, and no planned")
    return replace(claim, numbers=tuple(map(_number, claim.numbers)))


def _number(entry: Any) -> Number:
    kinds: dict[str, Any] = {"notebook": Printed, "records": Recorded, "recompute": Computed}
    given = [kind for kind in kinds if kind in _mapping(entry)]
    if len(given) != 1:
        raise ValueError("a number needs one source: notebook, records or recompute")
    kind, rest = given[0], dict(entry)
    content = rest.pop(kind)
    if kind == "recompute":
        check_member(recomputable(), recompute=content)
        content = {"name": content}
    for key in ("where", "minus"):
        _mapping(_mapping(content).get(key) or {})
    number = Number(source=kinds[kind](**content), **rest)
    for key in ("value", "at_most", "within"):
        value = getattr(number, key)
        if value is not None and type(value) not in (int, float):  # YAML takes 1e-12 for a text
            raise ValueError(f"{key} is {value!r}, expected a number such as 1.0e-12")
    if (number.value is None) == (number.at_most is None):
        raise ValueError("a number is either a value or at_most something")
    if (number.within is not None) != (number.value is not None and kind == "recompute"):
        raise ValueError("within belongs to a value that is recomputed, and only there")
    return number


def _mapping(entry: Any) -> dict:
    if not isinstance(entry, dict):
        raise ValueError(f"{entry!r} is not a mapping")
    return entry


def _mean(source: Recorded, path: Path) -> tuple[float, float]:
    """Returns a mean over images, or of differences, and the half-width of its interval."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no table {path.name} of records")
    # As text, which is what `where` says.
    rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    columns = {source.column, *source.where, *(source.minus or {})}
    if missing := columns - set(rows.columns):
        raise ValueError(f"{path.name} has no column {', '.join(sorted(missing))}")
    first, second = (
        select(rows, **{key: str(value) for key, value in (where or {}).items()})
        .replace({source.column: {"": "nan"}})
        .astype({source.column: float})
        for where in (source.where, source.minus)
    )
    if source.minus is not None:
        return paired(first, second, source.column)
    if first[source.column].isna().all():
        raise ValueError(f"{path.name} has no row where {source.where}")
    return mean_and_interval(by_image(first, source.column))


def _printed(cell: dict) -> str:
    """Returns what a cell prints, or shows as a table in Markdown."""
    outputs = cell.get("outputs", [])
    texts = (one.get("text") or one.get("data", {}).get("text/markdown", "") for one in outputs)
    return "".join("".join(text) for text in texts)


def _print_wrapped(text: str) -> None:
    print(textwrap.fill(text, 96, initial_indent="  ", subsequent_indent="    "))
