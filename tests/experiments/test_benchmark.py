"""What the benchmark says: counts, memory and FLOP against ones made by hand."""

import json

import pytest
import torch
from azula.denoise import Denoiser, DiracPosterior
from azula.noise import VPSchedule
from torch import nn

from diffoc.commands.main import main
from diffoc.costs import ControlCost, GaussianLikelihood
from diffoc.experiments.benchmark import (
    LiveTensors,
    bare_iteration,
    flop,
    measure,
    peak_memory,
    project,
)
from diffoc.ilqr import ilqr
from diffoc.lowrank import MatrixFree
from diffoc.priors.pretrained import untrained_adm
from diffoc.problems.operators import average_pool
from diffoc.process import ReverseProcess
from diffoc.rules import Adam, FullStep, LineSearch
from diffoc.system import ControlProblem


class Scale(torch.autograd.Function):
    """x / 2, which keeps nothing for its derivative; counts itself."""

    evaluations = products = 0

    @staticmethod
    def forward(ctx, x):
        Scale.evaluations += 1
        return x / 2

    @staticmethod
    def backward(ctx, cotangent):
        Scale.products += 1
        return cotangent / 2


class Light(Denoiser):
    def __init__(self):
        super().__init__()
        self.schedule = VPSchedule()

    def forward(self, x_t, t, **kwargs):
        return DiracPosterior(Scale.apply(x_t))


@pytest.fixture(autouse=True)
def counts():
    Scale.evaluations = Scale.products = 0


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_the_bare_iteration_is_the_cost_model_s(keep, rank):
    x = torch.ones(2, 1, 4, 4)
    bare_iteration(ReverseProcess(Light(), 5), x, rank, keep)
    assert Scale.evaluations == 5 * (1 if keep else 2)
    assert Scale.products == 5 * (1 + rank)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_an_iteration_of_the_controller_takes_no_more(keep, rank):
    """T (F + (1 + k) B) or T (2 F + (1 + k) B), as the denoiser itself counts."""
    process = ReverseProcess(Light(), 5)
    x = torch.ones(1, 1, 4, 4)
    likelihood = GaussianLikelihood(average_pool(2), torch.zeros(1, 1, 2, 2), 0.5)
    found = []
    for iterations in (2, 5):
        Scale.evaluations = Scale.products = 0
        ilqr(
            ControlProblem(process.step, ControlCost(1.0), likelihood, 5),
            x,
            derivatives=MatrixFree(keep_activations=keep),
            rank=rank,
            regularization=0.0,
            rule=FullStep(),
            iterations=iterations,
            gradient_tolerance=0.0,
        )
        found.append((Scale.evaluations, Scale.products))
    (few, few_products), (many, many_products) = found
    assert many - few == 3 * 5 * (1 if keep else 2)
    assert many_products - few_products == 3 * 5 * (1 + rank)

    row = measure(Light(), x, 5, rank, keep, repeats=1)
    assert row["evaluations"] == 5 * (1 if keep else 2)
    assert row["products"] == 5 * (1 + rank)


def test_live_tensors_are_counted():
    with LiveTensors() as tensors:
        x = torch.zeros(1000, requires_grad=True)
        y = x.exp()  # keeps its result
        assert tensors.live == 8000
        z = y.view(10, 100)[3:].cos()  # keeps a view, and makes 700 numbers
        assert tensors.live == 8000 + 2800
        del y
        assert tensors.live == 8000 + 2800
        del z
        assert tensors.live == 4000
        x.detach().add_(1)
        assert tensors.live == 4000
    assert tensors.peak == 8000 + 2800


def most_numbers(side, steps, rank, rule, keep):
    """What the controller needs at most, in units of n = side^2."""
    process = ReverseProcess(Light(), steps)
    n = side * side
    x = torch.ones(1, 1, side, side)
    likelihood = GaussianLikelihood(average_pool(2), torch.zeros(1, 1, side // 2, side // 2), 0.5)

    def run():
        ilqr(
            ControlProblem(process.step, ControlCost(1.0), likelihood, steps),
            x,
            derivatives=MatrixFree(keep_activations=keep),
            rank=rank,
            regularization=0.0,
            rule=rule,
            iterations=3,
            gradient_tolerance=0.0,
        )

    return peak_memory(run, x.device)[0] / 4 / n


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize(
    # Beside the trajectory, its states and controls, which are the result: a feedforward gain, k
    # columns of the factor, and a second trajectory. Adam has two means and the best controls.
    ("rule", "own"),
    [(LineSearch(trials=2), 0), (Adam(0.1), 3)],
)
def test_memory_beyond_the_network(keep, rank, rule, own):
    """At most (k + 3) T n beyond the trajectory, for n and T small and large."""
    few, many = (most_numbers(32, steps, rank, rule, keep) for steps in (4, 9))
    assert (many - few) / 5 <= 2 + rank + 3 + own + 0.05
    # What does not grow with T: the directions of the range finder, and products with them.
    assert few <= 4 * (2 + rank + 3 + own) + 3 * (rank + 5) + 8
    larger = most_numbers(64, 4, rank, rule, keep)
    assert larger == pytest.approx(few, rel=0.05)  # in units of n


class Convolution(Denoiser):
    def __init__(self):
        super().__init__()
        self.schedule = VPSchedule()
        self.backbone = nn.Conv2d(3, 3, 5, padding=2).requires_grad_(False)

    def forward(self, x_t, t, **kwargs):
        return DiracPosterior(self.backbone(x_t))


def test_flop_are_those_counted_by_hand():
    """3 x 5 x 5 multiplications and additions for each of 3 x 8 x 6 numbers, both ways."""
    expected = 2 * (3 * 5 * 5) * (3 * 8 * 6)
    assert flop(Convolution().to("meta"), (1, 3, 8, 6)) == (expected, expected)
    assert flop(Convolution().to("meta"), (4, 3, 8, 6)) == (4 * expected, 4 * expected)


def test_the_paper_s_network_has_the_flop_that_are_projected():
    """The 3 x 3 convolutions at full resolution alone: 128 to 128 channels, 256 x 256."""
    with torch.device("meta"):
        network = untrained_adm("ffhq256")
    forward, product = flop(network, (1, 3, 256, 256))
    one = 2 * 9 * 128 * 128 * 256 * 256
    assert 4 * one < forward < 100 * one
    assert 0.9 < product / forward < 1.1
    with pytest.raises(ValueError, match="name is 'mnist'"):
        untrained_adm("mnist")


def test_the_projection_is_arithmetic():
    kept, short, recomputed, _ = project(400e9, 300e9, [1], 50)
    assert (kept["nfe"], short["nfe"], recomputed["nfe"]) == (2500, 1000, 2500)
    assert kept["seconds"] == pytest.approx(2500 * (400e9 + 2 * 300e9) / 50e12)  # 50 s
    assert kept["gpu_hours"] == pytest.approx(50 * 5000 / 3600)
    assert recomputed["seconds"] == pytest.approx(70)


def test_the_command_prints_and_writes_what_it_measured(tmp_path, capsys):
    out = tmp_path / "new" / "benchmark.json"
    options = ["--steps", "3", "--ranks", "0", "2", "--repeats", "1", "--batch", "2"]
    assert main(["benchmark", "mnist", *options, "--teraflops", "10", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "PROJECTED" in printed
    assert "10 TFLOP/s" in printed
    found = json.loads(out.read_text())
    rows = found["priors"]["mnist"]
    settings = [(row["shape"][0], row["rank"], row["keep_activations"]) for row in rows]
    assert settings == [
        (1, 0, True), (1, 2, True), (1, 0, False), (1, 2, False), (2, 0, True), (2, 2, True)
    ]  # fmt: skip
    for row in rows:
        assert row["evaluations"] == (3 if row["keep_activations"] else 6)
        assert row["products"] == 3 * (1 + row["rank"])
        assert row["ratio"] == row["seconds"] / row["bare_seconds"]
        assert row["bytes"] > row["bare_bytes"] > 0
    # Three steps' activations, of one image and of two, against one step's.
    assert rows[0]["bare_bytes"] > 2 * rows[2]["bare_bytes"]
    assert rows[4]["bare_bytes"] == pytest.approx(2 * rows[0]["bare_bytes"], rel=0.05)
    assert len(found["projected"]["table_1"]) == 2 * 2 * 2
    assert found["projected"]["teraflops"] == 10


def test_random_weights_of_what_has_only_trained_ones_are_refused(capsys):
    assert main(["benchmark", "mnist", "--random-weights"]) == 2
    assert "name is 'mnist'" in capsys.readouterr().err
