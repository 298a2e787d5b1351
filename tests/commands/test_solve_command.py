"""The command line: from pictures and measurements of every kind to files that agree."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffoc.commands import main as command_line
from diffoc.commands.solve import (
    COLD,
    FROM_PICTURES,
    OURS,
    TWIN,
    Settings,
    from_measurement,
    from_picture,
    unfamiliar,
)
from diffoc.data import images as data
from diffoc.data.pictures import read_picture
from diffoc.greedy import greedy_controls
from diffoc.priors import wrap
from diffoc.priors.latent import LatentPrior
from diffoc.priors.pretrained import load_prior
from diffoc.problems.metrics import image_metrics
from diffoc.problems.tasks import NOISE_STD, TASKS, measured, task
from diffoc.process import ReverseProcess

SHAPE = (1, 28, 28)


@pytest.fixture
def picture(tmp_path):
    pixels = ((data.digits()[0][6, 0] + 1) * 127.5).round().byte().numpy()
    Image.fromarray(pixels).resize((70, 56)).convert("RGB").save(tmp_path / "digit.jpg")
    return tmp_path / "digit.jpg"


def command(*arguments):
    fast = ["--prior", "mnist", "--steps", "3", "--iterations", "2"]
    return command_line.main(["solve", *map(str, arguments), *fast])


@pytest.mark.parametrize("name", TASKS)
def test_every_task_from_a_picture_and_again_from_its_measurement(name, picture, tmp_path, capsys):
    out, again = tmp_path / "out", tmp_path / "again"
    assert command(picture, "--task", name, "--out", out) == 0
    printed = capsys.readouterr().out
    assert "note: cut from 70x56 to 56x56" in printed
    assert "grey made from colour" not in printed  # the file has three equal channels
    clipped = np.load(out / "measurement.npz")["y"]
    share = 100 * (abs(clipped) > 1).mean()
    assert (f"note: {TWIN}\n" in printed) == (name == "phase_retrieval")
    told = f"note: measurement.png clips {share:.1f} % of the values" in printed
    assert told == (name != "phase_retrieval" and share > 0)
    report = json.loads((out / "report.json").read_text())
    assert report["evaluations"] >= 3
    assert report["vector_jacobian_products"] <= 6
    # What the report says is what lies beside it, up to 8 bits.
    truth, _ = read_picture(picture, SHAPE)
    image, _ = read_picture(out / "reconstruction.png", SHAPE)
    found = image_metrics(image, truth)
    assert found["psnr"].item() == pytest.approx(report["metrics"]["psnr"], abs=0.1)
    with Image.open(out / "comparison.png") as comparison:
        assert comparison.width > 600
    measurement = out / "measurement.npz"
    assert command("--measurement", measurement, "--task", name, "--out", again) == 0
    assert json.loads((again / "report.json").read_text())["metrics"] is None
    same = (again / "reconstruction.png").read_bytes() == (out / "reconstruction.png").read_bytes()
    assert same


def test_a_square_of_the_picture_is_cut_by_argument(picture, tmp_path, capsys):
    cropped = ("--crop", "5,3,40", "--task", "gaussian_blur", "--out", tmp_path)
    assert command(picture, *cropped) == 0
    assert "note: cut from 70x56 to 40x40 at 5,3" in capsys.readouterr().out
    assert command(picture, "--crop", "40,0,40", "--task", "gaussian_blur") == 2
    assert "crop is 40,0,40, expected X,Y,SIDE" in capsys.readouterr().err
    measurement = tmp_path / "measurement.npz"
    assert command("--measurement", measurement, *cropped) == 2
    assert "crop is given" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command(picture, "--crop", "40,0", "--task", "gaussian_blur")
    assert "crop is '40,0', expected X,Y,SIDE" in capsys.readouterr().err


def test_pictures_of_other_things_get_a_note():
    prior, settings = load_prior("faces64"), Settings("super_resolution", "faces64")
    face = data.portrait("astronaut")
    noise = torch.rand(face.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert unfamiliar(prior, settings, face) == []
    (note,) = unfamiliar(prior, settings, noise)
    assert "the prior knows tight crops of faces" in note
    assert unfamiliar(prior, Settings("super_resolution", "mnist"), noise) == []


@pytest.mark.parametrize("name", FROM_PICTURES)
def test_measurements_may_be_pictures(name, picture, tmp_path):
    settings = Settings(name, "mnist")
    case = from_picture(picture, SHAPE, settings)
    assert command(picture, "--task", name, "--out", tmp_path) == 0
    # Another seed has another mask: that of the picture counts.
    other = Settings(name, "mnist", seed=1)
    found = from_measurement(tmp_path / "measurement.png", SHAPE, other)
    # Eight bits, and the noise that leaves [-1, 1] is cut.
    assert (found.y - case.y.clamp(-1, 1)).abs().max() < 1 / 127
    x = torch.rand(1, *SHAPE)
    torch.testing.assert_close(found.physics.A(x), case.physics.A(x))
    assert torch.equal(measured(found.physics, found.y), measured(case.physics, case.y))


def test_the_paper_s_recipe_can_be_asked_for(picture, tmp_path):
    paper = ["--recipe", "paper", "--rank", "1", "--out", tmp_path]
    assert command(picture, "--task", "phase_retrieval", *paper) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["evaluations"] == 3 + 2 * 6  # recomputed for the backward sweep
    assert report["vector_jacobian_products"] == 12  # rank 1: two a step and iteration


def test_unknown_recipes_and_budgets_are_refused(picture, capsys):
    assert command(picture, "--task", "phase_retrieval", "--recipe", "sgd") == 2
    assert "recipe is 'sgd', expected one of ours" in capsys.readouterr().err
    assert command(picture, "--task", "phase_retrieval", "--budget", "11") == 2
    assert "budget is 11, expected at least 4 times the 3 steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--recipe paper --noise-std 1e-6", "Quu is not positive definite at step"),
        ("--recipe released --steps 1", "diffoc: steps is 1, expected"),
    ],
)
def test_numbers_that_a_recipe_cannot_compute_with_are_one_line(
    words, said, picture, tmp_path, capsys
):
    arguments = [str(picture), "--prior", "mnist", "--task", "super_resolution", *words.split()]
    assert command_line.main(["solve", *arguments, "--out", str(tmp_path)]) == 2
    bar, _, line = capsys.readouterr().err.rpartition("diffoc: ")
    assert said in f"diffoc: {line}"
    assert len(line.splitlines()) == 1
    assert "Traceback" not in bar


def test_the_cheapest_of_several_starts_is_written(picture, tmp_path):
    assert command(picture, "--task", "phase_retrieval", "--starts", "3", "--out", tmp_path) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert TWIN in report["notes"]
    assert len(report["costs_of_starts"]) == 3
    assert report["cost"] == min(report["costs_of_starts"])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda prior: LatentPrior(prior, None), "prior is mnist, one of latents"),
        (lambda prior: wrap(lambda x, i: 0 * x, [0.9, 0.5], (1, 8, 8)), "needs sides of 11"),
    ],
)
def test_priors_of_other_things_are_refused_before_the_work(
    make, said, picture, tmp_path, monkeypatch, capsys
):
    prior = make(load_prior("mnist"))
    monkeypatch.setattr("diffoc.priors.pretrained.load_prior", lambda name: prior)
    assert command(picture, "--task", "super_resolution", "--out", tmp_path) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


def test_unfit_measurements_are_refused(picture, tmp_path, capsys):
    assert command("--measurement", tmp_path / "no.npz", "--task", "motion_blur") == 2
    assert "missing" in capsys.readouterr().err
    assert command("--measurement", picture, "--task", "motion_blur") == 2
    assert "not an .npz file" in capsys.readouterr().err
    assert command("--measurement", picture, "--task", "super_resolution") == 2
    assert "expected 7 x 7" in capsys.readouterr().err
    path = tmp_path / "y.npz"
    np.savez(path, y=np.zeros((1, 1, 7, 7)), task="super_resolution", seed=0)
    assert command("--measurement", path, "--task", "gaussian_blur") == 2
    assert "of the task 'super_resolution'" in capsys.readouterr().err
    np.savez(path, y=np.zeros((1, 1, 8, 8)), task="super_resolution", seed=0)
    assert command("--measurement", path, "--task", "super_resolution") == 2
    assert "has shape (1, 1, 8, 8)" in capsys.readouterr().err
    path.write_bytes(b"nothing")
    assert command("--measurement", path, "--task", "super_resolution") == 2
    assert "damaged" in capsys.readouterr().err
    assert command(picture, "--task", "sharpening") == 2
    assert "task is 'sharpening', expected one of super_resolution" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command("--task", "super_resolution")


@pytest.mark.parametrize("recipe", [COLD, OURS])
def test_the_controller_starts_from_the_most_probable_noise(recipe, picture, tmp_path):
    """Without iterations the image is that of zeros, of linear tasks under the greedy guess."""
    name = "gaussian_blur" if recipe.guess else "nonlinear_blur"
    arguments = ["--prior", "mnist", "--iterations", "0", "--out", str(tmp_path), "--task", name]
    arguments += ["--recipe", recipe.name]
    assert command_line.main(["solve", str(picture), *arguments]) == 0

    # Steps of OURS are dense near the image.
    times = torch.linspace(1, 0, recipe.steps + 1, dtype=torch.float64)
    times = times**1.5 if recipe is OURS else times
    process, start = ReverseProcess(load_prior("mnist"), times), torch.zeros(1, *SHAPE)
    guess = None
    if recipe.guess:
        y = torch.from_numpy(np.load(tmp_path / "measurement.npz")["y"])
        physics = task(name, SHAPE, torch.Generator().manual_seed(0))
        guess = greedy_controls(process, physics, y, start, NOISE_STD, OURS.smoothness)
        assert guess.abs().amax() > 0.1
    expected = process.rollout(start, guess)[-1].detach().clamp(-1, 1)
    image, _ = read_picture(tmp_path / "reconstruction.png", SHAPE)
    torch.testing.assert_close(image, expected, rtol=0, atol=1 / 127)
