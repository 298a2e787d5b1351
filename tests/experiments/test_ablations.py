"""The grids of the ablations: what they vary, and that it reaches the controller."""

import json
from dataclasses import replace

import pytest
import torch

from diffoc.baselines.deep_image_prior import deep_image_prior
from diffoc.baselines.paper import TABLE_2, guidance_regularization, paper
from diffoc.commands.main import main
from diffoc.data import digits
from diffoc.data.pictures import write_picture
from diffoc.experiments import cells as experiments
from diffoc.experiments.ablations import ABLATIONS, BUDGETS, HORIZONS, TASKS, ablation_cells
from diffoc.experiments.cells import work_of
from diffoc.experiments.methods import METHODS, read_tuned
from diffoc.experiments.records import read
from diffoc.priors.counting import CountedPrior
from diffoc.priors.pretrained import load_prior
from diffoc.problem import Problem
from diffoc.problems.tasks import NOISE_STD, measure, task
from diffoc.process import drift_and_diffusion
from diffoc.riccati import SingularControlHessianError

PAPER = TABLE_2["super_resolution"] | {"steps": 3, "iterations": 4}


@pytest.fixture
def folder(tmp_path):
    """Two digits as PNG files."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, image in enumerate(digits()[0][:2]):
        write_picture(image, folder / f"{i}.png")
    return folder


def cells(table, **options):
    return ablation_cells(table, "faces64", ["a", "b", "c"], 2, "float32", **options)


@pytest.mark.parametrize("table", ABLATIONS)
def test_every_cell_is_there_once_and_can_be_planned(table):
    found = cells(table)
    assert len(found) == len(set(found))
    assert {cell.task for cell in found} == set(TASKS)
    assert {cell.images for cell in found} == {("a", "b"), ("c",)}
    assert all(work_of(cell)[0] >= 0 for cell in found)
    assert all(json.loads(cell.settings) == cell.keywords for cell in found)
    assert len(cells(table, seeds=(0, 1))) == 2 * len(found)
    some = cells(table, methods=[found[0].method], tasks=TASKS[:1])
    assert {(cell.method, cell.task) for cell in some} == {(found[0].method, TASKS[0])}


def test_few_steps_takes_what_was_tuned_for_each_budget():
    tuned = read_tuned()["faces64"]
    for cell in cells("few_steps"):
        if cell.method == "dps":
            own = tuned["dps"][cell.task][str(cell.nfe)]
            assert cell.keywords == own
        elif cell.method == "ours":
            each = 2 if cell.keywords["iterations"] == 0 else 4
            assert cell.nfe == cell.keywords["budget"] >= each * cell.keywords["steps"]
        elif cell.method == "quick":
            assert work_of(cell) == (2 * cell.keywords["steps"] * len(cell.images), 0)
            assert 2 * cell.keywords["steps"] <= cell.nfe
        else:
            assert cell.keywords["steps"] * (1 + cell.keywords["iterations"]) <= cell.nfe
            expected = tuned["cold"][cell.task]["300"]["control_cost"]
            assert cell.keywords["control_cost"] == expected
    by_method = {
        method: {cell.nfe for cell in cells("few_steps", methods=[method])}
        for method in ("dps", "ours", "quick")
    }
    assert by_method["dps"] == {*HORIZONS, *BUDGETS}
    assert by_method["quick"] == {*(2 * T for T in HORIZONS), *BUDGETS}
    assert by_method["ours"] == {*BUDGETS, 400, 800}
    steps = {cell.keywords["steps"] for cell in cells("few_steps", methods=["cold"])}
    assert steps == set(HORIZONS)


def test_steps_that_a_budget_has_no_room_for_are_fewer(monkeypatch):
    tuned = {"ours": {"steps": 60}, "dps": {"guidance": 3.0, "steps": 300}, "cold": {}, "quick": {}}
    known = {"faces64": {key: {TASKS[0]: {"300": some}} for key, some in tuned.items()}}
    monkeypatch.setattr("diffoc.experiments.ablations.read_tuned", lambda: known)
    for cell in cells("few_steps", tasks=TASKS[:1]):
        if cell.method == "dps":
            assert cell.keywords == {"steps": cell.keywords["steps"], "guidance": 3.0}
            assert cell.keywords["steps"] <= cell.nfe
        elif cell.method == "ours" and cell.nfe in (20, 50, 100, 200):
            assert cell.keywords["steps"] == min(60, cell.nfe // 4)


def test_rank_and_robustness_vary_what_they_say():
    settings = [cell.keywords for cell in cells("rank", tasks=TASKS[:1])]
    assert {(s["rank"], s["projected"]) for s in settings} >= {(16, True), (16, False), (0, False)}
    assert {"lemma_4_2", 0, 1e-6, 1} <= {s["regularization"] for s in settings}
    assert {s["weight_scale"] for s in settings if s["regularization"] == 0} == {0, 1e-6}
    priors = {cell.prior for cell in cells("robustness")}
    assert priors == {
        *("faces64", "faces64+noise0.1", "faces64+noise0.2"),
        *("untrained faces64", "identity faces64"),
    }
    ours = [cell for cell in cells("robustness", methods=["ours"]) if "identity" not in cell.prior]
    assert sum(cell.keywords["smoothness"] == 0 for cell in ours) == 2 * len(ours) / 3
    assert sum(cell.keywords.get("from_noise", False) for cell in ours) == len(ours) / 3
    usual, few = cells("robustness"), cells("robustness", nfe=60)
    large = [cell for cell in usual if cell.method in ("paper", "released")]
    assert len(large) == len(ours) * 2 / 3
    assert {cell.nfe for cell in large} == {1000}
    assert {cell.nfe for cell in usual if cell not in large} == {300}
    assert {cell.nfe for cell in few} == {60}
    assert cells("robustness", nfe=300) == usual
    for cell in few:
        if cell.method == "dps":
            assert cell.keywords["steps"] == 60
            assert "guidance" in cell.keywords
        elif cell.method == "cold":
            assert cell.keywords["steps"] * (1 + cell.keywords["iterations"]) <= 60
    bare = {cell.prior for cell in cells("robustness", trained=False)}
    assert bare == {f"{kind} faces64" for kind in ("untrained", "random", "identity")}


def test_parts_takes_away_one_at_a_time():
    tuned = read_tuned()["faces64"]["ours"]
    for name in TASKS:
        usual, *others = (cell.keywords for cell in cells("parts", tasks=[name])[::2])
        assert usual == {"budget": 300} | tuned[name]["300"]
        changed = [{k for k in s if s[k] != usual.get(k)} for s in others]
        assert changed[:3] == [{"iterations"}, {"smoothness"}, {"in_units"}]
        assert changed[3:6] == [{"coloured"}, {"dense"}, {"stopped"}]
        assert changed[6:12] == [{"weight"}] + [{"weighted", "weight"}] * 5
        assert [s["weight"] for s in others[7:12]] == sorted(s["weight"] for s in others[7:12])
        assert changed[12:] == [
            {"iterations", part} for part in ("smoothness", "coloured", "dense")
        ]


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        ("rank", {"methods": ["dps"]}, "methods is"),
        ("rank", {"trained": False}, "needs trained weights"),
        ("rank", {"tasks": ["cloud"]}, "'cloud'"),
        ("rank", {"nfe": 60}, "nfe is 60"),
        ("robustness", {"nfe": 3}, "nfe is 3"),
    ],
)
def test_what_is_no_grid_is_refused(table, options, message):
    with pytest.raises(ValueError, match=message):
        cells(table, **options)
    with pytest.raises(ValueError, match="batch is 0"):
        ablation_cells("rank", "faces64", ["a"], 0, "float32")


def run_paper(**changes):
    g = torch.Generator().manual_seed(0)
    physics = task("super_resolution", (1, 28, 28), g)
    y = measure(physics, digits()[0][:2], g)
    x = torch.randn(2, 1, 28, 28, generator=g)
    counted = CountedPrior(load_prior("mnist"))
    x0 = paper(counted, physics, y, x, g, noise_std=NOISE_STD, **PAPER | changes)
    return x0, counted


def test_the_constant_of_lemma_4_2_reaches_the_controller_step_by_step():
    prior = load_prior("mnist")
    times = torch.linspace(1, 0, 4, dtype=torch.float64)
    expected = guidance_regularization(prior.schedule, times)
    _, g2 = drift_and_diffusion(prior.schedule, times[:-1])
    torch.testing.assert_close(g2 / 2 / 3, 1 / expected)  # a gain is g^2 dt / 2 of the gradient
    one, _ = run_paper(regularization="lemma_4_2")
    other, _ = run_paper()
    assert not torch.allclose(one, other, atol=1e-3)
    with pytest.raises(ValueError, match="regularization is 'lemma'"):
        run_paper(regularization="lemma")


def test_adam_undoes_the_constant_of_the_first_order_and_only_of_it():
    first = [run_paper(rank=0, regularization=a)[0] for a in (0.0, 1.0)]
    assert (first[0] - first[1]).abs().max() < 1e-3
    second = [run_paper(rank=4, regularization=a)[0] for a in (1e-3, 100.0)]
    assert (second[0] - second[1]).abs().max() > 1e-2


def test_without_control_cost_and_regularization_the_failure_is_told():
    with pytest.raises(SingularControlHessianError, match="raise regularization"):
        run_paper(regularization=0, weight_scale=0.0)


def test_rank_and_projections_reach_the_controller():
    exact, counted = run_paper(rank=4)
    assert (counted.evaluations, counted.products) == (2 * 3 * 9, 2 * 3 * 5 * 4)
    projected, counted = run_paper(rank=4, projected=True)
    assert (counted.evaluations, counted.products) == (2 * 3 * 9, 2 * 3 * 5 * 4)
    assert not torch.allclose(exact, projected, atol=1e-3)
    assert not torch.allclose(exact, run_paper(rank=1)[0], atol=1e-3)


def test_a_grid_by_command_is_resumed_and_checked(folder, tmp_path, monkeypatch, capsys):
    def small(prior, tasks):
        settings = {"steps": 2, "guidance": 1.0}
        for used in (prior, f"{prior}+noise0.1", f"identity {prior}"):
            yield used, tasks[0], "dps", 2, settings
        singular = PAPER | {"regularization": 0, "weight_scale": 0.0}
        yield prior, tasks[0], "paper", 2, singular

    monkeypatch.setitem(ABLATIONS, "rank", small)
    path = tmp_path / "rank.csv"
    command = ["run", "rank", "--prior", "mnist", "--images", str(folder), "--out", str(path)]
    assert main(command) == 1
    assert "3 ok, 1 failed" in capsys.readouterr().out
    found = read(path)
    of_each = ["mnist", "mnist+noise0.1", "identity mnist", "mnist", "mnist"]  # what fails, alone
    assert [cell.prior for cell in found] == of_each
    assert "SingularControlHessianError('Quu is not" in list(found.values())[-1][0]["error"]
    before = path.read_bytes()
    assert main(command) == 1
    assert path.read_bytes() == before
    assert main(["check", str(path), "--images", str(folder), "--rows", "4"]) == 0
    assert main([*command, "--nfe", "7"]) == 2
    assert "nfe is [7]" in capsys.readouterr().err


def test_without_weights_a_grid_takes_random_ones(folder, tmp_path, monkeypatch):
    def nothing(prior, physics, y, x, generator, *, noise_std, steps, guidance):
        return torch.zeros_like(x)

    monkeypatch.setitem(METHODS, "dps", replace(METHODS["dps"], run=nothing))
    path = tmp_path / "bare.csv"
    command = ["run", "robustness", "--prior", "mnist", "--random-weights", "--images", str(folder)]
    command += ["--methods", "dps", "--tasks", TASKS[0], "--last", "1", "--out", str(path)]
    assert main(command) == 0
    assert [cell.prior for cell in read(path)] == ["untrained mnist", "random mnist"]


def test_eight_faces_of_the_tables():
    assert len(experiments.few_faces()) == 8
    assert set(experiments.few_faces()) <= set(experiments.COLOUR_FACES.held_out)


def test_a_deep_image_prior_ends_at_the_noise():
    g = torch.Generator().manual_seed(0)
    truth = digits()[0][:1]
    physics = task("super_resolution", (1, 28, 28), g)
    y = measure(physics, truth, g)
    settings, prior = {"iterations": 400, "channels": 16}, load_prior("mnist")
    x0 = deep_image_prior(prior, physics, y, truth, g, noise_std=NOISE_STD, **settings)
    assert x0.shape == truth.shape
    residual = (physics.A(x0) - y).square().mean().sqrt()
    assert 0.8 * NOISE_STD < residual < Problem(physics, y, NOISE_STD).noise_level
    assert (x0 - truth).square().mean() < 0.5 * truth.square().mean()
    for name, value in (("iterations", 0), ("channels", 0), ("rate", 0.0)):
        with pytest.raises(ValueError, match=f"{name} is 0"):
            deep_image_prior(prior, physics, y, truth, g, noise_std=0.05, **{name: value})


def test_each_image_has_a_deep_image_prior_of_its_own():
    g = torch.Generator().manual_seed(0)
    truth = digits()[0][:2]
    physics = task("random_inpainting", (1, 28, 28), g)
    y = measure(physics, truth, g)
    options = {"noise_std": NOISE_STD, "iterations": 3, "channels": 8}
    found = [
        deep_image_prior(
            load_prior("mnist"),
            physics,
            torch.cat([y[:1], other]),
            truth,
            torch.Generator().manual_seed(1),
            **options,
        )
        for other in (y[1:], 9 * y[1:])
    ]
    assert torch.equal(found[0][0], found[1][0])
    assert METHODS["deep_image_prior"].settings("super_resolution", 300) == {}
