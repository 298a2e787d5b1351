"""What the pages say of the code is there: links lead somewhere, names can be imported."""

from __future__ import annotations

import importlib
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import diffoc
import diffoc.problems
from diffoc.priors.pretrained import SHIPPED
from diffoc.problems import tasks

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("data/*.md")]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_of_a_page_lead_to_files(page: Path) -> None:
    links = LINK.findall(page.read_text(encoding="utf-8"))
    files = [link.partition("#")[0] for link in links if not re.match(r"https?:|mailto:|#", link)]
    assert [file for file in files if not (page.parent / file).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_names_in_a_page_can_be_imported(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    missing = []
    for name in set(re.findall(r"`(diffoc(?:\.\w+)+)`", text)):
        parts, thing = name.split("."), importlib.import_module("diffoc")
        for i, part in enumerate(parts[1:], 2):
            if not hasattr(thing, part):
                try:
                    importlib.import_module(".".join(parts[:i]))
                except ImportError:
                    missing.append(name)
                    break
            thing = getattr(thing, part)
    assert missing == []


README = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
SHORT = """
import diffoc
from diffoc.problems import super_resolution

prior = diffoc.load_prior("faces64")
physics = super_resolution(4)
y = physics.A(torch.zeros(1, 3, 64, 64))
problem = diffoc.Problem(physics, y, noise_std=0.05)
result = diffoc.reconstruct(problem, prior)
paper = diffoc.reconstruct(problem, prior, recipe=diffoc.PAPER)
assert paper.x0.shape == result.x0.shape
"""


@pytest.mark.parametrize("example", [*README, SHORT])
def test_examples_run_as_they_are_written(example: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a denoiser of a normal law in place of the network, and two steps of the paper's."""

    def wiener(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)

    prior = diffoc.priors.wrap_edm(wiener, (3, 64, 64))
    asked: list[str] = []
    monkeypatch.setattr(diffoc, "load_prior", lambda name: asked.append(name) or prior)
    monkeypatch.setattr(diffoc, "PAPER", replace(diffoc.PAPER, steps=2, iterations=1))
    names = {"torch": torch}
    exec(example, names)
    assert set(asked) <= set(SHIPPED)
    result = names["result"]
    assert result.x0.shape == (1, 3, 64, 64)
    assert result.residual_over_noise < 1.5


def test_all_that_problems_has_is_a_task_s() -> None:
    for name in diffoc.problems.__all__:
        assert getattr(diffoc.problems, name) is getattr(tasks, name)
    assert {*tasks.TASKS, "measure", "task"} == set(diffoc.problems.__all__)
    with pytest.raises(AttributeError, match="no attribute 'blur'"):
        _ = diffoc.problems.blur


def equations(text: str) -> set[int]:
    """The numbers of "5", "1, 2" and "13, 14 = 46 to 49"."""
    found: set[int] = set()
    for first, last in re.findall(r"(\d+)(?: to (\d+))?", text):
        found |= set(range(int(first), int(last or first) + 1))
    return found


def equations_named(text: str) -> set[int]:
    """The numbers that a source names, as Eq. 5, Eqs. 39-44, Eqs. 1-4, 17 and 18."""
    found: set[int] = set()
    for some in re.findall(r"Eqs?\.\s+((?:\d+(?:-\d+)?(?:, | and )?)+)", text):
        found |= equations(re.sub(r"(\d+)-(\d+)", r"\1 to \2", some))
    return found


ROWS = [
    (cells[0], LINK.findall(cells[2]))
    for line in (ROOT / "docs/notation.md").read_text(encoding="utf-8").splitlines()
    if re.match(r"\| \d", line) and len(cells := line.strip("| ").split(" | ")) == 4
]


@pytest.mark.parametrize(("numbers", "files"), ROWS, ids=[row[0] for row in ROWS])
def test_the_concordance_names_code_that_names_the_equation(numbers: str, files: list[str]) -> None:
    named = [equations_named((ROOT / "docs" / file).read_text(encoding="utf-8")) for file in files]
    assert files
    assert all(equations(numbers) & some for some in named)
