"""What the pages say of the code is there: links lead somewhere, names can be imported."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

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
