"""Runs the folded solutions of the exercises, each after its notebook: 1 if one fails.

    python tools/solutions.py notebooks/0[1-5]*.ipynb

Readers see a solution folded below its exercise, as text; here it is a cell after all others.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

SOLUTION = re.compile(r"<details>.*?</details>", re.DOTALL)
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)


def main(paths: list[str]) -> int:
    """Executes the notebooks with their solutions appended, and says which fail."""
    failed = False
    for path in map(Path, paths):
        notebook = nbformat.read(path, as_version=4)
        texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
        folded = [
            code for text in texts for part in SOLUTION.findall(text) for code in CODE.findall(part)
        ]
        if not folded:
            continue
        notebook.cells += [nbformat.v4.new_code_cell(code) for code in folded]
        client = NotebookClient(notebook, resources={"metadata": {"path": str(path.parent)}})
        try:
            client.execute()
            print(f"{path.name}: {len(folded)} solutions run")
        except CellExecutionError as error:
            failed = True
            print(f"{path.name}: {error}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
