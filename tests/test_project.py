"""The project as a whole: its pins agree, make explains itself, the notebooks are as promised."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat import NotebookNode
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from diffoc.data.files import lock
from notebooks import execute, find, main, run, solutions, table

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


# Pins


def requirements() -> dict[str, Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    listed = [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]
    return {canonicalize_name(r.name): r for r in map(Requirement, listed)}


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    listed = [Requirement(line) for line in lines if not line.startswith("#")]
    return {canonicalize_name(r.name): r for r in listed}


@pytest.mark.parametrize("name", requirements())
def test_constraints_pin_each_requirement_within_its_bounds(name: str) -> None:
    (pin,) = pins()[name].specifier
    assert pin.operator == "=="
    assert requirements()[name].specifier.contains(pin.version)


def test_constraints_are_exact_and_hold_on_every_platform() -> None:
    for name, pin in pins().items():
        assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), pin
        assert not name.startswith(("nvidia-", "cuda-", "triton")), pin
        assert pin.url is None, pin


def test_importing_the_package_leaves_out_what_takes_seconds() -> None:
    slow = {"deepinv", "diffusers", "matplotlib", "pandas", "torchvision"}
    code = f"import sys, diffoc; print(*sorted({slow} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_conda_installs_what_pyproject_says() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    *conda, pip = environment["dependencies"]
    assert pip == {"pip": ["-c constraints.txt", "-e .[notebooks,test]"]}
    extras = {"notebooks", "metrics", "app", "site", "test", "train", "cluster"}
    assert set(PROJECT["optional-dependencies"]) == extras
    for listed in map(Requirement, conda):
        if listed.name == "python":
            assert listed.specifier == Requirement(f"python{PROJECT['requires-python']}").specifier
        elif listed.specifier:
            assert listed.specifier == requirements()[canonicalize_name(listed.name)].specifier


# Make, in bad surroundings


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout in which nothing has been installed, with a folder ``bin`` for fake programs."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "bin").mkdir()
    return tmp_path


def fake(checkout: Path, program: str, script: str) -> None:
    path = checkout / "bin" / program
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def fill_disk(checkout: Path) -> None:
    fake(checkout, "df", "echo Filesystem; echo /dev/disk1 16000000 15000000 1000000 94% /")


def make(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    own = ("MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS", "PYTHON", "VENV")
    environment = {name: value for name, value in os.environ.items() if name not in own}
    environment["PATH"] = f"{checkout / 'bin'}{os.pathsep}{environment['PATH']}"
    return subprocess.run(
        ["make", *arguments], cwd=checkout, env=environment, capture_output=True, text=True
    )


def assert_fails_in_one_line(process: subprocess.CompletedProcess[str], *says: str) -> None:
    assert process.returncode != 0
    assert process.stdout == ""
    (line,) = process.stderr.splitlines()
    for words in says:
        assert words in line


def test_make_alone_lists_every_target(checkout: Path) -> None:
    process = make(checkout)
    assert process.returncode == 0
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert re.findall(r"^  make (\w+) ", process.stdout, re.MULTILINE) == phony.split()


def test_make_without_python(checkout: Path) -> None:
    process = make(checkout, "test", "PYTHON=no-such-python")
    assert_fails_in_one_line(process, "no-such-python", "3.11", "make PYTHON=")
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize(
    ("version", "says"),
    [("3, 10, 13", "make PYTHON="), ("3, 15, 0", "make PYTHON="), ("3, 11, 0", "disk space")],
)
def test_make_with_one_python_or_another(checkout: Path, version: str, says: str) -> None:
    disguise = f"import sys; sys.version_info = ({version}); "
    fake(checkout, "python3.x", f"""exec '{sys.executable}' -c "{disguise}$2" """)
    fill_disk(checkout)
    process = make(checkout, "reproduce", "PYTHON=python3.x")
    assert_fails_in_one_line(process, says)
    assert not (checkout / ".venv").exists()


def test_make_on_a_full_disk(checkout: Path) -> None:
    fill_disk(checkout)
    process = make(checkout, "test", f"PYTHON={sys.executable}")
    assert_fails_in_one_line(process, "disk space", "GB free", "run make again")
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("venv", ["", "no-such-folder"])
def test_make_in_an_environment_that_is_none(checkout: Path, venv: str) -> None:
    process = make(checkout, "test", f"VENV={venv}")
    assert_fails_in_one_line(process, f'VENV="{venv}"', "CONDA_PREFIX")


def test_make_of_an_unknown_target(checkout: Path) -> None:
    assert_fails_in_one_line(make(checkout, "tests"), "'tests'", "make help")


def test_reproduce_tells_the_ledger_after_a_notebook_that_failed(checkout: Path) -> None:
    (checkout / "env" / "bin").mkdir(parents=True)
    python = checkout / "env" / "bin" / "python"
    python.write_text('#!/bin/sh\necho "$@"\ncase "$*" in *notebooks.py*) exit 1;; esac\n')
    python.chmod(0o755)
    (checkout / "env" / ".diffoc-installed").touch()
    process = make(checkout, "VENV=env", "reproduce")
    assert process.stdout == "tools/notebooks.py --out build\n-m diffoc claims\n"
    assert process.returncode != 0


# The notebooks


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def texts(notebook: NotebookNode) -> Iterator[str]:
    """All that a reader can read in a notebook: sources and outputs, but no pictures."""
    for cell in notebook.cells:
        yield cell.source
        for output in cell.get("outputs", []):
            yield output.get("text", "")
            for kind, data in output.get("data", {}).items():
                if kind.startswith("text/"):
                    yield data


@cache
def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)


@each_notebook
def test_notebook_was_executed_top_to_bottom_and_tells_what_it_established(path: Path) -> None:
    cells = code_cells(read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output.output_type for cell in cells for output in cell.outputs}
    assert "error" not in kinds
    assert any(re.search(r"^\s*assert\b", cell.source, re.MULTILINE) for cell in cells)
    printed = "".join(output.get("text", "") for output in cells[-1].outputs)
    assert re.search(r"^Established: \S", printed, re.MULTILINE)


@each_notebook
def test_notebook_is_small_has_its_number_and_holds_no_absolute_path(path: Path) -> None:
    assert path.stat().st_size < 3 * 2**20
    first = read(path).cells[0].source.splitlines()[0]
    number = path.name.split("_")[0]
    assert re.fullmatch(rf"# {number} · [A-Za-z].*\w", first)
    absolute = re.compile(r"""(?:^|[\s"'(=])((?:/[\w.-]+){2,}|[A-Z]:\\\w+)""", re.MULTILINE)
    for text in texts(read(path)):
        assert not absolute.search(text)


@each_notebook
def test_pictures_are_described(path: Path) -> None:
    """In the metadata where MyST-NB looks for it, so that the site's pages have the text."""
    described = [
        cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        for cell in code_cells(read(path))
        if any("image/png" in output.get("data", {}) for output in cell.outputs)
    ]
    assert all(len(text) > 80 for text in described)
    assert len(set(described)) == len(described)


# What the notebooks and pages keep to: see CONTRIBUTING.md


def rows_below(text: str, heading: str) -> int:
    """The number of rows of the first table below a heading."""
    table = re.search(r"(?:^\|.*\n)+", text.partition(heading)[2], re.MULTILINE)
    return len(table[0].splitlines()) - 2 if table else 0


@each_notebook
def test_notebook_is_short_and_links_to_the_notation(path: Path) -> None:
    cells = read(path).cells
    assert len(cells) <= 40
    assert "](../docs/notation.md)" in cells[0].source
    summary = [cell.source for cell in cells if "## What was shown\n" in cell.source]
    assert len(summary) == 1
    assert 1 <= rows_below(summary[0], "## What was shown\n") <= 8


@each_notebook
def test_exercises_have_a_hint_and_a_solution(path: Path) -> None:
    """A folded solution for each, or the cell below has them all."""
    cells = read(path).cells
    (place,) = (i for i, cell in enumerate(cells) if "**On your own**" in cell.source)
    text = cells[place].source.partition("**On your own**")[2]
    exercises = re.split(r"^\d\. ", text.partition("<details>")[0], flags=re.MULTILINE)[1:]
    assert 2 <= len(exercises) <= 4
    assert all("*Hint: " in exercise for exercise in exercises)
    if "<details>" in text:
        folded = [int(number) for number in re.findall("<summary>Solution of (\\d)<", text)]
        assert folded == list(range(1, len(exercises) + 1))
        assert len(solutions(nbformat.v4.new_notebook(cells=[cells[place]]))) == len(exercises)
    else:
        assert cells[place + 1].source.startswith("# Solution")
        assert "hide-cell" in cells[place + 1].metadata.tags


def test_a_folded_solution_is_a_test(tmp_path: Path) -> None:
    path = write(tmp_path / "00_exercise.ipynb", "x = 1")
    shutil.copy(ROOT / "notebooks" / "conftest.py", tmp_path)
    notebook = nbformat.read(path, as_version=4)
    for i, code in enumerate(("assert x == 1", "assert x == 2")):
        text = f"<details><summary>Solution of {i}</summary>\n\n```python\n{code}\n```\n</details>"
        notebook.cells.insert(i, nbformat.v4.new_markdown_cell(text))
    nbformat.write(notebook, path)
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-current-env", str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tools")},
        capture_output=True,
        text=True,
    )
    assert "1 failed, 2 passed" in process.stdout
    assert "assert x == 2" in process.stdout


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize("path", sorted(ROOT.glob("figures/moving/*.webp")), ids=lambda p: p.name)
def test_animations_load_quickly(path: Path) -> None:
    assert path.stat().st_size <= 2 * 2**20


CARDS = sorted(path for path in (ROOT / "data").glob("*.md") if path.name != "README.md")


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.name)
def test_cards_link_to_the_notebooks_that_use_them(path: Path) -> None:
    assert "](../notebooks/" in path.read_text(encoding="utf-8")


# Their runner


def write(path: Path, *sources: str) -> Path:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write(
        tmp_path / "01_good.ipynb",
        "from pathlib import Path\nhere = Path.cwd().name",
        "assert 1 + 1 == 2\nprint(f'in {here}')\nprint('Established: 1 + 1 = 2')",
    )


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    path = write(tmp_path / "00_bad.ipynb", "x = 1", "", "print(x)\nassert x == 2, 'x'", "print(3)")
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[-1].outputs = [nbformat.v4.new_output("stream", text="of an older run")]
    nbformat.write(notebook, path)
    return path


@each_notebook
def test_figures_are_shown(path: Path) -> None:
    """Without IPython's inline backend a reader sees the words <Figure size ...> in their place."""
    shown = 0
    for cell in read(path).cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if data.get("text/plain", "").startswith("<Figure"):
                assert "image/png" in data
                shown += 1
    assert shown


def test_find_returns_numbered_notebooks_in_order(good: Path, bad: Path, tmp_path: Path) -> None:
    write(tmp_path / "draft.ipynb", "1")
    assert find(tmp_path) == [bad, good]
    with pytest.raises(FileNotFoundError, match="folder"):
        find(tmp_path / "elsewhere")


def test_a_failure_is_told_kept_and_does_not_stop_the_rest(
    good: Path, bad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = run([bad, good], out=tmp_path / "out")
    captured = capsys.readouterr()
    assert status == 1
    assert re.search(
        r"^00_bad\.ipynb +\d+\.\d  FAILED at In \[2\]: AssertionError: x$",
        captured.out,
        re.MULTILINE,
    )
    assert re.search(r"^01_good\.ipynb +\d+\.\d  1 \+ 1 = 2$", captured.out, re.MULTILINE)
    assert captured.out.endswith("1 executed to the end, 1 failed\n")
    assert re.search(r"^\[1/2\] 00_bad\.ipynb \d+\.\d s, failed$", captured.err, re.MULTILINE)
    kept = code_cells(nbformat.read(tmp_path / "out" / bad.name, as_version=4))
    assert [[output.output_type for output in cell.outputs] for cell in kept] == [
        [],
        ["stream", "error"],
        [],
    ]


def test_a_notebook_runs_in_its_own_folder_and_its_source_stays(good: Path, tmp_path: Path) -> None:
    before = good.read_bytes()
    (row,) = execute([good], out=tmp_path / "out")
    assert (row.notebook, row.established, row.error) == (good.name, "1 + 1 = 2", None)
    executed = nbformat.read(tmp_path / "out" / good.name, as_version=4)
    assert executed.cells[-1].outputs[0].text.startswith(f"in {tmp_path.name}\n")
    assert good.read_bytes() == before


def test_execution_in_place_leaves_nothing_that_differs_from_run_to_run(tmp_path: Path) -> None:
    path = write(
        tmp_path / "00_bars.ipynb",
        "from tqdm import tqdm\nfrom tqdm.notebook import tqdm as widget",
        "for _ in tqdm(range(3)): pass",
        "for _ in widget(range(3)): pass",
        "import ipywidgets\nipywidgets.IntSlider(3)",
    )
    assert execute([path], in_place=True)[0].error is None
    first = path.read_bytes()
    execute([path], in_place=True)
    assert path.read_bytes() == first
    notebook = nbformat.read(path, as_version=4)
    assert [len(cell.outputs) for cell in notebook.cells] == [0, 0, 0, 1]
    assert list(notebook.cells[-1].outputs[0].data) == ["text/plain"]
    assert [cell.execution_count for cell in notebook.cells] == [1, 2, 3, 4]


def test_in_place_a_failing_notebook_is_left_as_it_was(bad: Path) -> None:
    before = bad.read_bytes()
    assert execute([bad], in_place=True)[0].error == "In [2]: AssertionError: x"
    assert bad.read_bytes() == before


@pytest.mark.parametrize(
    ("source", "error"),
    [("import os; os._exit(1)", "DeadKernelError"), ("import time; time.sleep(60)", "Timeout")],
)
def test_a_dead_kernel_and_an_endless_cell_are_failures(
    source: str, error: str, tmp_path: Path
) -> None:
    (row,) = execute([write(tmp_path / "00_stuck.ipynb", "1", source)], timeout=2)
    assert row.error.startswith("In [2]: ")
    assert error in row.error


def test_two_run_at_a_time_and_the_next_run_says_how_long_they_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # whoever sets it, gets it
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    # Each waits for the other.
    source = f"""
import os, time
from pathlib import Path
Path('{meeting}', str(os.getpid())).touch()
while len(list(Path('{meeting}').iterdir())) < 2: time.sleep(0.01)
print('Established:', os.environ['OMP_NUM_THREADS'], Path(os.environ['DIFFOC_FIGURES']).name)
"""
    paths = [write(tmp_path / f"0{i}_waits.ipynb", source) for i in (1, 2)]
    out = tmp_path / "out"
    assert run(paths, out, jobs=2) == 0
    assert capsys.readouterr().out.count("  1 figures\n") == 2
    assert not (tmp_path / "figures").exists()
    assert run(paths[:1], out) == 0
    assert re.search(r"^1 notebooks, 1 at a time: about 1 min$", capsys.readouterr().err, re.M)


def test_two_runs_into_one_folder_are_refused_in_a_line(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with (out / ".lock").open("a") as file:
        lock(file)
        monkeypatch.setattr(sys, "argv", ["notebooks.py", "--out", str(out), str(good)])
        assert main() == 2
    assert ".lock is being written by another process" in capsys.readouterr().err
    assert main() == 0


def test_a_missing_notebook_is_refused_before_any_is_executed(good: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="paths: there is no notebook"):
        execute([good, tmp_path / "02_missing.ipynb"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_table_of_no_notebook_is_a_table() -> None:
    assert table([]).splitlines()[-1] == "0 executed to the end, 0 failed"


# The house: imports run in one direction

FLOORS = ["data", "root", "problems", "priors", "theory", "training", "baselines", "experiments"]
FLOORS += ["figures", "commands"]
SIDE_BY_SIDE = {"theory", "training"}
"""What stands on one floor, and takes nothing from each other."""


def test_imports_run_in_one_direction() -> None:
    """A module takes nothing from a floor above; only the package's face shows all of them."""
    package = ROOT / "diffoc"
    wrong = []
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).parts
        if parts in (("__init__.py",), ("__main__.py",)):
            continue
        here = parts[0] if len(parts) > 1 else "root"
        for match in re.finditer(r"from diffoc\.(\w+)", path.read_text()):
            there = match[1] if match[1] in FLOORS else "root"
            beside = here != there and {here, there} <= SIDE_BY_SIDE
            if FLOORS.index(there) > FLOORS.index(here) or beside:
                wrong.append(f"{'/'.join(parts)} takes from {there}")
    assert not wrong
