"""Computes the cells of a grid that a table does not have yet, and checks those that it has."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from joblib import Parallel, delayed
from torch import Tensor
from tqdm.auto import tqdm

from diffoc.data.provenance import environment
from diffoc.experiments import records
from diffoc.experiments.records import COUNTS, ENVIRONMENT, METRICS, Cell, Row
from diffoc.problems.tasks import UnsupportedTask

Compute = Callable[[Cell], tuple[list[Row], Tensor | None]]
"""Gives a row for every image of a cell, and the images; what the cell itself says is added."""

TOLERANCE = {"psnr": 0.3, "ssim": 0.02, "lpips_alex": 0.02, "lpips_vgg": 0.02}
RELATIVE_TOLERANCE = 0.1
"""Of metrics on another machine: absolute, or relative for those not named.

Rounding alone changes what an optimiser finds that steps as long as it is allowed to."""


def run_cells(
    cells: Sequence[Cell],
    compute: Compute,
    path: Path,
    *,
    jobs: int = 1,
    backend: str = "loky",
    shard: tuple[int, int] | None = None,
    retry_failed: bool = False,
    device: str = "cpu",
    keep: Callable[[Cell, Tensor], None] | None = None,
    work: Callable[[Cell], float] = lambda cell: cell.nfe * len(cell.images),
    progress: bool = True,
) -> dict[str, int]:
    """Computes cells and appends them to a table; those that it has are skipped.

    A cell that fails is recorded with its error, and the others go on.

    Args:
        cells: of the whole grid.
        compute: what gives a cell's rows; with several workers it is pickled.
        path: of the table.
        jobs: workers, of one thread each; 1 computes here, with the threads that torch has.
        backend: of joblib, "loky", or "ray" for a cluster.
        shard: (i, n) for the i-th of n parts of the cells, which has a file of its own.
        retry_failed: whether cells that failed are computed again.
        device: what the rows say of it.
        keep: called with each cell's images, here, before its rows are written.
        work: evaluations of a cell as planned, from which the bar tells the time left.
        progress: whether to show a bar.

    Returns:
        How many cells there are now, of those of the shard, by status.

    Raises:
        ValueError: if an argument is out of its range, or the table is another's.
        ImportError: for the backend "ray" where it is not installed.
    """
    if jobs < 1:
        raise ValueError(f"jobs is {jobs}, expected at least 1")
    if backend not in ("loky", "ray"):
        raise ValueError(f"backend is {backend!r}, expected 'loky' or 'ray'")
    target = records.shard_path(path, shard)
    with records.writing(target) as writer:
        mine, known = _part(cells, shard), records.read(path)
        status = {cell: known[cell][0]["status"] for cell in mine if cell in known}
        left = unfinished(cells, path, shard, retry_failed)
        calls = [(compute, cell, device, jobs > 1) for cell in left]
        total = sum(work(cell) for cell in left)
        with tqdm(total=total, disable=not progress, unit="evaluation", unit_scale=True) as bar:
            for cell, rows, images in _results(calls, jobs, backend):
                if keep is not None and images is not None:
                    keep(cell, images)
                writer.append(rows)
                status[cell] = rows[0]["status"]
                if rows[0]["status"] == "failed":
                    bar.write(f"failed: {records.describe(cell)}: {rows[0]['error']}")
                bar.update(work(cell))
    found = list(status.values())
    return {name: found.count(name) for name in ("ok", "failed", "unsupported")}


def unfinished(
    cells: Sequence[Cell],
    path: Path,
    shard: tuple[int, int] | None = None,
    retry_failed: bool = False,
) -> list[Cell]:
    """The cells that :func:`run_cells` would compute; arguments as there."""
    try:
        known = records.read(path)
    except FileNotFoundError:
        known = {}
    return [
        cell
        for cell in _part(cells, shard)
        if cell not in known or (retry_failed and known[cell][0]["status"] == "failed")
    ]


def _part(cells: Sequence[Cell], shard: tuple[int, int] | None) -> list[Cell]:
    mine = list(dict.fromkeys(cells))
    return mine if shard is None else mine[shard[0] - 1 :: shard[1]]


def _results(calls: list[tuple], jobs: int, backend: str) -> Iterator[tuple]:
    """What `_attempt` returns, in any order."""
    if jobs == 1 and backend == "loky":
        yield from (_attempt(*call) for call in calls)
    elif backend == "loky":
        pool = Parallel(jobs, backend="loky", return_as="generator_unordered", batch_size=1)
        yield from pool(delayed(_attempt)(*call) for call in calls)
    else:
        _register_ray()
        # Ray's backend cannot give results as they come: a round for every worker at a time.
        with Parallel(jobs, backend="ray", batch_size=1) as pool:
            for start in range(0, len(calls), jobs):
                yield from pool(delayed(_attempt)(*call) for call in calls[start : start + jobs])


def _register_ray() -> None:
    if importlib.util.find_spec("ray") is None:
        raise ImportError("backend is 'ray', which needs `pip install -e '.[cluster]'`")
    from ray.util.joblib import register_ray

    register_ray()


def _attempt(compute: Compute, cell: Cell, device: str, worker: bool) -> tuple:
    """The cell, its complete rows, and its images; runs in the workers."""
    if worker:
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
    images = None
    try:
        found, images = compute(cell)
        if len(found) != len(cell.images):
            raise RuntimeError(f"{len(found)} rows of {len(cell.images)} images")
        found = [{"status": "ok"} | row for row in found]
    except UnsupportedTask as error:
        found = [{"status": "unsupported", "error": str(error)}] * len(cell.images)
    except Exception as error:  # whatever it is, the other cells are not concerned
        found = [{"status": "failed", "error": repr(error)}] * len(cell.images)
    common = environment(device)
    return cell, [c | common | row for c, row in zip(cell.rows(), found, strict=True)], images


@dataclass(frozen=True)
class Checked:
    """What :func:`check` found.

    Attributes:
        rows: that were computed again.
        exact: of these, those that had to agree to the last digit.
        differences: one line for each number that does not agree.
    """

    rows: int
    exact: int
    differences: list[str]


def check(
    path: Path,
    compute: Compute,
    rows: int = 5,
    seed: int = 0,
    device: str = "cpu",
    only: Callable[[Cell], bool] = lambda cell: True,
) -> Checked:
    """Computes the cells of random rows again, and compares them with their records.

    On the machine of the record, with the same versions and threads, metrics and counts have to
    agree to the last digit; elsewhere metrics have to be within :data:`TOLERANCE`.

    Args:
        path: of a table.
        compute: as for :func:`run_cells`.
        rows: to choose; all rows of their cells are compared.
        seed: of the choice.
        device: that computes.
        only: which cells to choose from, such as those that are soon computed.

    Raises:
        ValueError: if the table has no row that can be checked, or an argument is out of range.
        FileNotFoundError: if it is missing.
    """
    if rows < 1:
        raise ValueError(f"rows is {rows}, expected at least 1")
    found = records.read(path).items()
    cells = {cell: some for cell, some in found if some[0]["status"] == "ok" and only(cell)}
    owners = [cell for cell in cells for _ in cell.images]
    if not owners:
        raise ValueError(f"path {path} has no row that could be checked")
    order = torch.randperm(len(owners), generator=torch.Generator().manual_seed(seed))
    chosen = dict.fromkeys(owners[i] for i in order[:rows])
    checked, exactly, differences = 0, 0, []
    for cell in chosen:
        _, new, _ = _attempt(compute, cell, device, False)
        exact = all(new[0][key] == cells[cell][0][key] for key in ENVIRONMENT)
        checked += len(new)
        exactly += exact * len(new)
        for old, again in zip(cells[cell], new, strict=True):
            differences += _compare(cell, old, again, exact)
    return Checked(checked, exactly, differences)


def _compare(cell: Cell, old: Row, new: Row, exact: bool) -> list[str]:
    place = f"{cell.method}, {cell.task}, image {old['image']}"
    if new["status"] != "ok":
        return [f"{place}: fails now: {new['error']}"]
    inputs = ("image_sha256", "weights_sha256", "operator", "protocol")
    found = [
        f"{place}: {key} is {new[key]} now, {old[key]} in the record"
        for key in inputs
        if new.get(key, "") != old[key]
    ]
    for key in (*METRICS, *COUNTS) if exact else METRICS:
        if old[key] and not _agree(key, old[key], new.get(key, ""), exact):
            found.append(f"{place}: {key} is {new.get(key)} now, {old[key]} in the record")
    return found


def _agree(key: str, old: str, new: str, exact: bool) -> bool:
    if exact or not new:
        return old == new
    allowed = TOLERANCE.get(key, RELATIVE_TOLERANCE * abs(float(old)))
    return abs(float(old) - float(new)) <= allowed
