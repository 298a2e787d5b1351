"""Means of a table of records, with their uncertainty."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import torch
from scipy.stats import t as student

from diffoc.experiments.inaccurate import accurate_name
from diffoc.experiments.methods import METHODS
from diffoc.experiments.protocol import COLOUR_FACES
from diffoc.experiments.records import METRICS, Row

_FORMATS = {"psnr": "{:.2f} ± {:.2f}", "mse": "{:.4f} ± {:.4f}"}


def select(rows: Iterable[Row], **wanted: object) -> list[Row]:
    """Returns rows whose columns have these values, or the keywords of whose settings have them.

    Where a settings' keyword has a column's name, the column counts.
    """
    found = []
    for row in rows:
        settings = json.loads(row["settings"])
        if all(
            row[key] == str(value) if key in row else key in settings and settings[key] == value
            for key, value in wanted.items()
        ):
            found.append(row)
    return found


def mean_and_interval(values: Iterable[float]) -> tuple[float, float]:
    """Returns the mean, and half the width of its 95 % interval; not a number for one value.

    The interval is by Student's t, for values that are independent.
    """
    x = torch.tensor(list(values), dtype=torch.float64)
    half = student.ppf(0.975, len(x) - 1) * x.std().item() / len(x) ** 0.5 if len(x) > 1 else None
    return x.mean().item(), float("nan") if half is None else float(half)


def by_image(rows: Iterable[Row], metric: str) -> dict[str, float]:
    """Returns a metric of each image, averaged over its rows; rows without it are left out."""
    values = defaultdict(list)
    for row in rows:
        if row["status"] == "ok" and row[metric]:
            values[row["image"]].append(float(row[metric]))
    return {image: sum(some) / len(some) for image, some in values.items()}


def by_method(rows: Iterable[Row], metric: str) -> dict[str, dict[str, tuple[float, float]]]:
    """Maps a method's label to a task to mean and half-width of the interval, where there is any.

    A label names the budget if the rows have several of its method.
    """
    groups = defaultdict(list)
    for row in rows:
        groups[row["method"], row["nfe"], row["task"]].append(row)
    labels = _labels((method, nfe) for method, nfe, _ in groups)
    found: dict[str, dict[str, tuple[float, float]]] = defaultdict(dict)
    for (method, nfe, task), group in groups.items():
        if images := by_image(group, metric):
            found[labels[method, nfe]][task] = mean_and_interval(images.values())
    return dict(found)


Curve = list[tuple[float, float, float]]
"""Of (abscissa, mean, half-width of the interval), in ascending order."""


def by_budget(rows: Iterable[Row], metric: str) -> dict[str, dict[str, Curve]]:
    """Maps a task to a method's label to its curve over the budget of evaluations."""
    keyed = ((row["task"], _label(row["method"]), float(row["nfe"]), row) for row in rows)
    return curves(keyed, metric)


def by_setting(rows: Iterable[Row], metric: str) -> dict[str, dict[str, Curve]]:
    """Maps a method's label and tuned keyword to a task to its curve over that keyword's values.

    The keyword is the one with the most values. A label names the budget if the rows have several
    of its method. Rows of methods that have nothing to tune are left out.
    """
    rows = [row for row in rows if row["method"] in METHODS and METHODS[row["method"]].tuned]
    labels = _labels((row["method"], row["nfe"]) for row in rows)
    tried: dict[tuple[str, str], dict] = defaultdict(lambda: defaultdict(set))
    for row in rows:
        for key, value in json.loads(row["settings"]).items():
            tried[row["method"], row["nfe"]][key].add(value)
    keyed = []
    for row in rows:
        place = row["method"], row["nfe"]
        keyword = max(tried[place], key=lambda key: len(tried[place][key]))
        value = float(json.loads(row["settings"])[keyword])
        keyed.append((f"{labels[place]}: {keyword}", row["task"], value, row))
    return curves(keyed, metric)


def curves(
    keyed: Iterable[tuple[str, str, float, Row]], metric: str
) -> dict[str, dict[str, Curve]]:
    """Maps a panel to a line to its curve, of rows with their panel, line and abscissa."""
    groups: dict[tuple[str, str], dict[float, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for panel, line, abscissa, row in keyed:
        groups[panel, line][abscissa].append(row)
    found: dict[str, dict[str, Curve]] = defaultdict(dict)
    for (panel, line), places in groups.items():
        images = [(x, by_image(places[x], metric)) for x in sorted(places)]
        curve = [(x, *mean_and_interval(some.values())) for x, some in images if some]
        if curve:
            found[panel][line] = curve
    return dict(found)


def _labels(pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Returns labels of methods and budgets, with the budget where a method has several."""
    unique = set(pairs)
    count = Counter(method for method, _ in unique)
    return {
        (method, nfe): _label(method) + f" (NFE {nfe})" * (count[method] > 1)
        for method, nfe in unique
    }


def _label(method: str) -> str:
    return METHODS[method].label if method in METHODS else method


def paired(first: Iterable[Row], second: Iterable[Row], metric: str) -> tuple[float, float]:
    """Returns the mean difference, first minus second, on the images of both, and its interval.

    A ValueError says that they have no image in common.
    """
    one, two = by_image(first, metric), by_image(second, metric)
    both = one.keys() & two.keys()
    if not both:
        raise ValueError("first and second have no image in common")
    return mean_and_interval(one[image] - two[image] for image in sorted(both))


def plus_minus(mean: float, half: float, sign: str = "") -> str:
    """Returns a mean and its half-width as text; `sign` is "+" for a difference."""
    return f"{mean:{sign}.2f}" + ("" if math.isnan(half) else f" ± {half:.2f}")


def markdown(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """Returns a table in Markdown of a head and lines of cells."""
    head = list(head)
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def described(rows: Sequence[Row]) -> str:
    """Returns a sentence on what a table is of: priors, images, operators, the network's numbers.

    Priors that are made of another, as `faces64+noise0.1`, go by the other's name.
    """
    priors = sorted({accurate_name(row["prior"]) for row in rows})
    images = len({row["image"] for row in rows})
    each = any(row["protocol"] == COLOUR_FACES.name for row in rows)
    precisions = sorted({row["precision"] for row in rows})
    return (
        f"Prior {' and '.join(priors)}; {images} images; "
        f"{'an operator for each image' if each else 'one operator a task, for all images'}; "
        f"networks in {' and '.join(precisions)}."
    )


def summarise(rows: list[Row], metrics: Iterable[str] = METRICS) -> str:
    """Returns a table in Markdown for each metric: methods by tasks, mean ± 95 % interval.

    The mean is over images; seeds of an image are averaged first. A dash is a task that a method
    cannot do, an empty place one that was not run. Failures, and fewer images than elsewhere, are
    counted in brackets.
    """
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    several = {}
    for column in ("prior", "settings"):
        tried = defaultdict(set)
        for row in rows:
            tried[row["task"], row["method"], row["nfe"]].add(row[column])
        several[column] = {key[1:] for key, values in tried.items() if len(values) > 1}
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        label = f"{_label(row['method'])} (NFE {row['nfe']})"
        for column, keys in several.items():
            if (row["method"], row["nfe"]) in keys:
                label += f" {row[column]}"
        groups[label, row["task"]].append(row)
    labels = list(dict.fromkeys(label for label, _ in groups))
    most = max((len({r["image"] for r in group}) for group in groups.values()), default=0)
    parts = []
    for metric in metrics:
        if not any(row[metric] for row in rows):
            continue
        lines = [f"{metric}, {most} images", ""]
        lines += ["| method | " + " | ".join(tasks) + " |", "| --- " * (len(tasks) + 1) + "|"]
        for label in labels:
            places = [_place(groups.get((label, task), []), metric, most) for task in tasks]
            lines.append(f"| {label} | " + " | ".join(places) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or "no results"


def _place(rows: list[Row], metric: str, most: int) -> str:
    if not rows:
        return ""
    if all(row["status"] == "unsupported" for row in rows):
        return "-"
    images = by_image(rows, metric)
    failed = sum(row["status"] == "failed" for row in rows)
    notes = [f"{failed} failed"] if failed else []
    if not images:
        return ", ".join(notes)
    if len(images) < most:
        notes.append(f"{len(images)} images")
    mean, half = mean_and_interval(images.values())
    text = _FORMATS.get(metric, "{:.3f} ± {:.3f}").format(mean, half)
    return text + (f" ({', '.join(notes)})" if notes else "")
