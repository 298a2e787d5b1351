"""The site: the README, the notebooks as they were committed, cards, records and the API.

Sources are read where they lie (`sphinx-build -c docs . build/site`, from the repository's root),
so that links between them need no rewriting. Nothing is executed, and nothing is fetched: the
pages read the same without a network.
"""

from __future__ import annotations

import json
import pkgutil
import shutil
import sys
from importlib.metadata import version as version_of
from importlib.util import find_spec
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the API of this checkout, wherever diffoc is installed from

from diffoc.experiments import ledger  # noqa: E402

project = "diffoc"
author = "The diffoc authors"
version = release = version_of("diffoc")
html_title = "Diffusion optimal control"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/*.md",
    "notebooks/*.ipynb",
    "data/*.md",
]
exclude_patterns = [".*", "build", "**/.ipynb_checkpoints", "docs/contents.md"]

nb_execution_mode = "off"
nb_ipywidgets_js = {}  # no widget is alive here, and the scripts would come from a CDN
nb_merge_streams = True
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_dmath_double_inline = True  # a display formula inside a list item
myst_heading_anchors = 3

smartquotes_action = "qe"  # quotes and dots, but an option keeps both of its dashes
# Single backticks are code in the docstrings, whatever reStructuredText thinks.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_use_ivar = True

html_theme = "furo"
html_baseurl = ""
html_show_sourcelink = False
html_copy_source = False
# One file with its fonts inside. The package is for Django, but needs none of it.
_mathjax = Path(find_spec("mathjax").origin).parent / "static/mathjax/es5/tex-svg-full.js"
mathjax_path = _mathjax.name
html_static_path = [
    "site.css",
    "site.js",
    *(str(path) for path in (ROOT / "figures/moving").glob("*.webp")),
    str(_mathjax),
]
html_css_files = ["site.css"]
html_js_files = ["site.js"]


def complete(app: Sphinx, docname: str, source: list[str]) -> None:
    """Adds what is not written in a page: contents, the modules, the records, the ledger."""
    if docname == root_doc:
        source[0] += (ROOT / "docs/contents.md").read_text(encoding="utf-8")
    elif docname == "docs/api":
        names = [name for _, name, _ in pkgutil.walk_packages([ROOT / "diffoc"], "diffoc.")]
        source[0] += "".join(map(_module, ["diffoc", *sorted(set(names) - {"diffoc.__main__"})]))
    elif docname == "docs/records":
        source[0] += "".join(map(_record, sorted((ROOT / "data/records").rglob("*.csv"))))
    elif docname.startswith("notebooks/"):
        # A folder, to who reads the notebook where it lies, is here the page of what is in it.
        source[0] = source[0].replace("(../data/records)", "(../docs/records.md)")
        source[0] = _with_anchors(source[0], f"{docname.removeprefix('notebooks/')}.ipynb")
    elif docname == "docs/ledger":
        claims = ledger.read()
        for verdict, count in ledger.counts(claims).items():
            chosen = [claim for claim in claims if claim.verdict == verdict]
            source[0] += f"\n## {verdict.capitalize()} ({count})\n" + "".join(map(_claim, chosen))


def _claim(claim: ledger.Claim) -> str:
    """Heading, what the paper says, what was found, and the numbers with links to their sources."""
    planned = f" *Planned:* {claim.planned}" if claim.planned else ""
    numbers = "".join(
        f"- {ledger.told(each)}: {each.what} ({_source(each)})\n" for each in claim.numbers
    )
    return (
        f"\n### {claim.place}\n\n> {_plain(claim.says)}\n\n"
        f"*Found:* {_plain(claim.reason)}{planned}\n\n{_plain(numbers)}"
    )


def _source(number: ledger.Number) -> str:
    source = number.source
    if isinstance(source, ledger.Printed):
        page = f"../notebooks/{source.file.removesuffix('.ipynb')}.html"
        return f'<a href="{page}#{source.cell}">{source}</a>'
    if isinstance(source, ledger.Recorded):
        return f"[{source}](../data/records/{source.file})"
    return f"computed by `{source.name}`"


def _with_anchors(content: str, file: str) -> str:
    """A notebook whose cells that the ledger cites can be linked to by their id."""
    numbers = [number for claim in ledger.read() for number in claim.numbers]
    sources = [number.source for number in numbers if isinstance(number.source, ledger.Printed)]
    cited = {source.cell for source in sources if source.file == file}
    notebook = json.loads(content)
    cells = []
    for cell in notebook["cells"]:
        if cell["id"] in cited:
            anchor = f'<a id="{cell["id"]}"></a>'
            cells.append(
                {
                    "cell_type": "markdown",
                    "id": f"to-{cell['id']}",
                    "metadata": {},
                    "source": anchor,
                }
            )
        cells.append(cell)
    return json.dumps(notebook | {"cells": cells})


def _plain(text: str) -> str:
    """Text in which Markdown finds no formula."""
    return text.replace("$", "\\$")


def _module(name: str) -> str:
    # What the package itself offers is described where it is defined.
    members = "" if name == "diffoc" else "   :members:\n"
    return f"\n## {name}\n\n```{{eval-rst}}\n.. automodule:: {name}\n{members}```\n"


def _record(path: Path) -> str:
    """Heading, link to the file, and its first rows, in the order of its columns."""
    head, *rows = path.read_text(encoding="utf-8").splitlines()
    table = "\n".join(
        ["```{csv-table}", ":class: record", ":header-rows: 1", "", head, *rows[:5], "```"]
    )
    link = f"../{path.relative_to(ROOT).as_posix()}"
    return f"\n## {path.stem}\n\n[{path.name}]({link}), {len(rows)} rows; the first:\n\n{table}\n"


def add_index(app: Sphinx, exception: Exception | None) -> None:
    """The README is the first page, by the name that a server looks for, too."""
    if exception is None:
        shutil.copy(Path(app.outdir, f"{root_doc}.html"), Path(app.outdir, "index.html"))


def setup(app: Sphinx) -> None:
    app.connect("source-read", complete)
    app.connect("build-finished", add_index)
