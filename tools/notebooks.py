"""Executes notebooks, each from a fresh kernel, and prints what each of them established.

    python tools/notebooks.py --out build             # executed copies and figures, in build
    python tools/notebooks.py --in-place [PATH ...]   # for maintainers: outputs and figures

The last code cell of a notebook prints one line that begins with ``Established:``. The rest
of that line, beside the seconds that the notebook took, is its row in the closing table.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import nbformat
from ipykernel.kernelspec import RESOURCES, get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellControlSignal, CellExecutionError, DeadKernelError
from nbformat import NotebookNode
from traitlets import default

from diffoc.data.files import lock, replacing

ROOT = Path(__file__).resolve().parent.parent
SECONDS = ROOT / "tools" / "seconds.json"
"""What the notebooks took when they were last executed in place, by name."""

WIDGET = "application/vnd.jupyter.widget-view+json"
FOLDED = re.compile(r"<details>.*?</details>", re.DOTALL)
FENCED = re.compile(r"```python\n(.*?)```", re.DOTALL)
PROGRESS_BAR = re.compile(r"\d%\|.*\[\d+:\d\d<")  # as tqdm draws it, on stderr or as a widget


@dataclass(frozen=True)
class Execution:
    """One notebook, executed.

    Attributes:
        notebook: its file name.
        seconds: wall time, the start of the kernel included.
        established: what its last code cell printed after ``Established:``; empty if nothing.
        error: the cell that stopped it and why, as in ``In [3]: KeyError: 'x'``; None if it
            ran to its end.
    """

    notebook: str
    seconds: float
    established: str
    error: str | None


def find(folder: Path) -> list[Path]:
    """Returns the notebooks of a folder that are named by their number, in reading order."""
    paths = sorted(folder.glob("[0-9][0-9]*_*.ipynb"))
    if not paths:
        raise FileNotFoundError(f"folder: expected notebooks such as 00_start.ipynb in {folder}")
    return paths


def execute(
    paths: Iterable[Path],
    out: Path | None = None,
    in_place: bool = False,
    timeout: float = 1800,
    jobs: int = 1,
) -> list[Execution]:
    """Executes notebooks in their own folders, in this interpreter, with a thread each.

    Executed copies go to the folder `out`, and figures to its `figures`; `in_place` writes outputs
    into the notebooks themselves, without what differs from run to run. One that fails does not
    keep the others from being executed: its copy ends, as far as outputs go, in the cell that
    failed, and in place it is left as it was. A cell may take `timeout` seconds. So many `jobs` run
    at a time, and those that took longest are begun first. Progress and tracebacks go to stderr.

    It returns a row for each notebook, in the order of the paths. A missing one is a
    FileNotFoundError before any is executed; that another process writes to `out` a ValueError.
    """
    paths = list(paths)
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"paths: there is no notebook {path}")
    expected = {path: _last_seconds(out).get(path.name, 0.0) for path in paths}
    begun = 0

    async def one(path: Path, places: asyncio.Semaphore) -> Execution:
        nonlocal begun
        async with places:
            begun += 1
            place = f"[{begun}/{len(paths)}] {path.name}"
            known = f"about {expected[path]:.0f} s" if expected[path] else "for the first time"
            _say(f"{place} ... {known}")
            notebook = nbformat.read(path, as_version=4)
            start = time.perf_counter()
            error, traceback = await _run_cells(notebook, path.parent, timeout, out)
            seconds = time.perf_counter() - start
        _say(f"{place} {seconds:.1f} s{', failed' if error else ''}")
        if error:
            _say(traceback)
        if out is not None:
            _write(notebook, out / path.name)
        if in_place and error is None:
            strip_volatile(notebook)
            _write(notebook, path)
        return Execution(path.name, seconds, established(notebook), error)

    async def every() -> list[Execution]:
        places = asyncio.Semaphore(jobs)
        longest_first = sorted(paths, key=lambda path: -expected[path])
        rows = await asyncio.gather(*(one(path, places) for path in longest_first))
        return sorted(rows, key=lambda row: [path.name for path in paths].index(row.notebook))

    if out is None:
        return asyncio.run(every())
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("a") as file:
        lock(file)
        return asyncio.run(every())


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _write(notebook: NotebookNode, path: Path) -> None:
    with replacing(path) as part:
        nbformat.write(notebook, part)


def _last_seconds(out: Path | None) -> dict[str, float]:
    """What notebooks took here, or else on the machine of the one who executed them in place."""
    files = [SECONDS, *([out / SECONDS.name] if out else [])]
    known = [json.loads(file.read_text()) for file in files if file.is_file()]
    return {name: seconds for some in known for name, seconds in some.items()}


def run(
    paths: Iterable[Path], out: Path | None = None, in_place: bool = False, jobs: int = 1
) -> int:
    """Executes notebooks as `execute` does, and prints the closing table: 1 if one failed."""
    paths = list(paths)
    known = _last_seconds(out)
    whole = ""
    if all(path.name in known for path in paths):
        minutes = sum(known[path.name] for path in paths) / jobs / 60
        whole = f": about {max(1, minutes):.0f} min"
    _say(f"{len(paths)} notebooks, {jobs} at a time{whole}")
    rows = execute(paths, out, in_place, jobs=jobs)
    took = {row.notebook: round(row.seconds, 1) for row in rows if row.error is None}
    with replacing(out / SECONDS.name if out else SECONDS) as part:
        part.write_text(json.dumps(dict(sorted((known | took).items())), indent=1) + "\n")
    print(table(rows))
    return int(any(row.error for row in rows))


def main() -> int:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, metavar="DIR", help="write executed copies there")
    where.add_argument("--in-place", action="store_true", help="write outputs into the notebooks")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), metavar="N")
    parser.add_argument("paths", nargs="*", type=Path, help="all by default")
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"jobs is {args.jobs}, expected at least 1")
    try:
        return run(args.paths or find(ROOT / "notebooks"), args.out, args.in_place, args.jobs)
    except (OSError, ValueError) as error:
        print(f"notebooks: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("notebooks: stopped", file=sys.stderr)
        return 130


def table(rows: list[Execution]) -> str:
    """Returns the closing table: notebook, seconds, what it established or where it failed."""
    name = max([len("notebook"), *(len(row.notebook) for row in rows)])
    failed = sum(row.error is not None for row in rows)
    lines = [f"{'notebook':{name}}  seconds  what it established"]
    for row in rows:
        outcome = f"FAILED at {row.error}" if row.error else row.established
        lines.append(f"{row.notebook:{name}}  {row.seconds:7.1f}  {outcome}".rstrip())
    lines.append(f"{len(rows) - failed} executed to the end, {failed} failed")
    return "\n".join(lines)


def established(notebook: NotebookNode) -> str:
    """Returns what the last code cell printed after ``Established:``, or an empty string."""
    code = _code_cells(notebook)
    printed = "".join(output.get("text", "") for output in code[-1].outputs) if code else ""
    match = re.search(r"^Established: (.+)$", printed, re.MULTILINE)
    return match[1].strip() if match else ""


def solutions(notebook: NotebookNode) -> list[str]:
    """Returns the code of the solutions that readers unfold below an exercise."""
    texts = (cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return [
        code for text in texts for part in FOLDED.findall(text) for code in FENCED.findall(part)
    ]


def strip_volatile(notebook: NotebookNode) -> None:
    """Removes, in place, what differs between two executions that show the same.

    That is: timestamps, progress bars, the state and the random model ids of widgets (their
    plain text stays), and the Python version of the kernel.
    """
    notebook.metadata.pop("widgets", None)
    notebook.metadata.get("language_info", {}).pop("version", None)
    for cell in _code_cells(notebook):
        cell.metadata.pop("execution", None)
        cell.outputs = [output for output in cell.outputs if not _is_progress_bar(output)]
        for output in cell.outputs:
            output.get("data", {}).pop(WIDGET, None)


class _KernelManager(AsyncKernelManager):
    """Starts kernels in the interpreter that runs this, whatever kernels a user has registered."""

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(resource_dir=RESOURCES, **get_kernel_dict())

    @default("transport_encryption")
    def _encrypt(self) -> str:
        return "auto"  # a kernel that does not encrypt warns in the middle of the progress


async def _run_cells(
    notebook: NotebookNode, folder: Path, timeout: float, out: Path | None
) -> tuple[str | None, str]:
    """Replaces the outputs of a notebook by those of a fresh kernel; stops at the first error.

    It returns which cell that was and why, in one line and at length; None and nothing without one.
    """
    for cell in _code_cells(notebook):  # or a failure would leave old outputs after it
        cell.outputs, cell.execution_count = [], None
    begun: list[int] = []
    client = NotebookClient(
        notebook,
        kernel_manager_class=_KernelManager,
        resources={"metadata": {"path": str(folder)}},
        timeout=timeout,
        record_timing=False,
        store_widget_state=False,  # it is random names, and pictures that only a kernel can change
        coalesce_streams=True,  # else the split of a cell's prints differs from run to run
        on_notebook_start=_let_interrupt_through,
        on_cell_execute=lambda cell, cell_index: begun.append(cell_index),
    )
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    if out is not None:
        environment["DIFFOC_FIGURES"] = str(out.resolve() / "figures")
    try:
        await client.async_execute(env=environment)
    except (CellControlSignal, DeadKernelError) as error:
        if isinstance(error, CellExecutionError):
            reason = f"{error.ename}: {error.evalue}"
        else:
            reason = f"{type(error).__name__}: {error}"
        # The kernel is fresh, so that the n-th code cell is In [n].
        return f"In [{len(begun)}]: {reason.splitlines()[0]}", str(error)
    return None, ""


def _let_interrupt_through(notebook: NotebookNode) -> None:
    """Undoes nbclient's handler of Ctrl-C, which ends one kernel where the user means them all."""
    asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)


def _is_progress_bar(output: NotebookNode) -> bool:
    """Tells whether an output is nothing but the bar that a loop drew while it ran."""
    if output.output_type == "stream":
        return output.name == "stderr" and bool(PROGRESS_BAR.search(output.text))
    return WIDGET in output.get("data", {}) and bool(
        PROGRESS_BAR.search(output.data.get("text/plain", ""))
    )


def _code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """Returns the cells that a kernel executes: code, and not blank."""
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


if __name__ == "__main__":
    sys.exit(main())
