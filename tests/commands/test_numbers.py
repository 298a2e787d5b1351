"""Numbers on the command line: each that no command can use ends in one line that names it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from diffoc.commands.main import FROM_ZERO, main, parser_of
from diffoc.data.provenance import ROOT, told
from diffoc.result import DivergenceError
from diffoc.riccati import SingularControlHessianError


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
    ("words", "said"),
    [
        ("evaluate mnist --samples 1", "samples is 1, expected at least 2"),
        ("evaluate faces64 --samples 1", "samples is 1, expected at least 2"),
        ("digits --samples 1", "samples is 1, expected at least 2"),
        ("digits --samples 10000000", "samples is 10000000, expected"),
        ("run table1 --jobs 100000", "jobs is 100000, expected"),
        ("solve x.png --task super_resolution --noise-std 1e-20", "noise_std is 1e-20, expected"),
        ("benchmark mnist --ranks 0 800", "ranks has 800, expected at most 784 for mnist"),
    ],
)
def test_a_number_that_this_command_cannot_use_is_one_line(words, said, capsys) -> None:
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"diffoc: {said}")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("text", ["", "1", "1/", "/2", "a/b", "1/2/3", "0/2", "3/2", "1.5/2"])
def test_what_is_no_part_is_said_with_an_example(text, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["run", "table1", "--shard", text])
    assert "--shard" in (err := capsys.readouterr().err)
    assert "is not I/N with 1 <= I <= N, such as 1/4" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("run table1 --prior nobody", "prior is 'nobody'"),
        ("tune dps --prior nobody", "prior is 'nobody'"),
        ("benchmark mnist nobody", "prior is 'nobody'"),
        ("run few_steps --tasks nothing", "tasks is 'nothing'"),
        ("run robustness --tasks phase_retrieval", "tasks has 'phase_retrieval', for which"),
        ("run table1 --prior ffhq256/32/64 --random-weights", "images is missing: name a folder"),
        ("run robustness --prior faces64+noise...", "prior is 'faces64+noise...'"),
        ("tune dps --prior faces64_latent", "prior is 'faces64_latent', one of latents"),
        ("ffhq table3 --rehearse --prior mnist", "prior is 'mnist', expected one of images in"),
        ("claims --notebooks nowhere", "notebooks nowhere has none"),
        ("train classifier --init data/mnist.safetensors", "init data/mnist.safetensors holds an"),
    ],
)
def test_a_name_that_is_none_is_said_before_the_work(
    words, said, capsys, monkeypatch, tmp_path
) -> None:
    def work(*args: object, **options: object) -> None:
        raise AssertionError("the work began")

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("torch.nn.functional.conv2d", work)
    out = [] if words.split()[0] == "claims" else ["--out", str(tmp_path / "out.json")]
    out += ["--checkpoint", str(tmp_path / "a.pt")] * words.startswith("train")
    assert main([*words.split(), *out]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"diffoc: {said}")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("value", ["null", "[1]", "{}", ""])
def test_what_no_setting_can_be_is_refused(value, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["run", "table1", "--set", f"steps={value}"])
    assert "argument --set" in capsys.readouterr().err


FULL, SINGULAR = "memory is full", "the numbers cannot be computed with"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), FULL),
        (torch.OutOfMemoryError("CUDA out of memory"), FULL),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), FULL),
        (RuntimeError("CUDA error: device-side assert\nCompile with"), "the device failed"),
        (RuntimeError("cuFFT error: CUFFT_INTERNAL_ERROR"), "the device failed"),
        (torch.linalg.LinAlgError("linalg.cholesky: it is not\npositive-definite"), SINGULAR),
        (SingularControlHessianError("Quu is not positive definite"), SINGULAR),
        (DivergenceError("the cost is not finite", None), SINGULAR),
    ],
)
def test_what_machine_or_numbers_refuse_is_one_line(error, said, monkeypatch, capsys) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr("diffoc.experiments.records.read", fail)
    assert main(["table", "x.csv"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"diffoc: {said}")


def test_an_error_of_the_code_is_no_line(monkeypatch) -> None:
    monkeypatch.setattr(
        "diffoc.experiments.records.read", lambda path: torch.ones(2) @ torch.ones(3)
    )
    with pytest.raises(RuntimeError, match="size"):
        main(["table", "x.csv"])


def test_what_an_error_says_holds_no_password_and_no_place_of_this_machine() -> None:
    said = told(f"https://me:secret@mirror.org/x failed for\n {ROOT}/data/a and {Path.home()}/b")
    assert said == "https://mirror.org/x failed for data/a and ~/b"
    assert told("https://mirror.org/a@b") == "https://mirror.org/a@b"
