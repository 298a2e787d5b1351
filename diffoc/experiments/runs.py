"""Computes the cells of a grid that a table does not have yet, and checks those that it has."""

import importlib.util
import os
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import IO

import torch
from joblib import Parallel, delayed, parallel_config
from torch import Tensor
from tqdm.auto import tqdm

from diffoc.checks import check_at_least, device_failed, memory_is_full
from diffoc.data.files import lock
from diffoc.data.provenance import environment, told
from diffoc.experiments import records
from diffoc.experiments.records import COUNTS, ENVIRONMENT, METRICS, Cell, Row, alone, by_image
from diffoc.experiments.spread import tolerance
from diffoc.problems.tasks import UnsupportedTask

Compute = Callable[[Cell], tuple[list[Row], Tensor | None]]
"""Returns a row for each image of a cell, and the images; the cell's own columns are added."""


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

    Where a method fails with several images, they are computed again as cells of one image each.
    What fails then is recorded with its error, and the others go on; any other error, of the
    machine, the data or the code, ends the run and is no record. Images that have a record, in
    whatever batch, are left out, unless they failed and are to be tried again.

    With several jobs `compute` is pickled, and workers have one thread each; one job computes here,
    with torch's threads. The backend is joblib's "loky", or "ray" for a cluster. With the device
    "cuda" worker i has the card i, and those of a cluster one card each. A shard (i, n) is the i-th
    of n parts of the cells, and has a file of its own. `keep` is called with each cell's images,
    here, before its rows are written; `work` gives the evaluations of a cell as planned, from which
    the bar tells the time left.

    It returns how many cells of the shard there are by status; one with a failed image has failed.
    """
    if backend == "ray" and importlib.util.find_spec("ray") is None:
        raise ImportError("backend is 'ray', which needs `pip install -e '.[cluster]'`")
    target = records.shard_path(path, shard)
    if unfinished(cells, path, shard, retry_failed):  # a part of no cells has no file
        with records.writing(target) as append:
            left = unfinished(cells, path, shard, retry_failed)  # by no other process any more
            parent = os.getpid() if jobs > 1 or backend != "loky" else 0
            calls = [(compute, cell, device, parent) for cell in left]
            total = sum(work(cell) for cell in left)
            with tqdm(total=total, disable=not progress, unit="evaluation", unit_scale=True) as bar:
                for cell, rows, images in _results(calls, jobs, backend, device):
                    if keep is not None and images is not None:
                        keep(cell, images)
                    append(rows)
                    if rows[0]["status"] == "failed":
                        bar.write(f"failed: {records.describe(cell)}: {rows[0]['error']}")
                    bar.update(work(cell))
    known, order = recorded(path), ("ok", "unsupported", "failed")
    some = [
        [known[one]["status"] for one in alone(cell) if one in known]
        for cell in _part(cells, shard)
    ]
    outcomes = [max(statuses, key=order.index) for statuses in some if statuses]
    return {name: outcomes.count(name) for name in ("ok", "failed", "unsupported")}


def unfinished(
    cells: Sequence[Cell],
    path: Path,
    shard: tuple[int, int] | None = None,
    retry_failed: bool = False,
) -> list[Cell]:
    """Returns the cells that :func:`run_cells` would compute from these arguments."""
    known = recorded(path)
    had = {one for one, row in known.items() if not (retry_failed and row["status"] == "failed")}
    left = [
        replace(cell, images=tuple(one.images[0] for one in alone(cell) if one not in had))
        for cell in _part(cells, shard)
    ]
    return [cell for cell in left if cell.images]


def recorded(path: Path) -> dict[Cell, Row]:
    """Returns the rows of a table by cells of one image; none where there is no table yet."""
    try:
        return by_image(records.read(path))
    except FileNotFoundError:
        return {}


def _part(cells: Sequence[Cell], shard: tuple[int, int] | None) -> list[Cell]:
    mine = list(dict.fromkeys(cells))
    return mine if shard is None else mine[shard[0] - 1 :: shard[1]]


def _results(calls: list[tuple], jobs: int, backend: str, device: str) -> Iterator[tuple]:
    """Yields the cells that `_attempt` returns, in any order."""
    if jobs == 1 and backend == "loky":
        for call in calls:
            yield from _attempt(*call)
    elif backend == "loky":
        pool = Parallel(jobs, backend="loky", return_as="generator_unordered", batch_size=1)
        for done in pool(delayed(_attempt)(*call) for call in calls):
            yield from done
    else:
        from ray.util.joblib import register_ray

        register_ray()
        # Ray's backend cannot give results as they come: a round for every worker at a time.
        cards = {"ray_remote_args": {"num_gpus": 1}} if device == "cuda" else {}
        with parallel_config("ray", **cards), Parallel(jobs, batch_size=1) as pool:
            for start in range(0, len(calls), jobs):
                for done in pool(delayed(_attempt)(*call) for call in calls[start : start + jobs]):
                    yield from done


class MethodError(Exception):
    """What a method raised; its text is that error's."""


@contextmanager
def method_errors(settings: Collection[str] = ()) -> Iterator[None]:
    """Tells what a method raises by itself from what its machine or its code raises.

    A method fails by a value that it cannot go on with, by a singular matrix, or by numbers that
    are not finite: a MethodError takes the place of ValueError, ArithmeticError and RuntimeError.
    A full memory, which an OSError tells, a missing file or package and a wrong name are no result
    of it, nor is an error that begins with the name of one of its settings, which was asked for.
    """
    try:
        yield
    except (UnsupportedTask, NotImplementedError):
        raise
    except (MemoryError, ValueError, ArithmeticError, RuntimeError) as error:
        if memory_is_full(error):
            raise OSError(
                "memory is full: give fewer images at once with --batch, or fewer workers with "
                "--jobs"
            ) from error
        if isinstance(error, ValueError) and str(error).partition(" ")[0] in settings:
            raise
        if device_failed(error):
            raise OSError(f"the device failed: {error}") from error
        raise MethodError(told(repr(error))) from error


def _attempt(compute: Compute, cell: Cell, device: str, parent: int = 0) -> list[tuple]:
    """Returns a cell, its complete rows, and its images; in a worker if it has a parent.

    Where its method fails with several images, these are returned for each image by itself.
    """
    if parent:
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        _end_with(parent)
        if device == "cuda":
            torch.cuda.set_device(worker_number(parent) % torch.cuda.device_count())
    whole_products()
    images = None
    try:
        results, images = compute(cell)
        if len(results) != len(cell.images):
            raise TypeError(f"compute gave {len(results)} rows of {len(cell.images)} images")
        results = [{"status": "ok"} | row for row in results]
    except UnsupportedTask as error:
        results = [{"status": "unsupported", "error": told(error)}] * len(cell.images)
    except MethodError as error:
        results = [{"status": "failed", "error": str(error)}] * len(cell.images)
    if results[0]["status"] == "failed" and len(cell.images) > 1:
        return [done for one in alone(cell) for done in _attempt(compute, one, device, parent)]
    common = environment(device)
    return [(cell, [c | common | row for c, row in zip(cell.rows(), results, strict=True)], images)]


def whole_products() -> None:
    """Keeps GPUs from shortening products of float32 to TF32 unasked, the operator's too."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


@cache
def worker_number(parent: int) -> int:
    """Returns the number of this worker of a process, from 0; no two that live have the same.

    It is that of the first file that no other worker has locked; the lock ends with the process.
    """
    for i in count():
        file = (Path(tempfile.gettempdir()) / f"diffoc-{parent}-{i}.worker").open("w")
        try:
            lock(file)
        except ValueError:
            file.close()
        else:
            _HELD.append(file)
            return i
    raise AssertionError  # numbers do not end


_HELD: list[IO] = []


@cache
def _end_with(parent: int) -> None:
    """Ends this worker soon after its parent has ended, by whatever signal."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    if os.getppid() == parent:  # the workers of a cluster have another
        threading.Thread(target=watch, daemon=True).start()


@dataclass(frozen=True)
class Checked:
    """What :func:`check` found: counts of rows, and a line for each number that does not agree.

    Of the `rows`, `exact` is the number that had to agree to the last digit. The tolerances are
    those of PSNR on other machines, by method, task and precision.
    """

    rows: int
    exact: int
    differences: list[str]
    tolerances: dict[tuple[str, str, str], float]


def check(
    path: Path,
    compute: Compute,
    rows: int = 5,
    seed: int = 0,
    device: str = "cpu",
    only: Callable[[Cell], bool] = lambda cell: True,
) -> Checked:
    """Computes the cells of random rows again, and compares them with their records.

    On the CPU of the record, with the same versions and threads, metrics and counts have to agree
    to the last digit; elsewhere, and on a GPU, whose sums have no fixed order, metrics have to be
    within the tolerance that was measured for method, task and precision, see
    :mod:`diffoc.experiments.spread`. Where a row is chosen, all rows of its cell are compared;
    `only` tells from which cells to choose, such as those that are soon computed.
    """
    check_at_least(1, rows=rows)
    known = records.read(path).items()
    cells = {cell: some for cell, some in known if some[0]["status"] == "ok" and only(cell)}
    owners = [cell for cell in cells for _ in cell.images]
    if not owners:
        raise ValueError(f"path {path} has no row that could be checked")
    order = torch.randperm(len(owners), generator=torch.Generator().manual_seed(seed))
    chosen = dict.fromkeys(owners[i] for i in order[:rows])
    checked, exactly, differences = 0, 0, []
    for cell in chosen:
        new = [row for _, some, _ in _attempt(compute, cell, device) for row in some]
        same = all(new[0][key] == cells[cell][0][key] for key in ENVIRONMENT)
        exact = same and torch.device(device).type == "cpu"
        checked += len(new)
        exactly += exact * len(new)
        for old, again in zip(cells[cell], new, strict=True):
            differences += _compare(cell, old, again, exact)
    allowed = {(c.method, c.task, c.precision): tolerance("psnr", c, 0.0) for c in chosen}
    return Checked(checked, exactly, differences, allowed)


def _compare(cell: Cell, old: Row, new: Row, exact: bool) -> list[str]:
    place = f"{cell.method}, {cell.task}, image {old['image']}"
    if new["status"] != "ok":
        return [f"{place}: fails now: {new['error']}"]
    inputs = ("image_sha256", "weights_sha256", "operator", "protocol")
    differences = [
        f"{place}: {key} is {new[key]} now, {old[key]} in the record"
        for key in inputs
        if new.get(key, "") != old[key]
    ]
    for key in (*METRICS, *COUNTS) if exact else METRICS:
        then, now = old[key], new.get(key, "")
        agree = then == now
        if then and now and not exact:
            agree = abs(float(then) - float(now)) <= tolerance(key, cell, float(then))
        if then and not agree:
            differences.append(f"{place}: {key} is {new.get(key)} now, {then} in the record")
    return differences
