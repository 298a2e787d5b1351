"""What the tables are made of: same measurements for all, records that a second run repeats."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import scipy.stats
import torch

from diffoc.baselines.dps import dps
from diffoc.commands.main import main
from diffoc.data import digits, portrait
from diffoc.data.manifest import data_folder, manifest_entry
from diffoc.data.pictures import picture_names, write_picture
from diffoc.experiments import cells as experiments
from diffoc.experiments import methods
from diffoc.experiments.cells import Computer, best_value, cells_of, next_value, work_of
from diffoc.experiments.methods import METHODS, TABLE_2, Method, paper, settings_of
from diffoc.experiments.records import METRICS, as_json, read
from diffoc.experiments.summary import by_method, mean_and_interval, paired, summarise
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

    grid = ("level", (0.1, 0.2))
    monkeypatch.setitem(METHODS, "look", Method("Look", look, lambda task, nfe: {"steps": nfe}))
    monkeypatch.setitem(METHODS, "tuned", Method("T", look, lambda task, nfe: {}, grid))
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


def test_no_method_has_more_trials_than_the_others():
    assert {len(method.tuned[1]) for method in METHODS.values() if method.tuned} == {methods.TRIALS}
    with pytest.raises(ValueError, match="tuned has 7 values"):
        Method("", dps, lambda task, nfe: {}, ("guidance", tuple(range(7))))


def test_the_best_value_is_that_of_the_highest_mean():
    ok = [[{"status": "ok", "psnr": psnr} for psnr in pair] for pair in (("9", "30"), ("20", "20"))]
    failed = [{"status": "failed", "psnr": ""}]
    assert best_value({0.1: ok[0], 0.2: ok[1], 0.3: failed}) == 0.2
    assert best_value({0.3: failed}) is None


@pytest.mark.parametrize(
    ("psnr", "largest", "expected"),
    [
        ({1.0: 20, 3.0: 21, 9.0: 20}, math.inf, None),  # the best is inside
        ({1.0: 20, 3.0: 21, 9.0: 22}, math.inf, 27.0),
        ({1.0: 22, 3.0: 21, 9.0: 20}, math.inf, 0.33),
        ({1.0: 20, 3.0: 21, 9.0: 21.09}, math.inf, None),  # flat
        ({1.0: 20, 3.0: 21, 9.0: 22}, 10.0, None),
        ({0.0: 22, 3.0: 21}, math.inf, None),  # nothing is below zero
        ({0.0: 21, 3.0: 22}, math.inf, None),  # and nothing a factor from it
        ({10: 20, 20: 21, 30: 22}, math.inf, 45),  # steps are whole numbers
        ({2.0**i: i for i in range(7)}, math.inf, 130.0),  # two digits
        ({2.0**i: i for i in range(8)}, math.inf, None),  # twice four
        ({1.0: 20, 3.0: None, 9.0: 22}, math.inf, 27.0),
        ({1.0: 20, 3.0: 21, 9.0: None}, math.inf, None),
        ({1.0: None, 3.0: None}, math.inf, None),
    ],
)
def test_a_grid_goes_on_beyond_an_edge_that_is_better(psnr, largest, expected):
    trials = {
        value: [{"status": "failed" if mean is None else "ok", "psnr": str(mean)}]
        for value, mean in psnr.items()
    }
    found = next_value(trials, largest)
    assert found == expected
    assert type(found) is type(expected)


def test_tuning_writes_the_best_and_a_second_time_computes_nothing(tmp_path, monkeypatch, capsys):
    faces = torch.cat([portrait("astronaut", grey=True), portrait("grace_hopper", grey=True)])[:, 0]
    monkeypatch.setattr(experiments, "_faces", lambda: ((faces + 1) * 127.5).byte().numpy())
    monkeypatch.setattr(experiments, "tuning_faces", lambda: ["0", "1"])
    tuned, calls = {}, []
    monkeypatch.setattr(methods, "read_tuned", lambda path=None: tuned)
    monkeypatch.setattr(methods, "write_tuned", lambda new, path=None: tuned.update(new))

    def level(prior, physics, y, x, generator, *, noise_std, level, steps):
        calls.append(level)
        return torch.full_like(x, level)

    fake = Method("", level, lambda task, nfe: {"steps": nfe}, ("level", (-1.0, -0.1, 0.9)))
    monkeypatch.setitem(METHODS, "fake", fake)
    command = ["tune", "fake", "--tasks", "gaussian_blur", "--nfe", "7"]
    for _ in range(2):
        assert main([*command, "--out", str(tmp_path / "tuning.csv")]) == 0
        assert "fake, gaussian_blur, nfe 7: level -0.1\n" in capsys.readouterr().out
        assert tuned == {"faces64": {"fake": {"gaussian_blur": {"7": {"level": -0.1}}}}}
    assert calls == [-1.0, -0.1, 0.9]
    calls.clear()
    beyond = Method("", level, lambda task, nfe: {"steps": nfe}, ("level", (-0.9, -0.6)))
    monkeypatch.setitem(METHODS, "beyond", beyond)
    command[1] = "beyond"
    for _ in range(2):
        assert main([*command, "--out", str(tmp_path / "tuning.csv")]) == 0
        best = tuned["faces64"]["beyond"]["gaussian_blur"]["7"]["level"]
        assert f"beyond, gaussian_blur, nfe 7: level {best:g}" in capsys.readouterr().out
    # By two thirds each time, until a grey is no better by a tenth of a decibel than the last.
    psnr = [-10 * ((faces - grey) / 2).square().mean((1, 2)).log10().mean() for grey in calls]
    assert calls[:4] == [-0.9, -0.6, -0.4, -0.27]
    assert psnr[-1] - psnr[-2] < 0.1
    assert all(after - before > 0.1 for before, after in pairwise(psnr[:-1]))
    assert best == calls[int(torch.stack(psnr).argmax())]


def test_the_commands_make_check_and_print_a_table(folder, tmp_path, seen, capsys):
    path, kept = tmp_path / "table.csv", tmp_path / "kept"
    command = ["run", "table1", "--prior", "mnist", "--images", str(folder), "--methods", "look"]
    command += ["--tasks", "gaussian_blur", "super_resolution", "--nfe", "4", "--last", "2"]
    command += ["--batch", "1", "--out", str(path), "--keep", str(kept)]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "4 cells to compute, of 4: 4 images, 16 evaluations" in out
    assert "2 ok, 0 failed, 2 unsupported" in out
    names = sorted(p.relative_to(kept).as_posix() for p in kept.rglob("*.png"))
    assert names == ["gaussian_blur/look-4-0/1.png", "gaussian_blur/look-4-0/2.png"]
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

    text = summarise(
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
    assert '{"guidance": 9} | 1.00' in summarise(two + other)
    wrong = [row | {"prior": "untrained faces64"} for row in rows("one", "ok", "1", "1")]
    assert "| DPS (NFE 1000) untrained faces64 | 1.00" in summarise(two + wrong)


def run_method(method, prior, name, **settings):
    generator = torch.Generator().manual_seed(0)
    shape = prior.image_shape
    truth = portrait("astronaut", grey=True) if shape[-1] == 64 else digits()[0][:1]
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
        method.run, load_prior("faces64"), "super_resolution", **settings
    )
    assert counted.evaluations <= 300
    assert (physics.A(x0) - y).square().mean().sqrt() < 1.2 * 0.05
    # Better than interpolation, which knows nothing of faces.
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


def test_the_readme_s_table_is_that_of_the_records():
    """Every method that has been run on all faces of a task, and no other number."""
    root = data_folder().parent
    table = read(root / "data" / "records" / "table1_faces64.csv").values()
    rows = [row for some in table for row in some if row["nfe"] == "300"]
    faces = Counter((row["method"], row["task"]) for row in rows)
    rows = [row for row in rows if faces[row["method"], row["task"]] == 32]
    psnr, ssim = by_method(rows, "psnr"), by_method(rows, "ssim")
    text = (root / "README.md").read_text()
    for label, found in psnr.items():
        cells = [
            f"{found[name][0]:.2f} / {ssim[label][name][0]:.3f}" if name in found else "–"
            for name in experiments.TABLES["table1"]
        ]
        assert " | ".join([f"| {label}", *cells]) + " |" in text


def test_no_face_is_in_both_sets():
    assert len(experiments.held_out_faces()) == 32
    assert len(experiments.tuning_faces()) == 8
    assert not set(experiments.held_out_faces()) & set(experiments.tuning_faces())


def test_paired_differences_are_those_of_a_paired_t_test():
    generator = np.random.default_rng(0)
    common = generator.normal(25, 5, 9)
    values = {"a": common + generator.normal(1, 0.3, 9), "b": common + generator.normal(0, 0.3, 9)}
    rows = {
        name: [{"status": "ok", "image": str(i), "psnr": repr(float(x))} for i, x in enumerate(v)]
        for name, v in values.items()
    }
    mean, half = paired(rows["a"], rows["b"][::-1], "psnr")
    expected = scipy.stats.ttest_rel(values["a"], values["b"])
    interval = expected.confidence_interval(0.95)
    assert mean == pytest.approx((values["a"] - values["b"]).mean())
    assert (mean - half, mean + half) == pytest.approx((interval.low, interval.high))
    # Failures and images of one side only do not count; two seeds of an image are one number.
    rows["a"].append({"status": "failed", "image": "9", "psnr": ""})
    rows["b"].append({"status": "ok", "image": "9", "psnr": "1"})
    rows["b"].append(rows["b"][0])
    assert paired(rows["a"], rows["b"], "psnr") == pytest.approx((mean, half))
    with pytest.raises(ValueError, match="no image in common"):
        paired(rows["a"], [], "psnr")
