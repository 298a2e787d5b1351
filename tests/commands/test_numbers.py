"""Numbers on the command line: each that no command can use ends in one line that names it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from diffoc.commands.main import FROM_ZERO, main, parser_of
from diffoc.data.provenance import ROOT, told


def options(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[tuple]:
    """Every numeric option of every command, with the words that lead there."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from options(below, (*words, name))
        elif action.type in (int, float):
            needed = [
                word
                for other in parser._actions
                for word in ([] if other is action else required(other))
            ]
            yield (*words, *needed), action


def required(action: argparse.Action) -> list[str]:
    if not action.required:
        return []
    value = str(next(iter(action.choices))) if action.choices else "x"
    values = [value] * (action.nargs if isinstance(action.nargs, int) else 1)
    return [*action.option_strings[:1], *values]


CASES = [
    pytest.param(words, action, value, id=f"{words[0]} {action.dest} {value}")
    for words, action in options(parser_of())
    for value in ["-1", *(["nan", "inf"] if action.type is float else [str(10**25)])]
    + ([] if action.dest in FROM_ZERO else ["0"])
]


@pytest.mark.parametrize(("words", "action", "value"), CASES)
def test_a_number_that_no_command_can_use_is_one_line(words, action, value, capsys) -> None:
    extra = ["picture.png"] if words[0] == "solve" else []
    assert main([*words, *extra, f"{action.option_strings[0]}={value}"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith(f"diffoc: {action.dest} is {action.type(value)}, expected")


def test_a_rate_that_diverges_at_once_is_refused(capsys) -> None:
    assert main(["train", "mnist", "--rate", "1e30"]) == 2
    assert (
        capsys.readouterr().err
        == "diffoc: rate is 1e+30, expected a number above 0 and at most 1\n"
    )


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_full_memory_is_one_line(error, monkeypatch, capsys) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr("diffoc.experiments.records.read", fail)
    assert main(["table", "x.csv"]) == 2
    assert capsys.readouterr().err.startswith("diffoc: memory is full")


def test_what_an_error_says_holds_no_password_and_no_place_of_this_machine() -> None:
    said = told(f"https://me:secret@mirror.org/x failed for\n {ROOT}/data/a and {Path.home()}/b")
    assert said == "https://mirror.org/x failed for data/a and ~/b"
    assert told("https://mirror.org/a@b") == "https://mirror.org/a@b"
