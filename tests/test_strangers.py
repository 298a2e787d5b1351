"""What a stranger may pass by mistake: one line that names the argument, or a right answer."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from azula.noise import VPSchedule
from deepinv.physics import Denoising, GaussianNoise, Inpainting
from torch import nn

import diffoc
from diffoc.costs import ClassLikelihood, ControlCost, GaussianLikelihood
from diffoc.ilqr import ilqr
from diffoc.priors import wrap, wrap_edm
from diffoc.problems.operators import average_pool
from diffoc.problems.tasks import gaussian_blur, measure, super_resolution, task
from diffoc.process import ReverseProcess, draw_noise
from diffoc.rules import LBFGS, LineSearch
from diffoc.solve import solve
from diffoc.system import ControlProblem

NAN, BAR = float("nan"), torch.linspace(0.999, 0.01, 50)
PHYSICS, Y = super_resolution(2), torch.linspace(-1, 1, 32).reshape(2, 1, 4, 4)
X = torch.zeros(2, 1, 8, 8)


POOLED = nn.BatchNorm2d(1, track_running_stats=False)  # by the batch's own statistics, always


class Network(nn.Conv2d):
    def forward(self, x, timestep):
        return 0.1 * super().forward(x)


def good_prior():
    torch.manual_seed(0)
    return wrap(Network(1, 1, 3, padding=1), BAR, (1, 8, 8))


def recipe(**changes):
    return diffoc.Recipe(**{"name": "tried", "steps": 2, "iterations": 2} | changes)


def reconstruct(**changes):
    of_problem = {"physics": PHYSICS, "y": Y, "noise_std": 0.05, "task": None}
    problem = diffoc.Problem(**{k: changes.pop(k, v) for k, v in of_problem.items()})
    options = {"prior": good_prior(), "recipe": recipe()} | changes
    return diffoc.reconstruct(problem, options.pop("prior"), options.pop("recipe"), **options)


def untold(y):
    """A network that only a function knows of says nothing of its precision before it is called."""
    network = Network(1, 1, 3, padding=1)
    return reconstruct(prior=wrap(lambda x, i: network(x, i), BAR, (1, 8, 8)), y=y)


def predicted(network):
    return reconstruct(prior=wrap(network, BAR, (1, 8, 8)))


def denoised(network):
    return reconstruct(prior=wrap_edm(network, (1, 8, 8)))


def inpainted(**changes):
    options = {"physics": Inpainting((1, 8, 8), mask=HOLES), "y": torch.zeros(2, 1, 8, 8)}
    return reconstruct(**options | changes)


def solved(**changes):
    usual = {"process": ReverseProcess(good_prior(), 2), "x": X, "iterations": 2}
    return solve(**usual | {"cost": GaussianLikelihood(PHYSICS.A, Y, 0.05)} | changes)


def planned(**changes):
    usual = {
        "dynamics": lambda i, x, u: x + u,
        "running_cost": ControlCost(1.0),
        "terminal_cost": lambda x: (x**2).sum(1),
        "horizon": 2,
    }
    problem = ControlProblem(**{key: changes.pop(key, value) for key, value in usual.items()})
    return ilqr(**{"problem": problem, "x": torch.ones(2, 3)} | changes)


def process(**changes):
    usual = {"denoiser": good_prior(), "steps": 2, "method": "ddim", "noise": None}
    return ReverseProcess(**usual | changes)


def rollout(**changes):
    return process().rollout(**{"x": X} | changes)


def noise(**changes):
    usual = {"steps": 2, "shape": X.shape, "generator": torch.Generator()}
    return draw_noise(**usual | changes)


def likelihood(**changes):
    return GaussianLikelihood(**{"operator": PHYSICS.A, "y": Y, "noise_std": 0.05} | changes)(X)


def labelled(**changes):
    usual = {"classifier": lambda x: x.flatten(1), "labels": torch.tensor([1])}
    return ClassLikelihood(**usual | changes)(X)


def weighed(weights):
    return ControlCost(weights)(0, X, X)


def measured(**changes):
    return measure(**{"physics": PHYSICS, "x": X, "generator": torch.Generator()} | changes)


def answer(**changes):
    options = {"prior": good_prior(), "recipe": recipe(), "noise_std": 0.05} | changes
    y, physics = options.pop("y", Y), options.pop("physics", PHYSICS)
    return diffoc.Reconstructor(**options)(y, physics)


def wrapped(**changes):
    return wrap(
        **{"network": Network(1, 1, 3), "alphas_cumprod": BAR, "shape": (1, 8, 8)} | changes
    )


def edm(**changes):
    return wrap_edm(**{"network": Network(1, 1, 3), "shape": (1, 8, 8)} | changes)


def made_in_inference_mode(make):
    with torch.inference_mode():
        return make()


def blocked(words):
    raise RuntimeError(words)


class Backwards(VPSchedule):
    def __call__(self, t):
        return super().__call__(1 - t)


HOLES = torch.ones(2, 1, 8, 8)
HOLES[0, :, :4] = 0
LOST = HOLES * torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1)
NETWORKS = [
    Network,
    lambda x, t: None,
    lambda x, t: (x,),
    lambda x, t: {"sample": x},
    lambda x, t: x.detach().numpy(),
    lambda x, t: x.detach(),
    lambda x, t: x.int(),
    lambda x, t: x.cfloat(),
    lambda x, t: x.flatten(1),
    lambda x, t: x[:, :0],
    lambda x, t: blocked("cannot\nwork"),
    None,
    3,
    "x",
]

NUMBERS = [
    Fraction(-1, 2),
    torch.tensor(0.1, device="meta"),
    torch.tensor(True),
    -1,
    NAN,
    float("inf"),
    "0.05",
    None,
    1j,
    True,
    torch.tensor([0.1, 0.2]),
    torch.ones(2, 1, 4, 4),
]
COUNTS = [0, -1, 1.5, "2", True]
THINGS = [3, "x", torch.ones(2), object()]

NUMBERS_OF_A_LIST = ["x", None, -1, NAN, 1j, [1, "a"], X.cfloat(), torch.ones(2).to("meta")]
STOPS = [3, torch.ones(7).bool(), np.array([True]), torch.ones(2), torch.ones(2).bool().to("meta")]
WRONG_COSTS = [
    lambda costs: None, lambda costs: 0.0, lambda costs: costs.sum(), lambda costs: costs[:1],
    lambda costs: costs[:, None], lambda costs: costs.double(), lambda costs: costs.int(),
]  # fmt: skip
WRONG_STATES = [
    lambda x: None, lambda x: x.numpy(), lambda x: x.double(), lambda x: x.flatten(),
    lambda x: x[:, :2], lambda x: x.sum(),
]  # fmt: skip

WRONG = {
    (reconstruct, "y"): [
        Y.numpy(), Y.int(), Y > 0, Y.cfloat(), Y.double(), Y.half(), Y.bfloat16(), NAN * Y, Y[:0],
        Y[0], Y[None], Y[:, 0, 0, 0], Y[0, 0, 0, 0], torch.zeros(2, 1, 5, 5),
        torch.zeros(2, 3, 4, 4), Y.to("meta"), [1.0], None, Y.to_sparse(), 1e30 * Y,
        torch.nested.nested_tensor([Y[0], Y[1]], layout=torch.jagged), Y.to(torch.float8_e4m3fn),
    ],
    (reconstruct, "noise_std"): [0, 1e-30, *NUMBERS],
    (reconstruct, "physics"): [
        None, *THINGS, Inpainting, lambda x: x.detach().numpy(), lambda x: PHYSICS.A(x).detach(),
        lambda x: None, lambda x: (PHYSICS.A(x),), lambda x: PHYSICS.A(x).double(),
        lambda x: {}["a"], lambda x: PHYSICS.A(x.mul_(2)),
        Inpainting((1, 8, 8), mask=torch.ones(5, 5)), lambda x: blocked("cannot\nwork"),
        lambda x: PHYSICS.A(x) - PHYSICS.A(x).mean(0, keepdim=True),
        lambda x: PHYSICS.A(x) / (1 + x.detach().std()), lambda x: PHYSICS.A(x.flip(0)),
        lambda x: PHYSICS.A(x * x.mean(0, keepdim=True)), nn.Sequential(nn.AvgPool2d(2), POOLED),
        lambda x: PHYSICS.A(x) + 0.05 * torch.randn(Y.shape), lambda x: PHYSICS.A(x).round(),
        lambda x: 0 * PHYSICS.A(x), lambda x: torch.zeros(Y.shape, requires_grad=True),
        lambda x: PHYSICS.A(x).log(), lambda x: torch.fft.fft2(PHYSICS.A(x)),
        gaussian_blur(8).to("meta"), made_in_inference_mode(lambda: gaussian_blur(8)),
    ],
    (inpainted, "physics"): [Inpainting((1, 8, 8), mask=m) for m in (0 * HOLES, LOST, HOLES / 0)],
    (reconstruct, "task"): ["super_resolutoin", "", "SR", 3, ["super_resolution"]],
    (untold, "y"): [Y.double()],
    (predicted, "network"): NETWORKS,
    (denoised, "network"): NETWORKS,
    (reconstruct, "prior"): [
        None, *THINGS, nn.Conv2d(1, 1, 3), good_prior().to("meta"),
        made_in_inference_mode(good_prior),
    ],
    (reconstruct, "recipe"): [None, *THINGS],
    (reconstruct, "x"): [X[:1], X.double(), NAN * X, X.int(), X.numpy(), "x", X[:, :, :7]],
    (reconstruct, "starts"): COUNTS,
    (reconstruct, "generator"): [3, np.random.default_rng(0)],
    (reconstruct, "callback"): THINGS,
    (recipe, "steps"): [*COUNTS, 10**9],
    **{(recipe, name): [None, *THINGS] for name in ("rule", "process", "cost", "weights")},
    **{(recipe, name): [None, *THINGS] for name in ("by_task", "untuned")},
    (recipe, "draw"): THINGS,
    (recipe, "name"): [None, 3],
    (recipe, "iterations"): COUNTS[1:],
    (recipe, "budget"): [7, *COUNTS],
    (recipe, "rank"): COUNTS[1:],
    (recipe, "weight"): NUMBERS,
    (recipe, "spare"): [1, 1.5, *NUMBERS],
    (recipe, "derivatives"): [None, *THINGS],
    (solved, "x"): [X[:0], NAN * X, X.int(), None, "x"],
    (solved, "cost"): [None, *THINGS, lambda x: x.sum()],
    (solved, "controls"): [torch.zeros(n, *X.shape) * k for n, k in ((3, 1.0), (2, NAN))],
    (solved, "budget"): COUNTS,
    (solved, "stop"): [*THINGS, *(lambda x, s=s: s for s in STOPS)],
    (solved, "process"): [*THINGS, nn.Linear(2, 2), process(denoiser=good_prior().to("meta"))],
    (planned, "x"): [None, "x", torch.ones(3), torch.ones(2, 3).int(), NAN * torch.ones(2, 3)],
    (planned, "problem"): [None, *THINGS],
    (planned, "horizon"): [*COUNTS, None],
    (planned, "controls"): ["x", [1.0], np.zeros((2, 2, 3)), torch.zeros(2, 2, 3).double()],
    (planned, "dynamics"): [lambda i, x, u, f=f: f(x + u) for f in WRONG_STATES],
    (planned, "running_cost"): [lambda i, x, u, f=f: f(u.square().sum(1)) for f in WRONG_COSTS],
    (planned, "terminal_cost"): [lambda x, f=f: f(x.square().sum(1)) for f in WRONG_COSTS],
    (planned, "regularization"): [*NUMBERS_OF_A_LIST, torch.ones(3)],
    (planned, "budget"): [*COUNTS, 10**30],
    (planned, "derivatives"): [None, *THINGS],
    (planned, "iterations"): COUNTS[1:],
    (planned, "rule"): THINGS,
    (planned, "callback"): THINGS,
    (process, "denoiser"): [None, *THINGS, nn.Linear(2, 2)],
    (process, "steps"): [*COUNTS, *NUMBERS_OF_A_LIST, 10**9, [1, "a"], [0.5, 1], torch.zeros(2, 2)],
    (process, "method"): [None, 3, ["ddim"]],
    (process, "noise"): [3, "x", [1.0], X.int()],
    (rollout, "start"): ["0", 0.0, -1, 3, True, None],
    (rollout, "controls"): [[X, X], "x", X, X.numpy()],
    (noise, "steps"): [*COUNTS, None],
    (noise, "generator"): [None, 3, np.random.default_rng(0)],
    (likelihood, "operator"): [None, "x", lambda x: None, lambda x: (x,), lambda x: x.numpy()],
    (labelled, "classifier"): [None, "x", lambda x: x, lambda x: x.flatten()],
    (labelled, "labels"): [None, [1], np.array([1]), torch.tensor([1], dtype=torch.int32)],
    (weighed, "weights"): [*NUMBERS_OF_A_LIST, torch.ones(1, 1)],
    **{(rule, "contraction"): [0, 1, *NUMBERS] for rule in (LineSearch, LBFGS)},
    **{(rule, "trials"): [*COUNTS, 10**30] for rule in (LineSearch, LBFGS)},
    (LBFGS, "units"): [3, (1, 0), *(n for n in NUMBERS_OF_A_LIST if n is not None)],
    (average_pool, "factor"): COUNTS,
    (super_resolution, "factor"): [*COUNTS, None, 10**9],
    (measured, "physics"): [gaussian_blur(8).to("meta")],
    (answer, "physics"): [None, *THINGS, PHYSICS.A],
    (answer, "noise_std"): [0, *(n for n in NUMBERS if n is not None)],
    (answer, "y"): [Y.double(), None, NAN * Y, Y[:0]],
    (answer, "seed"): ["a", -1, 1.5],
    (wrapped, "network"): [None, 3, "x"],
    (wrapped, "alphas_cumprod"): [
        "x", None, BAR.flip(0), [0.9, NAN], BAR[None], torch.arange(5).flip(0),
    ],
    (wrapped, "shape"): [(8, 8), (1, 8.5, 8), 8, "abc", (0, 8, 8), None],
    (wrapped, "schedule"): ["x", 3, VPSchedule, Backwards(), lambda t: (1 - t, t)],
    (edm, "schedule"): ["x", 3, VPSchedule, Backwards(), lambda t: (1 - t, t)],
    (edm, "shape"): [(8, 8), (1, 8.5, 8), 8, None],
    (wrapped, "prediction_type"): ["x", None, 3],
}  # fmt: skip

ALSO = {
    "budget": "budget|steps",
    "x": "x is|x has|x are|images",
    "physics": "physics|y has",
    "terminal_cost": "terminal cost",
    "running_cost": "running cost",
}
"""What an error may say in place of the argument's name."""


@pytest.mark.parametrize(
    ("door", "name", "value"),
    [
        pytest.param(door, name, value, id=f"{door.__name__} {name} {i}")
        for (door, name), values in WRONG.items()
        for i, value in enumerate(values)
    ],
)
def test_a_mistake_is_one_line_that_names_the_argument(door, name, value):
    with pytest.raises((ValueError, TypeError), match=ALSO.get(name, name)) as caught:
        door(**{name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "y",
    [
        Y.clone().requires_grad_(),
        nn.Parameter(Y),
        Y.transpose(2, 3).contiguous().transpose(2, 3),
        Y.contiguous(memory_format=torch.channels_last),
        made_in_inference_mode(Y.clone),
    ],
)
def test_what_is_the_same_measurement_gives_the_same_image(y):
    expected, found = reconstruct().x0, reconstruct(y=y).x0
    assert not found.requires_grad
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(reconstruct(noise_std=torch.tensor(0.05)).x0, expected)


def test_a_network_that_changes_what_it_gets_changes_nothing_else():
    network = Network(1, 1, 3, padding=1)
    prior, x, t = wrap(network, BAR, (1, 8, 8)), 1 + X, torch.tensor(0.5)
    spoiling = wrap(lambda x, i: x.copy_(network(x, i)), BAR, (1, 8, 8))
    torch.testing.assert_close(spoiling(x, t).mean, prior(x, t).mean)


def test_noise_of_several_deviations_is_none_of_the_largest():
    several = Denoising(GaussianNoise(torch.tensor([0.1, 0.5])))
    with pytest.raises(ValueError, match="noise_std is None, and physics has noise of several"):
        answer(noise_std=None, physics=several, y=torch.zeros(2, 1, 8, 8))


def test_a_physics_of_another_size_is_refused_by_the_model_of_deepinv():
    with pytest.raises(ValueError, match="y has shape"):
        answer(physics=Denoising())


def test_a_start_that_was_made_in_inference_mode_is_a_start():
    start = made_in_inference_mode(X.clone)
    assert torch.equal(solved(x=start).x0, solved().x0)
    assert torch.equal(reconstruct(x=start).x0, reconstruct(x=X).x0)


@pytest.mark.parametrize("door", [reconstruct, solved])
def test_where_nothing_has_derivatives_is_said(door):
    with torch.inference_mode(), pytest.raises(ValueError, match=r"torch\.inference_mode"):
        door()


@pytest.mark.parametrize(
    "door",
    [
        reconstruct,
        solved,
        planned,
        process,
        measured,
        wrapped,
        edm,
        lambda: diffoc.load_prior("mnist"),
        lambda: task("random_inpainting", (1, 8, 8), torch.Generator()),
    ],
)
def test_another_default_device_is_refused(door):
    """Numbers are drawn on the CPU: there is no GPU here, and "meta" has no values to draw."""
    with torch.device("meta"), pytest.raises(ValueError, match="torch's default device is meta"):
        door()


def test_a_default_precision_changes_nothing():
    prior, expected = good_prior(), (reconstruct().x0, solved().x0)
    torch.set_default_dtype(torch.float64)
    try:
        found = reconstruct(prior=prior).x0, solved(process=ReverseProcess(prior, 2)).x0
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected)


def test_what_stop_does_to_the_images_changes_nothing():
    def spoil(x):
        x.mul_(0)
        return torch.zeros(len(x), dtype=torch.bool)

    assert torch.equal(solved(stop=spoil).x0, solved().x0)
