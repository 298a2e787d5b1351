"""Every option of every command, in every branch: it changes what is done, or one line refuses it.

What a command is about to do is caught where its work begins, in words: with the option they are
other words.
"""

from argparse import _SubParsersAction
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from diffoc.commands import ffhq, main, solve, tables, theory_and_priors
from diffoc.data import files
from diffoc.data import images as data
from diffoc.data.pictures import write_picture
from diffoc.priors.pretrained import load_prior

COMMANDS = next(
    action.choices for action in main.parser_of()._actions if isinstance(action, _SubParsersAction)
)

GRID = {
    "--prior": "mnist",
    "--tasks": "super_resolution",
    "--nfe": "1000",
    "--equal-work": "",
    "--images": "PICTURES",
    "--jobs": "2",
    "--backend": "ray",
    "--device": "cpu:0",
    "--precision": "bfloat16",
    "--out": "OUT/a.csv",
    "--retry-failed": "",
    "--set": "released.keep_activations=false",
}
FFHQ = {
    "--prior": "ffhq256/64/64",
    "--tasks": "super_resolution",
    "--precision": "bfloat16",
    "--first": "1",
    "--last": "2",
    "--images": "OTHERS",
    "--filter": "box",
    "--device": "cpu:0",
    "--out": "OUT",
}
TINY = "--prior ffhq256/32/64 --images PICTURES"

CASES = {
    "verify": ([""], {}),
    "claims": ([""], {"--quick": "", "--notebooks": "OUT"}),
    "fit": (["mnist"], {"name": "faces32", "--out": "OUT", "--seed": "1"}),
    "train": (
        ["mnist --checkpoint OUT/new.pt", "mnist --checkpoint CHECKPOINT"],
        {
            "name": "classifier",
            "--checkpoint": "OUT/other.pt",
            "--out": "OUT",
            "--init": "WEIGHTS",
            "--images": "7",
            "--rate": "0.5",
            "--seed": "1",
            "--device": "cpu:0",
            "--precision": "bf16",
            "--compile": "",
            "--every": "7",
        },
    ),
    "evaluate": (["mnist"], {"name": "faces64", "--samples": "3", "--out": "OUT"}),
    "solve": (
        [
            "PICTURE --prior mnist --task super_resolution",
            *(
                f"PICTURE --prior mnist --task random_inpainting --recipe {name}"
                for name in ("quick --steps 100", "stopped", "cold", "paper", "released")
            ),
            "PICTURE --prior mnist --task phase_retrieval --budget 200 --iterations 9",
            "--measurement MEASUREMENT --prior mnist --task super_resolution",
            "--measurement SMALL --prior mnist --task super_resolution",
        ],
        {
            "image": "OTHER",
            "--measurement": "MEASUREMENT",
            "--task": "gaussian_blur",
            "--crop": "0,0,8",
            "--prior": "faces64",
            "--out": "OUT",
            "--noise-std": "0.1",
            "--recipe": "cold --steps 7",
            "--budget": "120",
            "--steps": "6",
            "--iterations": "3",
            "--rank": "2",
            "--starts": "2",
            "--seed": "1",
            "--device": "cpu:0",
        },
    ),
    "run": (
        [
            "table1 --methods released --nfe 1000",
            "table1 --methods released --nfe 1000 --prior faces64 --images COLOURS",
            "rank",
            "robustness --methods dps",
        ],
        GRID
        | {
            "table": "parts",
            "--methods": "dps ours --set dps.guidance=1",
            "--seeds": "1",
            "--last": "1",
            "--batch": "2",
            "--shard": "1/2",
            "--keep": "OUT",
            "--random-weights": "",
        },
    ),
    "tune": (
        ["released --nfe 1000", "released --nfe 1000 --images PICTURES"],
        GRID | {"methods": "paper", "--images": "OTHERS"},
    ),
    "check": (
        ["RECORDS"],
        {
            "records": "OUT/a.csv",
            "--rows": "7",
            "--seed": "1",
            "--images": "OUT",
            "--device": "cpu:0",
        },
    ),
    "table": (["RECORDS"], {"records": "OUT/a.csv"}),
    "figures": ([""], {"--out": "OUT"}),
    "digits": ([""], {"--prior": "1aurent/mnist-28", "--samples": "7", "--out": "OUT/a.csv"}),
    "preflight": ([f"--random-weights {TINY}", TINY], FFHQ | {"--random-weights": ""}),
    "ffhq": (
        [f"table3 --rehearse {TINY}", f"table3 --random-weights {TINY}", f"table3 {TINY}"],
        FFHQ
        | {
            "table": "table4",
            "--random-weights": "",
            "--batch": "2",
            "--shard": "1/2",
            "--jobs": "2",
            "--backend": "ray",
            "--rehearse": "",
            "--retry-failed": "",
            "--protocol": "released",
        },
    ),
    "measure": (
        ["PICTURES --images PICTURES"],
        {
            "kept": "COPIES",
            "--batch": "2",
            "--shard": "1/2",
            "--images": "COPIES",
            "--filter": "box",
            "--device": "cpu:0",
            "--out": "OUT",
        },
    ),
    "benchmark": (
        ["mnist"],
        {
            "priors": "faces64",
            "--steps": "7",
            "--ranks": "3",
            "--batch": "3",
            "--repeats": "3",
            "--device": "cpu:0",
            "--teraflops": "7",
            "--random-weights": "",
            "--out": "OUT/a.json",
        },
    ),
}
"""By command: its branches, and another value of each of its options and arguments."""

SAME = {("ffhq", "--rehearse", "--random-weights")}
"""Options that are part of others: a rehearsal is with random weights."""


LOAD = cache(load_prior)
USUAL: dict = {}
"""What branches do, by command and branch."""


class Done(Exception):
    """The work would begin here."""


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Words for files that the command lines name."""
    folder = tmp_path_factory.mktemp("places")
    digits = data.digits()[0]
    for name, size in (("pictures", 64), ("others", 64), ("copies", 64), ("colours", 64)):
        (folder / name).mkdir()
        for i in range(3):
            colour = (40 * i, 200, 99 if name == "others" else 7)
            Image.new("RGB", (size, size), colour).save(folder / name / f"{i}.png")
    write_picture(digits[0], folder / "a.png")
    write_picture(digits[5], folder / "b.png")
    write_picture(digits[0][:, ::4, ::4], folder / "small.png")
    np.savez(folder / "y.npz", y=torch.zeros(1, 1, 7, 7), task="super_resolution", seed=0)
    for name in ("weights.safetensors", "records.csv", "checkpoint.pt"):
        (folder / name).write_text("a file")
    words = ("PICTURES", "OTHERS", "COPIES", "COLOURS")
    found = {word: str(folder / word.lower()) for word in words}
    return found | {
        "OUT": str(folder / "out"),
        "PICTURE": str(folder / "a.png"),
        "OTHER": str(folder / "b.png"),
        "MEASUREMENT": str(folder / "y.npz"),
        "SMALL": str(folder / "small.png"),
        "WEIGHTS": str(folder / "weights.safetensors"),
        "RECORDS": str(folder / "records.csv"),
        "CHECKPOINT": str(folder / "checkpoint.pt"),
    }


@pytest.fixture
def outcome(places, monkeypatch, capsys):
    """What a command line would do, in words, or the line that refuses it."""
    seen = []

    def catch(place, result=None, hidden=()):
        def caught(*args, **options):
            kept = [repr(each) for i, each in enumerate(args) if i not in hidden]
            seen.append(f"{place} {kept} {sorted((k, word(v)) for k, v in options.items())}")
            if result is None:
                raise Done
            return result

        monkeypatch.setattr(place, caught)

    def word(value):
        return value.__name__ if hasattr(value, "__name__") else repr(value)

    numbers = (np.zeros((80, 1, 28, 28), np.uint8), np.zeros(80))
    monkeypatch.setattr("diffoc.data.images.mnist", lambda split: numbers)
    run = SimpleNamespace(average=None)
    for place in ("start", "resume"):
        catch(f"diffoc.training.trainer.{place}", run)
    catch("diffoc.training.trainer.train", run, hidden=(1, 2))
    catch("diffoc.training.evaluation.worth_of_file", 0.0, hidden=(2, 3))
    catch("diffoc.training.evaluation.worth", 0.0, hidden=(1, 2))
    catch("diffoc.priors.weights.read_weights", {"weights": 1})
    catch("diffoc.priors.weights.write_weights")
    catch("diffoc.training.mixtures.fit_mixture_prior")
    catch("diffoc.training.evaluation.report", ({}, torch.zeros(64, 1, 8, 8)))
    catch("diffoc.figures.write_sheet")
    catch("diffoc.experiments.ledger.run", 0)
    catch("diffoc.experiments.benchmark.run")
    catch("diffoc.figures.paper.write_all")
    catch("diffoc.experiments.class_guidance.record")
    catch("diffoc.experiments.runs.run_cells")
    catch("diffoc.experiments.runs.check")
    catch("diffoc.experiments.records.read")
    catch("diffoc.experiments.preflight.preflight")
    catch("diffoc.experiments.measured.measure")
    monkeypatch.setattr("diffoc.experiments.cells.check_inputs", lambda *args: None)
    monkeypatch.setattr("diffoc.experiments.cells.check_recorded", lambda *args: None)
    monkeypatch.setattr("diffoc.experiments.cells.time_prior", lambda *args: (0.1, 0.1))
    monkeypatch.setattr("diffoc.experiments.runs.unfinished", lambda cells, *args: [])
    monkeypatch.setattr("diffoc.commands.theory_and_priors.verify", lambda args: 0)
    monkeypatch.setattr("diffoc.commands.solve.unfamiliar", lambda *args: [])

    def solved(case, prior, settings, device):
        recipe = settings.changed
        limit = None if recipe.spare else recipe.budget  # what `reconstruct` takes of a budget
        of_recipe = (recipe.name, recipe.steps, recipe.planned, limit, recipe.rank, recipe.weight)
        chosen = (settings.noise_std, settings.starts, settings.seed, device)
        truth = None if case.truth is None else case.truth.sum()
        seen.append(repr((case.y.sum(), truth, prior.image_shape, of_recipe, chosen)))
        raise Done

    monkeypatch.setattr("diffoc.commands.solve.run", solved)
    monkeypatch.setattr("diffoc.priors.pretrained.load_prior", LOAD)
    for module in (ffhq, solve, tables, theory_and_priors):
        for name in ("try_file", "try_folder"):
            if hasattr(module, name):
                tried = getattr(files, name)
                monkeypatch.setattr(
                    module, name, lambda path, t=tried: seen.append(str(path)) or t(path)
                )

    def run_line(text):
        seen.clear()
        words = [
            str(Path(places["OUT"]) / word.removeprefix("OUT").lstrip("/"))
            if word.startswith("OUT")
            else word
            for word in (places.get(word, word) for word in text.split())
        ]
        try:
            status = main.main(words)
        except Done:
            status = 0
        except SystemExit:
            status = 2
        return "; ".join(seen) if status == 0 else "", capsys.readouterr().err

    return run_line


def every():
    for command, (branches, options) in CASES.items():
        for branch in branches:
            for option, value in options.items():
                if (command, *(o for o in ("--rehearse",) if o in branch), option) not in SAME:
                    yield pytest.param(
                        command, branch, option, value, id=f"{command} {branch} {option}"
                    )


def test_every_option_of_every_command_is_here():
    for command, parser in COMMANDS.items():
        names = {a.option_strings[0] if a.option_strings else a.dest for a in parser._actions}
        assert names - {"-h"} == {*CASES[command][1]}, command


def changed(branch, option, value):
    """A branch with another value of an option, or of its first argument."""
    words = branch.split()
    if not option.startswith("--"):
        return " ".join([value, *words[1:]])
    if option in words:
        place = words.index(option)
        end = next((i for i, w in enumerate(words) if i > place and w.startswith("--")), len(words))
        del words[place:end]
        if not value:
            return " ".join([*words[:place], option, *words[place:]])
        return " ".join([*words[:place], option, value, *words[place:]])
    return " ".join([*words, option, value])


@pytest.mark.parametrize(("command", "branch", "option", "value"), list(every()))
def test_an_option_has_an_effect_or_is_refused(command, branch, option, value, outcome):
    if option == "image" and "--measurement" in branch:
        branch, value = "", value + " " + branch  # a picture beside a measurement
    if (command, branch) not in USUAL:
        USUAL[command, branch] = outcome(f"{command} {branch}")
    usual, why = USUAL[command, branch]
    assert usual or not branch or "FFHQ" in why, why
    with_it = changed(branch, option, value)
    if with_it.split() == branch.split():
        pytest.skip("the branch has this value")
    found, line = outcome(f"{command} {with_it}")
    if found:
        assert found != usual
    else:  # by this option, or by one that it does not go with
        names = [n.lstrip("-") for n in CASES[command][1]] + ["picture"]
        assert any(n in line or n.replace("-", "_") in line for n in names), line
