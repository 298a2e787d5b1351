"""Folded solutions are tested: each is a cell after the last one of its notebook."""

from nbformat.v4 import new_code_cell
from nbval.plugin import IPyNbCell

from notebooks import solutions


def pytest_collection_modifyitems(items):
    """Adds the solutions to the cells of each notebook, to run in the same kernel."""
    last = {cell.parent: place for place, cell in enumerate(items) if isinstance(cell, IPyNbCell)}
    for file, place in reversed(last.items()):
        items[place + 1 : place + 1] = [
            IPyNbCell.from_parent(
                file,
                name=f"Solution {number}",
                cell_num=items[place].cell_num + number,
                cell=new_code_cell(code),
                options=dict.fromkeys(("check", "check_exception", "skip"), False),
            )
            for number, code in enumerate(solutions(file.nb), 1)
        ]
