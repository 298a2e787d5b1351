"""What a day of FFHQ needs and costs, found out before it begins.

Every check returns lines for the reader, and lines for what would fail later. Times are those of a
few steps on one image here, taken to the full count of evaluations and products. They leave out
what is made once, such as the factors of an operator.
"""

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image

from diffoc.data.downloads import cache_folder, find, sha256_of
from diffoc.data.files import replacing
from diffoc.data.pictures import picture_size
from diffoc.experiments.cells import Computer, time_prior, work_of
from diffoc.experiments.ffhq import TABLES, Line, cells_by_line
from diffoc.experiments.inaccurate import is_inaccurate
from diffoc.experiments.measured import read_resized
from diffoc.experiments.methods import METHODS
from diffoc.experiments.records import Cell, as_json
from diffoc.priors.pretrained import REMOTE
from diffoc.problems.perceptual import WEIGHTS, weights_of
from diffoc.problems.tasks import UnsupportedTask


@dataclass
class Report:
    """Two lists of lines: `lines` inform the reader, `refused` tell what would fail later."""

    lines: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def say(self, line: str) -> None:
        """Adds a line, and shows it at once."""
        self.lines.append(line)
        print(line, flush=True)

    def refuse(self, line: str) -> None:
        """Adds a line of what would fail."""
        self.refused.append(line)
        print(f"WOULD FAIL: {line}", flush=True)


def check_weights(prior: str, report: Report) -> None:
    """Reports a prior's file, and its SHA-256 against that of its first use."""
    if is_inaccurate(prior):
        report.say(f"weights: random, {prior!r}: numbers mean nothing, times do")
    elif prior in REMOTE:
        try:
            path = find(REMOTE[prior])
        except (FileNotFoundError, ValueError) as error:
            report.refuse(f"weights: {error}")
        else:
            digest, note = sha256_of(path), cache_folder() / f"{path.name}.sha256"
            if not note.exists():
                with replacing(note) as part:
                    part.write_text(digest + "\n")
            first = note.read_text().strip()
            report.say(f"weights: {path}, {path.stat().st_size / 1e6:,.0f} MB, sha256 {digest}")
            if digest != first:
                report.refuse(
                    f"weights: {path} has changed since its first use, sha256 {first[:12]}...: "
                    f"remove {note} if that is meant"
                )


def check_metrics(report: Report) -> None:
    """Reports the metrics' files; a column whose weights are missing is left out."""
    for name in WEIGHTS:
        try:
            report.say(f"metric weights: {name}: {weights_of(name)}")
        except (FileNotFoundError, ValueError) as error:
            report.say(f"metric weights: {name}: no column without them: {error}")


def check_images(paths: Sequence[Path], side: int, report: Report) -> None:
    """Reports sizes and kinds of the pictures, each of which is read as the tables read it."""
    sizes: Counter[str] = Counter()
    for path in paths:
        try:
            _, notes = read_resized(path, side, "lanczos")
            with Image.open(path) as picture:
                size = f"{picture.width}x{picture.height}"
        except (ValueError, OSError) as error:
            report.refuse(f"images: {error}")
        else:
            sizes[", ".join([f"{path.suffix.lower()} of {size}", *notes])] += 1
    kinds = "; ".join(f"{count} {kind}" for kind, count in sizes.items())
    report.say(f"images: {len(paths)}: {kinds}")


@dataclass
class Times:
    """What images take, measured on one.

    Attributes:
        evaluation, product: the seconds that each takes of the network.
        ratios: a method's time in units of its evaluations' and products', by method and task; 0
            where it cannot do the task.
        seconds: the time of an image, by method and task, for methods that have no network.
    """

    evaluation: float
    product: float
    ratios: dict[tuple[str, str], float] = field(default_factory=dict)
    seconds: dict[tuple[str, str], float] = field(default_factory=dict)

    def work(self, evaluations: float, products: float) -> float:
        """Returns the seconds of so many evaluations and products."""
        return evaluations * self.evaluation + products * self.product

    def of(self, cell: Cell) -> float:
        """Returns the seconds of a cell; what was not measured is as slow as anything that was."""
        work = self.work(*work_of(cell))
        known, usual = (self.ratios, 1.0) if work else (self.seconds, 0.0)
        each = known.get((cell.method, cell.task), max(known.values(), default=usual))
        return each * (work or len(cell.images))


def time_methods(cells: dict[Cell, Line], compute: Computer, report: Report) -> Times:
    """Returns the times of methods, from runs of two steps.

    They run twice, and the second time counts: in the first one libraries are loaded, and what is
    made once for an operator.
    """
    first = next(iter(cells))
    times = Times(*time_prior(first.prior, 1, first.precision, compute.device))
    report.say(
        f"network: an evaluation {times.evaluation:.3g} s, a product {times.product:.3g} s, one "
        "image"
    )
    for cell, line in cells.items():
        place = f"{line.label}, {cell.task}"
        try:
            compute(cell)
            rows, _ = compute(cell)
        except UnsupportedTask as error:
            report.say(f"{place}: a dash: {error}")
            times.ratios[cell.method, cell.task] = 0.0
            continue
        except Exception as error:  # whatever it is, it would fail later
            report.refuse(f"{place}: {error!r}")
            continue
        seconds = float(rows[0]["seconds"])
        work = times.work(float(rows[0]["evaluations"]), float(rows[0]["products"]))
        measured, unit = (times.ratios, work) if work else (times.seconds, 1.0)
        measured[cell.method, cell.task] = seconds / unit
        report.say(
            f"{place}: {seconds:.3g} s, {rows[0]['evaluations']} evaluations, "
            f"{rows[0]['products']} products"
            + (f", {seconds / work:.2f} times the network's" if work else "")
        )
    return times


def try_constants(cells: dict[Cell, Line], compute: Computer, report: Report) -> None:
    """Runs one iteration of each row of ours with its own horizon and constants.

    A short run has larger constants, so it does not show whether Quu is definite with these.
    """
    if is_inaccurate(next(iter(cells)).prior) or not compute.device.startswith("cuda"):
        report.say("the rows' own constants: not tried, it takes trained weights and a GPU")
        return
    for cell, line in cells.items():
        if METHODS[cell.method].recipe is not None:
            try:
                compute(replace(cell, settings=as_json(cell.keywords | {"iterations": 1})))
            except Exception as error:  # whatever it is, it would fail later
                report.refuse(f"{line.label}, {cell.task}, one iteration: {error!r}")


def largest_batch(cell: Cell, compute: Computer, names: Sequence[str], report: Report) -> None:
    """Tries 1, 2, 4, ... images at once, one iteration with the horizon of the row.

    It does so with activations recomputed, as the row has them, and kept, which is faster.
    """
    if not compute.device.startswith("cuda"):
        report.say("largest batch: not tried, a CPU's memory is not the limit that counts")
        return
    for keep, how in ((False, "recomputed"), (True, "kept")):
        keywords = cell.keywords | {"iterations": 1, "keep_activations": keep}
        fits = 0
        for batch in (2**k for k in range(9)):
            some = tuple(names[i % len(names)] for i in range(batch))
            try:
                compute(replace(cell, images=some, settings=as_json(keywords)))
            except (torch.OutOfMemoryError, OSError):  # what a full memory raises
                break
            except Exception as error:  # it is said, and the rest goes on
                report.refuse(f"largest batch: {cell.method} with {batch} images: {error!r}")
                break
            fits = batch
        torch.cuda.empty_cache()
        what = f"{cell.method}, T = {keywords['steps']}, activations {how}"
        report.say(f"largest batch of {what}: {fits}")
        if not fits and not keep:
            report.refuse(f"largest batch: not one image of {what} fits into the memory")


def preflight(
    prior: str,
    paths: Sequence[Path],
    prepared: Path,
    names: Sequence[str],
    device: str,
    precision: str,
    tasks: Sequence[str] | None = None,
) -> Report:
    """Checks all, prints as it goes, and returns the report.

    `paths` are those of the originals; `prepared` is a folder with at least one picture of the
    prior's size, and `names` are those of the pictures there. The tasks are by default those of
    Table 1; the rest is as for :func:`diffoc.experiments.cells.cells_of`.
    """
    report = Report()
    full = cells_by_line("table1", prior, names[:1], 1, precision, tasks=tasks)
    for name in dict.fromkeys([prior, *(cell.prior for cell in full)]):
        check_weights(name, report)
    check_metrics(report)
    lost = len(report.refused)
    side, _ = picture_size(prepared / names[0])
    check_images(paths, side, report)
    if lost:
        report.say("the rest needs the weights, or --random-weights")
        return report
    compute = Computer(prepared, device)
    small = cells_by_line("table1", prior, names[:1], 1, precision, tasks=tasks, smallest=True)
    times = time_methods(small, compute, report)
    try_constants(full, compute, report)
    ours = next((cell for cell, line in full.items() if line.label == "Ours (NFE = 2500)"), None)
    if ours:
        largest_batch(ours, compute, names, report)
    unit = "GPU-hours" if device.startswith("cuda") else "hours of this CPU"

    def say_cost(title: str, cells: dict[Cell, Line]) -> float:
        """Reports hours and disk, for all images and for 100; returns the gigabytes."""
        hours = sum(map(times.of, cells)) / 3600
        size = len(cells) * len(paths) * 3 * side**2 / 1e9
        report.say(
            f"{title}: {len(paths)} images {hours * len(paths):.3g} {unit}, {size:.2g} GB at most; "
            f"100 images {hours * 100:.3g} {unit}"
        )
        return size

    every: dict[Cell, Line] = {}
    for table in TABLES:
        chosen = None if table not in ("table1", "table3") else tasks
        cells = cells_by_line(table, prior, ["one"], 1, precision, tasks=chosen)
        say_cost(table, cells)
        every |= {cell: every.get(cell, line) for cell, line in cells.items()}
    size = say_cost("all tables, which share rows", every)
    free = shutil.disk_usage(prepared).free / 1e9
    if free < size:
        report.refuse(f"disk: {free:.3g} GB are free at {prepared}, {size:.3g} are needed")
    return report
