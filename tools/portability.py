"""What `tools/portable.py` loads into pytest and into kernels: jitters, and a record of bounds.

A jitter multiplies shipped weights and measurements by 1 + 1e-6 z, with z from N(0, 1): about the
last digit of float32. `PORTABLE_JITTER` is the seed of z, and no jitter where it is not set. Both
sides of every comparison that a test or a cell asserts are appended to the file of `PORTABLE_LOG`,
a JSON list [place, operator, left, right] a line.
"""

from __future__ import annotations

import ast
import json
import operator
import os
import re
import zlib

import numpy as np

SIZE = 1e-6
OPERATORS = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
MEANS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_NUMBER = r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"
_COMPARED = re.compile(rf"^\(?{_NUMBER} (<=?|>=?) {_NUMBER}\b", re.MULTILINE)
_EQUAL = re.compile(rf"^\(?{_NUMBER} == {_NUMBER} ± {_NUMBER}")


def perturb(seed: int) -> None:
    """Multiplies what `safetensors` loads from bytes and what `measure` returns, from now on."""
    import safetensors.torch
    import torch

    def jittered(tensor, random):
        if not tensor.is_floating_point():
            return tensor
        # Half precision cannot hold the change; what it loads is made float32 anyway.
        wide = tensor.float() if tensor.itemsize < 4 else tensor
        return wide * (1 + SIZE * wide.new_tensor(random.standard_normal(tuple(tensor.shape))))

    load = safetensors.torch.load
    safetensors.torch.load = lambda content: {
        # The order of the tensors differs from run to run.
        name: jittered(tensor, np.random.default_rng([seed, *name.encode()]))
        for name, tensor in load(content).items()
    }
    # Only now, so that the modules below find the function above.
    from diffoc.problems import tasks

    plain = tasks.measure

    def measure(*args, **kwargs):
        y = plain(*args, **kwargs)
        # Equal measurements stay equal, in any batch, as what compares two runs expects.
        seeds = [[seed, zlib.crc32(part.detach().numpy().tobytes())] for part in y]
        parts = zip(y, map(np.random.default_rng, seeds), strict=True)
        return torch.stack([jittered(*part) for part in parts])

    tasks.measure = measure


def record(place: str, sign: str, left: object, right: object) -> None:
    """Appends a comparison of two numbers to the log; of anything else, nothing."""
    try:
        numbers = float(left), float(right)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        return
    with open(os.environ["PORTABLE_LOG"], "a", encoding="utf-8") as file:
        file.write(json.dumps([place, sign, *numbers]) + "\n")


class Recorder(ast.NodeTransformer):
    """Makes the comparisons of assertions record their sides."""

    def __init__(self) -> None:
        self.inside = 0

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        """Only what is asserted is changed, not the message."""
        self.inside += 1
        node.test = self.visit(node.test)
        self.inside -= 1
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        """`a < b <= c` becomes a call with its text, its operators, and its values."""
        place = ast.unparse(node)
        self.generic_visit(node)
        names = [OPERATORS.get(type(sign)) for sign in node.ops]
        if not self.inside or None in names:
            return node
        call = ast.parse(f"__compare__({place!r}, {names!r})", mode="eval").body
        call.args += [node.left, *node.comparators]  # type: ignore[attr-defined]
        return ast.fix_missing_locations(ast.copy_location(call, node))


def compare(place: str, operators: list[str], *values: object) -> object:
    """What Python's chained comparison gives, recorded."""
    result: object = True
    for sign, left, right in zip(operators, values, values[1:], strict=False):
        record(place, sign, left, right)
        result = MEANS[sign](left, right)
        if len(operators) > 1 and not result:
            return result
    return result


def start_kernel(shell) -> None:
    """Prepares a kernel, from a file of IPython's startup folder."""
    shell.user_ns_hidden["__compare__"] = compare
    shell.user_ns["__compare__"] = compare
    shell.ast_transformers.append(Recorder())
    _start()


def pytest_configure(config) -> None:
    """Prepares pytest, before tests import the package."""
    _start()


def pytest_collection_modifyitems(config, items: list) -> None:
    """Leaves out what a jitter cannot leave alone: half precision has no room for it."""
    if os.environ.get("PORTABLE_JITTER"):
        items[:] = [item for item in items if not item.name.endswith("in_half_precision")]


def pytest_assertion_pass(item, lineno: int, orig: str, expl: str) -> None:
    """Records the numbers of an assertion, where its explanation begins with them."""
    place = f"{item.name}: {' '.join(orig.split())}"
    if found := _COMPARED.search(expl):
        record(place, found[2], found[1], found[3])
    elif found := _EQUAL.match(expl):
        record(place, "<=", abs(float(found[1]) - float(found[2])), found[3])


def _start() -> None:
    if seed := os.environ.get("PORTABLE_JITTER"):
        perturb(int(seed))
