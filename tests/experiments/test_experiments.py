"""What the tables are made of: same measurements for all, records that a second run repeats."""

import math
import os
import runpy
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch

from diffoc.baselines import TRIALS, Method, Share, no_products
from diffoc.baselines.dps import dps
from diffoc.baselines.paper import TABLE_2, paper
from diffoc.commands.main import main
from diffoc.commands.tables import OUTWARD
from diffoc.data import digits, portrait
from diffoc.data.manifest import data_folder, load_weights, manifest_entry
from diffoc.data.pictures import picture_names, write_picture
from diffoc.data.provenance import ROOT
from diffoc.experiments import cells as experiments
from diffoc.experiments import methods
from diffoc.experiments.cells import Computer, best_trial, cells_of, check_settings, work_of
from diffoc.experiments.methods import LATENT, METHODS, compared, equal_work, settings_of
from diffoc.experiments.protocol import COLOUR_FACES, ONE_OPERATOR, protocol_of
from diffoc.experiments.records import METRICS, as_json, frame, read
from diffoc.experiments.summary import (
    described,
    differences,
    markdown,
    mean_and_interval,
    paired,
    plus_minus,
    summarise,
)
from diffoc.priors.counting import CountedPrior
from diffoc.priors.pretrained import load_prior
from diffoc.problems.metrics import image_metrics
from diffoc.problems.tasks import NOISE_STD, TASKS, UnsupportedTask, measure, task


@pytest.fixture
def folder(tmp_path):
    """Three digits as PNG files."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, image in enumerate(digits()[0][:3]):
        write_picture(image, folder / f"{i}.png")
    return folder


@pytest.fixture
def seen(monkeypatch):
    """A method that does nothing, called "look", and what it is given."""
    calls = []

    def look(prior, physics, y, x, generator, *, noise_std, steps):
        if physics.A(x).shape[-1] < x.shape[-1]:
            raise UnsupportedTask("look cannot do super-resolution")
        prior(x, torch.tensor(0.5))
        drawn = torch.randn((), generator=generator)
        calls.append({"y": y, "x": x, "noise_std": noise_std, "steps": steps, "drawn": drawn})
        return torch.zeros_like(x)

    plain = Method("Look", look, lambda task, nfe: {"steps": nfe}, no_products)
    monkeypatch.setitem(METHODS, "look", plain)
    grid = {"level": [0.1 * i for i in range(1, 9)]}
    tuned = Method("T", look, lambda task, nfe: {}, no_products, grid)
    monkeypatch.setitem(METHODS, "tuned", tuned)
    return calls


def grid(names, batch=3, tasks=("gaussian_blur",), seeds=(0,), **options):
    return cells_of("mnist", tasks, ["look"], [4], seeds, names, batch, "float32", **options)


def test_measurements_depend_on_image_and_seed_and_not_on_the_batch(folder, seen):
    compute = Computer(folder)
    names = picture_names(folder)
    assert names == ["0.png", "1.png", "2.png"]
    for cell in (*grid(names), *grid(names, batch=1), *grid(names, seeds=(1,))):
        compute(cell)
    together, *single, other = seen
    for key in ("y", "x"):
        torch.testing.assert_close(together[key], torch.cat([one[key] for one in single]))
        assert not torch.equal(together[key], other[key])
    noise = together["y"] - task("gaussian_blur", (1, 28, 28), torch.Generator()).A(digits()[0][:3])
    assert noise.std().item() == pytest.approx(NOISE_STD, rel=0.1)
    assert together["x"].std().item() == pytest.approx(1, rel=0.1)
    correlation = torch.corrcoef(noise.flatten(1))
    assert (correlation - torch.eye(3)).abs().max() < 0.15, "each image has noise of its own"
    assert (together["noise_std"], together["steps"]) == (NOISE_STD, 4)


def test_a_row_says_what_went_in_and_came_out(folder, seen):
    rows, images = Computer(folder)(grid(["0.png", "2.png"], batch=2)[0])
    truth = digits()[0][[0, 2]]
    expected = image_metrics(torch.zeros_like(truth), truth)
    assert torch.equal(images, torch.zeros_like(truth))
    y = seen[0]["y"]
    for i, row in enumerate(rows):
        for key, values in expected.items():
            assert float(row[key]) == pytest.approx(values[i].item(), rel=1e-6, abs=1e-5)
        residual = y[i].square().mean().sqrt()  # A(0) is 0
        assert float(row["residual_over_noise"]) == pytest.approx(residual.item() / 0.05, rel=1e-4)
        assert (row["evaluations"], row["products"]) == ("1", "0")
        assert row["weights_sha256"] == manifest_entry("mnist.safetensors")["sha256"][:16]
    assert rows[0]["image_sha256"] != rows[1]["image_sha256"]


def test_pictures_that_do_not_fit_are_refused(folder, seen):
    write_picture(torch.zeros(1, 20, 30), folder / "wrong.png")
    with pytest.raises(ValueError, match=r"wrong.png does not fit the prior: cut from"):
        Computer(folder)(grid(["wrong.png"])[0])
    with pytest.raises(ValueError, match="images is missing"):
        Computer()(grid(["0"])[0])


def test_the_grid_has_every_cell_once(seen):
    cells = grid(list("abcde"), batch=2, tasks=("gaussian_blur", "box_inpainting"), seeds=(0, 7))
    assert len(cells) == len(set(cells)) == 2 * 2 * 3
    assert [cell.images for cell in cells[:3]] == [("a", "b"), ("c", "d"), ("e",)]
    assert cells[0].keywords == {"steps": 4}
    assert grid("a", overrides={"steps": 9})[0].keywords == {"steps": 9}
    with pytest.raises(ValueError, match="tasks has 'cloud'"):
        grid("a", tasks=["cloud"])
    with pytest.raises(ValueError, match="batch is 0"):
        grid("a", batch=0)


def test_what_was_not_tuned_is_not_guessed(seen):
    arguments = ("mnist", "tuned", "box_inpainting", 4, {})
    with pytest.raises(ValueError, match="diffoc tune tuned --prior mnist --tasks box_inpainting"):
        settings_of(*arguments, tuned={})
    best = {"mnist": {"tuned": {"box_inpainting": {"4": {"level": 0.2}}}}}
    assert settings_of(*arguments, tuned=best) == {"level": 0.2}
    assert settings_of(*arguments[:4], {"level": 0.3}, tuned={}) == {"level": 0.3}
    with pytest.raises(ValueError, match="method is 'magic'"):
        settings_of("mnist", "magic", "box_inpainting", 4, {})


def test_the_tuned_rows_of_the_paper_are_not_its_published_ones():
    with pytest.raises(ValueError, match="paper_tuned is not tuned for gaussian_blur"):
        settings_of("faces64", "paper_tuned", "gaussian_blur", 1000, {}, tuned={})
    best = {"gaussian_blur": {"1000": METHODS["paper_tuned"].trials(1000)[0]}}
    tuned = {"faces64": {"paper_tuned": best}}
    found = settings_of("faces64", "paper_tuned", "gaussian_blur", 1000, {}, tuned)
    published = settings_of("faces64", "paper", "gaussian_blur", 1000, {}, {})
    assert found == published | {"rate": 5e-3, "weight_scale": 1e-6, "keep_activations": True}


def test_every_method_has_eight_trials_and_dps_has_more():
    counts = {name: len(method.trials(300)) for name, method in METHODS.items() if method.tuned}
    assert counts.pop("dps") == 12
    assert set(counts.values()) == {TRIALS}
    assert set(METHODS) - set(counts) == {"deep_image_prior", "dps"}
    with pytest.raises(ValueError, match="expected 8 trials"):
        Method("", dps, lambda task, nfe: {}, no_products, {"guidance": tuple(range(7))})


def method_of(**tuned):
    largest = tuned.pop("largest", {})
    return Method("", dps, lambda task, nfe: {}, no_products, tuned, largest)


def test_trials_are_all_pairs_and_then_lie_around_the_best():
    two = method_of(guidance=(1.0, 4.0, 16.0, 64.0), steps=(Share(1 / 6), Share(1)))
    assert two.trials(300)[:3] == [
        {"guidance": 1.0, "steps": 50},
        {"guidance": 1.0, "steps": 300},
        {"guidance": 4.0, "steps": 50},
    ]
    # Factors of 4 are half a step to the factor 2, one and a half to 8; steps go with the budget.
    found = two.trials_near({"guidance": 4.0, "steps": 50}, 300, 1200)
    assert [trial["guidance"] for trial in found] == [0.5, 2.0, 8.0, 32.0]
    assert {trial["steps"] for trial in found} == {200}
    # With a value of zero there are no factors; what is too large or small is tried once.
    bounded = method_of(eta=(0.0, 0.2, 0.4, 1.2), steps=(2, 3), largest={"eta": 1.2})
    near = [bounded.trials_near({"eta": eta, "steps": 2}, 300, 300) for eta in (1.2, 0.0)]
    assert [[t["eta"] for t in some] for some in near] == [[0.6, 1.0, 1.2], [0.0, 0.2, 0.6]]
    whole = replace(
        method_of(steps=(5, 10, 20, 40), weight=(1.0, 2.0)), per_step=lambda settings: 4
    )
    found = whole.trials_near({"steps": 10, "weight": 1.0}, 300, 300)
    assert [t["steps"] for t in found] == [4, 7, 14, 28]
    # What the budget has no room for is not tried, and nothing is tried twice.
    assert whole.trials(50) == [{"steps": T, "weight": w} for T in (5, 10, 12) for w in (1.0, 2.0)]


def test_a_best_setting_at_an_edge_is_followed_outwards():
    """One keyword at a time, as far as it may go; inside, and at an end, there is no edge."""
    some = method_of(guidance=(1.0, 4.0, 16.0, 64.0), steps=(Share(1 / 4), Share(1)))
    grid = some.trials(100)
    assert some.outward({"guidance": 16.0, "steps": 100}, grid, 100) == []
    assert some.outward({"guidance": 64.0, "steps": 25}, grid, 100) == [
        {"guidance": 260.0, "steps": 25},
        {"guidance": 64.0, "steps": 6},
    ]
    # A second time from there: the steps lie inside now.
    more = [*grid, {"guidance": 260.0, "steps": 25}, {"guidance": 64.0, "steps": 6}]
    found = some.outward({"guidance": 260.0, "steps": 25}, more, 100)
    assert [trial["guidance"] for trial in found] == [1000.0]
    ends = method_of(eta=(0.0, 0.2, 0.4, 1.0), strength=(0.1, 1.0), largest={"strength": 1.0})
    assert ends.outward({"eta": 0.0, "strength": 1.0}, ends.trials(9), 9) == []
    pairs = method_of(smoothness=(1.0, 2.0, 4.0, 8.0), **{"a": (0.0, 0.1)})
    tried = pairs.trials(9)
    assert pairs.outward({"smoothness": 2.0, "a": 0.1}, tried, 9) == [{"smoothness": 2.0, "a": 0.2}]


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"deep_image_prior"}))
def test_what_lies_beyond_an_edge_can_be_run(name):
    """From both ends of the grid, along its first keyword and its last, as far as `tune` goes."""
    method, nfe = METHODS[name], 300 if name in compared("faces64", 300) else 1000
    for end, keyword in product((0, -1), (0, -1)):
        tried = method.trials(nfe)
        best = tried[end]
        for _ in range(OUTWARD):
            if not (new := method.outward(best, tried, nfe)):
                break
            for trial in new:
                check_settings(name, method.settings("super_resolution", nfe) | trial)
            best, tried = new[keyword], [*tried, *new]


def test_equal_work_counts_products():
    """With c = 1, DPS keeps its budget; what has no products gets twice as many evaluations."""
    work = {name: equal_work(name, "super_resolution", 300, 1.0) for name in compared("p", 300)}
    assert work["dps"] == work["ours"] == 300
    assert work["ddrm"] == work["pnp_admm"] == 600
    assert work["mmps"] == 200  # two products an evaluation
    assert work["admm_tv"] == 300  # no network at all
    for name, nfe in work.items():
        evaluations, products = METHODS[name].work(METHODS[name].settings("motion_blur", nfe))
        assert evaluations + products <= 600
    assert equal_work("ddrm", "super_resolution", 300, 0.5) == 450


def test_the_table_s_methods_are_those_that_can_have_its_budget():
    few, many = compared("faces64", 300), compared("faces64", 1000)
    assert set(many) - set(few) == {"paper", "paper_tuned", "released"}
    assert {"ours", "dps", "psld"} <= set(few)
    assert "deep_image_prior" not in many
    assert "psld" not in compared("mnist", 300)
    assert "mnist" not in LATENT
    for pixels, latents in LATENT.items():  # the same images, operators and noise
        assert protocol_of(pixels) == protocol_of(latents)
        assert load_prior(latents).autoencoder is not None


def test_the_best_trial_is_that_of_the_highest_mean():
    ok = [[{"status": "ok", "psnr": psnr} for psnr in pair] for pair in (("9", "30"), ("20", "20"))]
    failed = [{"status": "failed", "psnr": ""}]
    assert best_trial([*ok, failed]) == 1
    assert best_trial([failed]) is None
    assert best_trial([[ok[0][1], *failed]]) is None  # not by its other images


CHANGED = {
    "image_sha256": lambda m, f: write_picture(-digits()[0][0], f / "0.png"),
    "weights_sha256": lambda m, f: m.setattr(experiments, "load_once", lambda *a: (MNIST, "x")),
    "protocol": lambda m, f: m.setattr(
        experiments, "protocol_of", lambda prior: replace(ONE_OPERATOR, name="another")
    ),
    "precision": lambda m, f: None,
}
MNIST = load_prior("mnist")


@pytest.mark.parametrize(
    ("key", "more"), [*((key, False) for key in CHANGED), ("image_sha256", True)]
)
def test_a_table_is_gone_on_with_from_the_same_inputs_only(
    key, more, folder, seen, tmp_path, monkeypatch, capsys
):
    """Names stay as they are; of the pictures of a data set, too."""
    path = tmp_path / "table.csv"
    command = ["run", "table1", "--prior", "mnist", "--images", str(folder), "--methods", "look"]
    command += ["--tasks", "gaussian_blur", "--nfe", "2", "--batch", "2", "--out", str(path)]
    assert main(command) == main(command) == 0
    before, calls = path.read_bytes(), len(seen)
    CHANGED[key](monkeypatch, folder)
    if more:
        write_picture(digits()[0][5], folder / "5.png")
    capsys.readouterr()
    assert main([*command, *["--precision", "bfloat16"] * (key == "precision")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"diffoc: out is {path}")
    assert f" {key} " in line
    assert "name another with --out" in line
    assert (path.read_bytes(), len(seen)) == (before, calls)


@pytest.mark.parametrize("name", ["table1_faces64", "tuning_faces64"])
def test_the_shipped_records_can_be_gone_on_with(name):
    path = data_folder() / "records" / f"{name}.csv"
    cells = list(read(path))
    experiments.check_recorded(cells, Computer(), path, pictures=False)
    try:
        experiments.check_recorded(cells, Computer(), path)
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("prior", "options", "shipped"),
    [
        ("faces64", ["--images", "PICTURES"], False),
        ("faces64", ["--set", "offset=0.1", "--images", "PICTURES"], False),
        ("mnist", ["--images", "PICTURES"], True),  # whose protocol has none
        ("mnist", ["--set", "offset=0.1", "--images", "PICTURES"], False),
    ],
)
def test_what_is_tuned_otherwise_lies_beside_its_records(
    prior, options, shipped, folder, tmp_path, monkeypatch, capsys
):
    if prior == "faces64":
        for file in folder.iterdir():
            write_picture(portrait("astronaut")[0], file)

    def level(prior, physics, y, x, generator, *, noise_std, level, offset=0.0):
        return torch.full_like(x, level + offset)

    values = {"level": tuple(i / 4 - 1 for i in range(8))}
    fake = Method("", level, lambda task, nfe: {}, lambda s: (1, 0), values)
    monkeypatch.setitem(METHODS, "fake", fake)
    ours, beside = tmp_path / "data" / "tuned.json", tmp_path / "out" / "a.tuned.json"
    ours.parent.mkdir()
    shutil.copy(data_folder() / "tuned.json", ours)
    before = ours.read_bytes()
    for module in ("commands.tables", "experiments.methods"):
        monkeypatch.setattr(f"diffoc.{module}.data_folder", lambda: ours.parent)
    command = ["tune", "fake", "--prior", prior, "--tasks", "gaussian_blur", *options]
    command = [str(folder) if word == "PICTURES" else word for word in command]
    assert main([*command, "--out", str(tmp_path / "out" / "a.csv")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(ours if shipped else beside)
    assert (ours.read_bytes() == before) == (not shipped)
    assert beside.exists() == (not shipped)
    found = methods.read_tuned(ours if shipped else beside)
    assert found[prior]["fake"]["gaussian_blur"].keys() == {"300"}


def test_tuning_writes_the_best_and_a_second_time_computes_nothing(tmp_path, monkeypatch, capsys):
    faces = torch.cat([portrait("astronaut"), portrait("grace_hopper")])
    pixels = ((faces + 1) * 127.5).byte().movedim(1, -1).numpy()
    monkeypatch.setattr(experiments, "_faces", lambda: np.resize(pixels, (512, 64, 64, 3)))
    tuned, calls = {}, []
    monkeypatch.setattr(methods, "read_tuned", lambda path=None: tuned)
    monkeypatch.setattr(methods, "write_tuned", lambda new, path=None: tuned.update(new))

    def level(prior, physics, y, x, generator, *, noise_std, level, steps):
        calls.append((level, steps))
        return torch.full_like(x, level - 0.5)

    values = {"level": (0.1, 0.4, 1.6, 6.4), "steps": (Share(0.5), Share(1))}
    fake = Method("", level, lambda task, nfe: {"steps": nfe}, no_products, values)
    monkeypatch.setitem(METHODS, "fake", fake)
    path = tmp_path / "tuning.csv"
    command = ["tune", "fake", "--tasks", "gaussian_blur", "--out", str(path)]
    assert main([*command, "--nfe", "400"]) == 2
    assert "not tuned for gaussian_blur with faces64 and nfe 300" in capsys.readouterr().err
    assert not calls
    for _ in range(2):
        assert main(command) == 0
        assert "fake, gaussian_blur, nfe 300: level 0.4, steps 150\n" in capsys.readouterr().out
    assert calls[:TRIALS] == [(v, s) for v in (0.1, 0.4, 1.6, 6.4) for s in (150, 300)]
    # At the edge of its steps the best is as good as any, and the first of these stays the best.
    assert calls[TRIALS:] == [(0.4, 75)]
    assert len(read(path)) == len(calls), "all trials are in the records"
    calls.clear()
    for _ in range(2):
        assert main([*command, "--nfe", "400"]) == 0
    near = (0.05, 0.2, 0.8, 3.2)
    assert calls == [(v, 200) for v in near]
    # All tuning faces are even, so that they are the first portrait.
    best = min(near, key=lambda v: (faces[0] - (v - 0.5)).square().mean())
    assert tuned["faces64"]["fake"]["gaussian_blur"] == {
        "300": {"level": 0.4, "steps": 150},
        "400": {"level": best, "steps": 200},
    }
    calls.clear()
    assert main([*command, "--nfe", "40"]) == 0
    assert calls == [*((v, s) for v in (0.1, 0.4, 1.6, 6.4) for s in (20, 40)), (0.4, 10)]


def test_tuning_goes_beyond_an_edge_so_often_and_says_what_is_left(tmp_path, monkeypatch, capsys):
    """What failed is tried again once, when it is asked for, and not with each step outwards."""
    (tmp_path / "black").mkdir()
    for i in range(2):
        write_picture(-torch.ones(1, 28, 28), tmp_path / "black" / f"{i}.png")
    tuned, calls = {}, []
    monkeypatch.setattr(methods, "read_tuned", lambda path=None: tuned)
    monkeypatch.setattr(methods, "write_tuned", lambda new, path=None: tuned.update(new))

    def bright(prior, physics, y, x, generator, *, noise_std, darkness):
        calls.append(darkness)
        if darkness == 2:
            raise RuntimeError("diverged")
        return torch.full_like(x, 1 / darkness)

    values = {"darkness": [2.0**i for i in range(8)]}
    fake = Method("", bright, lambda task, nfe: {}, lambda s: (1, 0), values)
    monkeypatch.setitem(METHODS, "fake", fake)
    command = ["tune", "fake", "--tasks", "gaussian_blur", "--out", str(tmp_path / "tuning.csv")]
    command += ["--prior", "mnist", "--images", str(tmp_path / "black")]
    for options in ([], ["--retry-failed"]):
        calls.clear()
        assert main([*command, *options]) == 1
        said = capsys.readouterr().out
        assert "fake, gaussian_blur, nfe 300: darkness 2000 (at the edge)\n" in said
        assert calls.count(2) == 1 + 2  # both at once, and each alone
        assert [v for v in calls if v > 128] == ([] if options else [260, 520, 1000, 2000])
    # A larger budget starts there on the protocol's own images, and goes no further.
    tuned["faces64"] = tuned["mnist"]
    black = np.zeros((512, 64, 64, 3), dtype=np.uint8)
    monkeypatch.setattr(experiments, "_faces", lambda: black)
    calls.clear()
    assert main([*command[:-4], "--nfe", "400"]) == 0
    assert calls == [710, 1400, 2800, 5700]
    assert "nfe 400: darkness 5700 (at the edge)\n" in capsys.readouterr().out


def test_wrong_priors_have_the_protocol_of_the_right_one():
    for name in ("faces64", "faces64+noise0.1", "untrained faces64"):
        assert protocol_of(name) is COLOUR_FACES


def test_nothing_that_is_cached_is_moved():
    """Two cells on other devices: what the first has is not changed by the second."""
    drawn = (ONE_OPERATOR, "motion_blur", (1, 8, 8), 0, None)
    here, there = (experiments._operator(*drawn, device) for device in ("cpu", "meta"))
    assert experiments._operator(*drawn, "cpu") is here
    assert here.filter.device.type == "cpu"
    assert there.filter.device.type == "meta"


ADDED = """
from deepinv.physics import Physics
def _negative(shape, generator):
    return Physics(A=lambda x: -x)
TASKS["negative"] = _negative
"""
SAMPLER = """
import torch
from diffoc.baselines import Method, method, no_products, one_a_step
@method
def negated(given, *, steps, sign=1.0):
    for _ in range(steps):
        given.prior(given.x, torch.tensor(0.5))
    return sign * given.y
METHOD = Method(
    "Negated", negated, one_a_step, no_products, {"sign": [-1.0, *(0.1 * i for i in range(1, 8))]}
)
"""


def test_an_operator_and_a_sampler_are_added_in_one_file_each(folder, tmp_path):
    """A copy of the package with two files changed: the command line has both, in a table."""
    root = data_folder().parent
    shutil.copytree(root / "diffoc", tmp_path / "diffoc")
    (tmp_path / "data").symlink_to(root / "data")
    with (tmp_path / "diffoc" / "problems" / "tasks.py").open("a") as file:
        file.write(ADDED)
    (tmp_path / "diffoc" / "baselines" / "negated.py").write_text(SAMPLER)
    command = ["run", "table1", "--prior", "mnist", "--images", str(folder), "--set", "sign=-1.0"]
    command += ["--tasks", "negative", "--methods", "negated", "--nfe", "3"]
    command += ["--out", str(tmp_path / "table.csv")]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "diffoc", *command],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    ((cell, rows),) = read(tmp_path / "table.csv").items()
    assert (cell.task, cell.method) == ("negative", "negated")
    assert [row["evaluations"] for row in rows] == ["3", "3", "3"]
    # What is left is the noise: 20 log10(2 / 0.05), less where it was clipped.
    assert all(32 < float(row["psnr"]) < 36 for row in rows)


def test_a_latent_method_says_that_it_has_no_prior(folder):
    overrides = {"guidance": 1.0}
    cells = cells_of(
        "mnist", ["gaussian_blur"], ["psld"], [2], [0], ["0.png"], 1, "float32", overrides
    )
    with pytest.raises(UnsupportedTask, match="psld needs a prior in a latent space"):
        Computer(folder)(cells[0])


@pytest.mark.parametrize("name", ["random_inpainting", "box_inpainting", "motion_blur"])
def test_a_table_with_an_operator_for_each_image_is_written_and_gone_on_with(
    folder, tmp_path, seen, monkeypatch, name
):
    """A second run reads what the first wrote, and computes nothing again."""
    each = replace(ONE_OPERATOR, operator_per_image=tuple(TASKS))
    monkeypatch.setattr("diffoc.experiments.cells.protocol_of", lambda prior: each)
    path = tmp_path / "table.csv"
    command = ["run", "table1", "--prior", "mnist", "--images", str(folder), "--methods", "look"]
    command += ["--tasks", name, "--nfe", "4", "--batch", "3", "--out", str(path)]
    assert main(command) == 0
    written = path.read_bytes()
    assert pd.read_csv(path)["operator"].nunique() == (
        1 if name in ("super_resolution", "gaussian_blur") else 3
    )
    assert main(command) == 0
    assert path.read_bytes() == written
    assert len(seen) == 1


def test_the_commands_make_check_and_print_a_table(folder, tmp_path, seen, capsys):
    path, kept = tmp_path / "table.csv", tmp_path / "kept"
    command = ["run", "table1", "--prior", "mnist", "--images", str(folder), "--methods", "look"]
    command += ["--tasks", "gaussian_blur", "super_resolution", "--nfe", "4", "--last", "2"]
    command += ["--batch", "1", "--out", str(path), "--keep", str(kept)]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "4 cells to compute, of 4: 4 images, 16 evaluations" in out
    assert "2 ok, 0 failed, 2 unsupported" in out
    pictures = sorted(kept.rglob("*.png"))
    assert [picture.name for picture in pictures] == ["1.png", "2.png"]
    assert pictures[0].parent.match("gaussian_blur/look-4-0-*")
    assert main(["check", str(path), "--images", str(folder)]) == 0
    assert "2 on the same machine" in capsys.readouterr().out
    assert main(["table", str(path)]) == 0
    assert " | - |" in capsys.readouterr().out
    psnr = next(iter(read(path).values()))[0]["psnr"]
    path.write_text(path.read_text().replace(psnr, "12.5"))
    assert main(["check", str(path), "--images", str(folder)]) == 1
    assert f"psnr is {psnr} now, 12.5 in the record" in capsys.readouterr().out


def test_intervals_are_student_s():
    # Tabulated: 4.303 standard errors for three values.
    mean, half = mean_and_interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.303 / 3**0.5, abs=1e-3))
    assert mean_and_interval([5.0])[0] == 5.0


def test_what_notebooks_say_of_their_tables():
    assert plus_minus(1.234, 0.056, "+") == "+1.23 ± 0.06"
    assert plus_minus(1.234, math.nan) == "1.23"
    assert markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    row = {"prior": "mnist", "image": "0", "protocol": ONE_OPERATOR.name, "precision": "float32"}
    other = row | {"prior": "mnist+noise0.1", "image": "16"}
    assert described(pd.DataFrame([row, other])) == (
        "Prior mnist; 2 images; one operator a task, for all images; networks in float32."
    )
    colour = row | {"prior": "faces64", "protocol": COLOUR_FACES.name}
    assert "an operator for each image" in described(pd.DataFrame([colour]))


def test_a_table_of_means():
    cell = cells_of(
        "faces64",
        ["gaussian_blur"],
        ["dps"],
        [1000],
        [0],
        ["a", "b"],
        2,
        "float32",
        {"guidance": 1},
    )[0]
    empty = dict.fromkeys(METRICS, "")

    def rows(task, status, *values):
        return [
            row | empty | {"task": task, "status": status, "psnr": value}
            for row, value in zip(cell.rows(), values, strict=True)
        ]

    def table(rows):
        return summarise(frame(rows))

    text = table(
        rows("one", "ok", "20", "22")
        + rows("one", "ok", "22", "24")  # the same images with another seed
        + rows("two", "unsupported", "", "")
        + rows("three", "failed", "", "")
    )
    assert text.splitlines()[2] == "| method | one | two | three |"
    # Images 21 and 23: 12.706 standard errors of 1.
    assert text.splitlines()[4] == "| DPS (NFE 1000) | 22.00 ± 12.71 | - | 2 failed |"
    two = rows("one", "ok", "20", "22")
    other = [row | {"settings": as_json({"guidance": 9})} for row in rows("one", "ok", "1", "1")]
    assert '{"guidance": 9} | 1.00' in table(two + other)
    wrong = [row | {"prior": "untrained faces64"} for row in rows("one", "ok", "1", "1")]
    assert "| DPS (NFE 1000) untrained faces64 | 1.00" in table(two + wrong)


def run_method(method, prior, name, **settings):
    generator = torch.Generator().manual_seed(0)
    shape = prior.image_shape
    truth = digits()[0][:1]
    physics = task(name, shape, generator)
    y = measure(physics, truth, generator)
    x = torch.randn(1, *shape, generator=generator)
    counted = CountedPrior(prior)
    x0 = method(counted, physics, y, x, generator, noise_std=NOISE_STD, **settings)
    return counted, physics, y, x0, truth


@pytest.mark.parametrize("name", ["stopped", "ours", "cold"])
def test_the_controller_keeps_its_budget_and_explains_the_measurement(name):
    method = METHODS[name]
    settings = method.settings("super_resolution", 300)
    if name != "cold":
        settings |= {"steps": 10}
    counted, physics, y, x0, truth = run_method(
        method.run, load_prior("mnist"), "super_resolution", **settings
    )
    assert counted.evaluations <= 300
    assert (physics.A(x0) - y).square().mean().sqrt() < 1.2 * 0.05
    # Better than interpolation, which knows nothing of digits.
    simple = torch.nn.functional.interpolate(y, scale_factor=4, mode="bicubic")
    assert image_metrics(x0, truth)["psnr"] > image_metrics(simple, truth)["psnr"]


def test_the_paper_s_settings_reach_the_controller():
    settings = TABLE_2["gaussian_blur"] | {"steps": 4, "iterations": 12, "rate": 0.1}
    prior = load_prior("mnist")
    counted, physics, y, x0, _ = run_method(paper, prior, "gaussian_blur", **settings)
    work = METHODS["paper"].work(settings)
    assert (counted.evaluations, counted.products) == work == (100, 96)
    settings["iterations"] = 0
    *_, before, _ = run_method(paper, prior, "gaussian_blur", **settings)
    assert (physics.A(x0) - y).norm() < 0.5 * (physics.A(before) - y).norm()


def test_table_2():
    settings = METHODS["paper"].settings
    for name in TASKS:
        found = settings(name, 2500)
        assert (found["steps"], found["rank"]) == (50, 1)
        assert found["iterations"] == (50 if name == "super_resolution" else 100)
        assert settings(name, 1000)["steps"] * settings(name, 1000)["iterations"] == 1000
    with pytest.raises(ValueError, match="nfe is 300"):
        settings("box_inpainting", 300)
    cell = cells_of("p", ["super_resolution"], ["paper"], [2500], [0], "ab", 2, "float32")
    assert work_of(cell[0]) == (2 * 50 * 101, 2 * 50 * 100)


def test_the_tables_of_results_and_readme_are_those_of_the_records():
    """Every method that has been run on all faces of a task, and no other number."""
    tool = runpy.run_path(str(ROOT / "tools" / "tables.py"))
    for path, text in tool["pages"]().items():
        assert text == path.read_text(encoding="utf-8"), "run tools/tables.py"
    readme = [row for row in (ROOT / "README.md").read_text().splitlines() if " / 0." in row]
    text = (ROOT / "docs" / "results.md").read_text()
    *readme, paper, released = readme
    assert len(readme) == 5
    assert set(readme) <= set(text.splitlines())
    # Once more by other means.
    rows = pd.read_csv(ROOT / "data" / "records" / "table1_faces64.csv")
    for name, line in (("paper", paper), ("released", released)):
        (same,) = table_of(text, "32 faces", f"{METHODS[name].label}, NFE 1000")
        assert line.split("|")[2:] == same.split("|")[2:]
        of = rows[(rows["method"] == name) & (rows["nfe"] == 1000)]
        most = statistics.mode(of["evaluations"])
        assert line.startswith(f"| {METHODS[name].label}, {most:.0f} evaluations |")
    rows = rows[rows["nfe"] == 300].drop_duplicates(["method", "task", "image"])
    of = rows.groupby(["method", "task"])[["psnr", "ssim"]].agg(["mean", "size"])
    shown = of[of["psnr", "size"] == 32]
    assert len(shown) == sum(line.count(" / 0.") for line in table_of(text, "method"))
    for (method, _), row in shown.iterrows():
        score = f"{row['psnr', 'mean']:.2f} / {row['ssim', 'mean']:.3f}"
        (line,) = table_of(text, "method", METHODS[method].label)
        assert score in line
    wide = rows.pivot(index=["task", "image"], columns="method", values="psnr")
    for name, some in wide.groupby(level="task"):
        test = scipy.stats.ttest_rel(some["ours"], some["pnp_admm"])
        low, high = test.confidence_interval(0.95)
        gap = f"{(low + high) / 2:+.2f} ± {(high - low) / 2:.2f}".replace("-", "−")
        (line,) = table_of(text, "OURS minus PnP-ADMM", "PSNR, dB")
        assert gap in line, name
    gaps = differences(tool["rows_with"](300), "ours", 300, "psnr")
    ahead = sum(d.corrected < 0.05 and d.mean > 0 for d in gaps)
    assert f"{ahead} of {len(gaps)} comparisons" in text


def test_a_table_has_only_what_is_complete_and_of_one_setting():
    """A face that failed, or that a method cannot do, and two settings for a task."""
    tool = runpy.run_path(str(ROOT / "tools" / "tables.py"))
    rows = tool["rows_of"](ROOT / "data" / "records" / "table1_faces64.csv")
    names = tool["rows_with"].__globals__
    names["rows_of"] = lambda path: rows
    dps = (rows["method"] == "dps") & (rows["nfe"] == 300) & (rows["task"] == "box_inpainting")
    again = rows[dps].assign(settings='{"guidance": 3.0}')
    rows.loc[rows[dps].index[0], ["status", "psnr", "ssim"]] = "failed", np.nan, np.nan
    assert tool["tables"]()["method"]["DPS"][tool["TASKS"].index("box_inpainting")] == "–"
    rows = pd.concat([rows, again])
    with pytest.raises(ValueError, match=r"dps has .* for box_inpainting: keep the rows of one"):
        tool["tables"]()


def table_of(text, head, first=None):
    """Returns the lines of a table below its head, or those with a first cell."""
    lines = text.split(f"| {head} |", 1)[1].splitlines()[2:]
    lines = lines[: next(i for i, line in enumerate(lines) if not line.startswith("|"))]
    return [line for line in lines if first is None or line.startswith(f"| {first} |")]


@pytest.mark.parametrize("protocol", [ONE_OPERATOR, COLOUR_FACES])
def test_the_page_of_the_protocol_says_what_the_value_has(protocol):
    text = (data_folder().parent / "docs" / "protocol.md").read_text()
    row = {
        "name": f"`{protocol.name}`",
        "held-out images": "32: every 16th of the test set, from 0",
        "tuning images": "8: every 64th, from 8",
        "operator": "each image its own" if protocol.operator_per_image else "one for all images",
        "noise": f"{protocol.noise_std:g}",
        "precision": protocol.precision or "any",
        "cost c of a product": str(protocol.product_cost or "not measured"),
    }
    if protocol is ONE_OPERATOR:
        row |= dict.fromkeys(("held-out images", "tuning images"), "those that a command names")
        assert protocol.held_out == protocol.tuning == ()
    else:
        assert protocol.held_out == tuple(str(i) for i in range(0, 512, 16))
        assert protocol.tuning == tuple(str(i) for i in range(8, 512, 64))
        assert not set(protocol.held_out) & set(protocol.tuning)
    for key, value in row.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {key} |")]
        assert f" {value} |" in line


def test_what_has_no_image_in_common_has_no_difference():
    with pytest.raises(ValueError, match="no image in common"):
        paired(frame([]), frame([]), "psnr")


def test_the_gallery_has_every_method_as_it_was_tuned():
    """Else `python tools/gallery.py` has to be run: notebook 09 shows it beside the table."""
    tool = runpy.run_path(str(ROOT / "tools" / "gallery.py"))
    assert tool["shown"](data_folder()) == tool["settings"]()
    images = load_weights(tool["NAME"])
    assert set(images) == set(tool["settings"]())
    assert {(image.dtype, image.shape) for image in images.values()} == {(torch.uint8, (3, 64, 64))}
