"""The paper's tables on FFHQ at 256 pixels, row by row as the paper has them, beside its numbers.

A row is a method of ours or of others with the settings that the paper, or the method's authors,
published; what nobody published is what the 64x64 faces were tuned to, and the table says so.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffoc.baselines.paper import PAPER
from diffoc.baselines.released import RELEASED
from diffoc.data.downloads import find
from diffoc.experiments.cells import cells_of
from diffoc.experiments.inaccurate import accurate_name
from diffoc.experiments.methods import METHODS, read_tuned
from diffoc.experiments.paper_tables import TASKS, paper_rows
from diffoc.experiments.protocol import Protocol
from diffoc.experiments.records import Cell, read
from diffoc.experiments.summary import markdown
from diffoc.priors.pretrained import REMOTE

PRIOR, LATENT_PRIOR = "ffhq256", "ffhq256_latent"
NFE = 1000
"""The budget of the other methods."""

HORIZONS = (10, 20, 50, 100)
"""T of Table 6: the third is the one of Table 3, the others are ours."""

VARIED: dict[str, tuple[str, tuple]] = {
    "table4": ("rank", (0, 1, 4, 16)),
    "table5": ("regularization", (0, 1e-4, 1e-3, 1e-2, "lemma_4_2")),
    "table6": ("steps", HORIZONS),
}
"""What differs between the rows; the paper's text has lost most of it in Tables 5 and 6."""

_LPIPS, _PIXELS = {"lpips": "lpips_alex"}, {"psnr": "psnr", "ssim": "ssim", "mse": "mse_255"}
METRICS = {"table1": {"fid": "fid_png"} | _LPIPS, "table3": _PIXELS}
METRICS |= dict.fromkeys(("table4", "table5", "table6"), _LPIPS | _PIXELS)
"""A table's metrics, by their names in the paper's tables, and what we measure for them."""

TABLES = tuple(METRICS)


@dataclass(frozen=True)
class Line:
    """A row of a table.

    Attributes:
        label: the paper's, or our own for a row that it does not have.
        method, nfe: the method's name, "" for one that cannot run, and its budget.
        changes: settings that replace the method's own.
        note: where the settings are from, or why the method cannot run.
        may_fail: whether the method fails in the paper, too.
    """

    label: str
    method: str
    nfe: int = NFE
    changes: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    may_fail: bool = False


MCG_CODE = "github.com/HJ-harry/MCG_diffusion, for inpainting of FFHQ"


def published(method: str, task: str) -> tuple[dict[str, Any], str]:
    """Returns settings for FFHQ and 1000 evaluations of a method that has no recipe, and a source.

    What was tuned on FFHQ here counts most, then what its authors, or those of DPS and MCG, ran on
    FFHQ, then what they ran on other images, and last what was tuned on our small faces.
    """
    tuned = read_tuned()
    own = tuned.get(PRIOR, {}).get(method, {}).get(task, {}).get(str(NFE))
    inpainting = task.endswith("inpainting")
    if own:
        return own, f"tuned on FFHQ with {NFE} evaluations"
    if method == "dps":
        source = "configs of github.com/DPS2022/diffusion-posterior-sampling, for FFHQ"
        return {"guidance": 0.5 if inpainting else 0.3}, source
    if method in ("ddrm", "ddnm"):
        code = {"ddrm": "bahjat-kawar/ddrm", "ddnm": "wyhuai/DDNM"}[method]
        source = f"github.com/{code}, for CelebA-HQ and ImageNet; not published for FFHQ"
        return {"eta": 0.85}, source
    if method == "score_sde":
        where = MCG_CODE if inpainting else "a whole step; not published for FFHQ"
        return {"strength": 1.0}, where
    if method == "mcg" and inpainting:
        return {"guidance": 1.0, "strength": 1.0}, MCG_CODE
    if method == "psld":
        return {"guidance": 0.1, "gluing": 0.1}, "run/inverse_*_ldm.sh of github.com/LituRout/PSLD"
    budgets = tuned.get("faces64", {}).get(method, {}).get(task, {})
    usual = budgets.get(str(NFE)) or budgets.get("300") or {}
    return usual, "tuned on 64x64 faces with 300 evaluations, not on FFHQ"


def lines(table: str) -> list[Line]:
    """Returns the rows of one of :data:`TABLES`."""
    rows, ours = paper_numbers(table), PAPER.name
    if table in VARIED:
        key, values = VARIED[table]
        note = "T = {}, which the paper's text has lost" if table == "table6" else ""
        singular = 0 if table == "table5" else None
        return [
            Line(label, ours, 2500, {key: x}, note.format(x), may_fail=x == singular)
            for label, x in zip(rows, values, strict=True)
        ]
    methods = {label: row["method"] for label, row in rows.items()}
    of_pixels = {name for name, method in METHODS.items() if not (method.recipe or method.latent)}
    others = [Line(label, name) for label, name in methods.items() if name in of_pixels]
    if table == "table3":
        return [Line("Ours (T = 50)", ours, 2500), *others]
    missing = _missing(LATENT_PRIOR)
    severity = "not run: it needs its authors' severity encoder, which is not read here"
    return [
        Line("Ours (NFE = 2500)", ours, 2500, note="Table 2; NFE counts T times 50"),
        Line("Ours (NFE = 1000)", ours, 1000, note="Table 2, T = 20, 50 iterations"),
        Line("Released code", RELEASED.name, 1000, {"learned_variance": True}),
        Line("PSLD (NFE = 1000)", "" if missing else "psld", note=missing),
        Line("Flash-Diffusion* (NFE = varies)", "", note=severity),
        *others,
    ]


def _missing(prior: str) -> str:
    """Returns why a prior that has to be put by hand cannot run, or nothing."""
    try:
        find(REMOTE[prior])
    except FileNotFoundError as error:
        return f"not run: {error}"
    return ""


def tasks_of(table: str) -> tuple[str, ...]:
    """Returns the tasks of a table's columns."""
    return TASKS if table in ("table1", "table3") else TASKS[:2]


def cells_by_line(
    table: str,
    prior: str,
    images: Sequence[str],
    batch: int,
    precision: str,
    *,
    tasks: Sequence[str] | None = None,
    smallest: bool = False,
) -> dict[Cell, Line]:
    """Returns the cells of one of :data:`TABLES`, each with its row.

    Arguments are those of :func:`diffoc.experiments.cells.cells_of`. The tasks are some of the
    table's, by default all; for a rehearsal every method takes the `smallest` number of steps.
    """
    if tasks and (other := [task for task in tasks if task not in tasks_of(table)]):
        raise ValueError(f"tasks has {other[0]}, {table} has {', '.join(tasks_of(table))}")
    lines_of: dict[Cell, Line] = {}
    for line in lines(table):
        for task in tasks or tasks_of(table):
            latent = bool(line.method) and METHODS[line.method].latent
            if not line.method or (latent and prior != PRIOR):
                continue
            changes = dict(line.changes)
            if accurate_name(prior).partition("/")[0] != PRIOR:  # which may have no such head
                changes.pop("learned_variance", None)
            if METHODS[line.method].recipe is None:
                changes = published(line.method, task)[0] | changes
            if smallest:
                changes |= _smallest(line, task)
            used = LATENT_PRIOR if latent else prior
            cells = cells_of(
                used, [task], [line.method], [line.nfe], [0], images, batch, precision, changes
            )
            lines_of |= dict.fromkeys(cells, line)
    return lines_of


def _smallest(line: Line, task: str) -> dict[str, Any]:
    """Returns two steps and one iteration, for methods that have them; for Table 6 2 to 5 steps.

    The released code counts the ends of the steps, which are one more.
    """
    settings = METHODS[line.method].settings(task, line.nfe) | dict(line.changes)
    steps = 2 + (HORIZONS.index(line.changes["steps"]) if "steps" in line.changes else 0)
    steps += METHODS[line.method].recipe is RELEASED
    smallest = {key: n for key, n in (("steps", steps), ("iterations", 1)) if key in settings}
    # With random weights two steps make values so large that rounding makes Quu indefinite:
    # Tikhonov's constants are raised above it, in proportion.
    constant = settings.get("regularization", "")
    return smallest | ({} if isinstance(constant, str) else {"regularization": 1e8 * constant})


def paper_numbers(table: str) -> dict[str, dict[str, Any]]:
    """Returns the paper's own rows by label."""
    return {row["label"]: row for row in paper_rows(table)}


def check_protocol(path: Path, protocol: Protocol) -> None:
    """Raises a ValueError if a table has rows of another protocol."""
    cells = read(path) if path.exists() else {}
    if others := {rows[0]["protocol"] for rows in cells.values()} - {protocol.name, ""}:
        raise ValueError(
            f"{path} has rows of {min(others)!r}: name another folder with --out for "
            f"{protocol.name!r}"
        )


def beside_the_paper(
    table: str,
    means: Mapping[tuple[str, str], Mapping[str, float]],
    head: str,
    failed: Mapping[tuple[str, str], int] | None = None,
) -> str:
    """Returns one of :data:`TABLES` in Markdown for each metric, beside the paper's numbers.

    A place has our number, the paper's in brackets, and the difference. The means are those of a
    label and task, with their number of images as "images"; `failed` has that of the failed ones.
    The head says how the images were measured.
    """
    paper, tasks, parts = paper_numbers(table), tasks_of(table), [head]
    for metric, key in METRICS[table].items():
        rows = []
        for line in lines(table):
            ours = (means.get((line.label, task), {}).get(key) for task in tasks)
            theirs = (paper.get(line.label, {}).get(task, {}).get(metric) for task in tasks)
            counts = _counts([(line.label, task) for task in tasks], means, failed or {})
            rows.append([line.label, counts, *map(_place, ours, theirs)])
        title = f"{table}, {metric}: ours (paper's) difference"
        parts.append(f"{title}\n\n{markdown(['method', 'images', *tasks], rows)}")
    notes = [f"- {line.label}: {note}" for line in lines(table) for note in _notes(line, tasks)]
    return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])]) + "\n"


def _notes(line: Line, tasks: Sequence[str]) -> Iterator[str]:
    """Yields where a row's settings are from, by task where they differ, or why it is a dash."""
    if line.note:
        yield line.note
    if line.method and METHODS[line.method].recipe is None:
        sources = {task: published(line.method, task)[1] for task in tasks}
        for source in dict.fromkeys(sources.values()):
            where = [task for task in tasks if sources[task] == source]
            yield f"{source}" + (f" ({', '.join(where)})" if len(where) < len(tasks) else "")


def _counts(
    places: Sequence[tuple[str, str]],
    means: Mapping[tuple[str, str], Mapping[str, float]],
    failed: Mapping[tuple[str, str], int],
) -> str:
    """Returns how many images a row is of, task by task where they differ."""
    counts = [f"{means[place]['images']:g}" if place in means else "-" for place in places]
    lost = [f" + {failed[place]} failed" if failed.get(place) else "" for place in places]
    every = [a + b for a, b in zip(counts, lost, strict=True)]
    some = {text for text in every if text != "-"}
    return ", ".join(every) if len(some) > 1 else "".join(some) or "-"


def _place(ours: float | None, paper: float | None) -> str:
    own, theirs = ("-" if x is None else f"{x:.4g}" for x in (ours, paper))
    difference = "" if ours is None or paper is None else f" {ours - paper:+.3g}"
    return f"{own} ({theirs}){difference}"
