"""Every door, with one argument wrong: an error that names the argument, or a finite answer.

A door is a public function or class that a user calls with values of their own. It is called here
with good arguments, one of which hypothesis spoils: tensors get numbers that are none, other
shapes, types and devices, numbers leave their ranges, names become others.
"""

import importlib
import inspect
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from azula.noise import VPSchedule
from deepinv.physics import Inpainting
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import diffoc
from diffoc.baselines.released import ResidualNorm
from diffoc.costs import ClassLikelihood, ControlCost, GaussianLikelihood
from diffoc.data import faces, mnist, portrait
from diffoc.data.manifest import checked_bytes, load_weights
from diffoc.data.pictures import picture_size, read_picture, read_transparency, values_of
from diffoc.experiments.cells import cells_of
from diffoc.experiments.methods import METHODS
from diffoc.experiments.records import shard_path
from diffoc.greedy import greedy_controls
from diffoc.ilqr import ilqr
from diffoc.priors.gaussian import GaussianMixturePrior, GaussianPrior
from diffoc.priors.mixture import mixture_from_loadings
from diffoc.problems.kernels import motion_kernel
from diffoc.problems.metrics import frechet_distance, image_metrics, moments
from diffoc.problems.operators import LinearMeasurement, as_matrix, average_pool, random_mask
from diffoc.problems.tasks import (
    box_inpainting,
    gaussian_blur,
    measure,
    motion_blur,
    nonlinear_blur,
    phase_retrieval,
    random_inpainting,
    super_resolution,
    task,
)
from diffoc.process import ReverseProcess, draw_noise
from diffoc.rules import LBFGS, Adam, LineSearch
from diffoc.system import ControlProblem

SHAPE = (1, 4, 4)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generator():
    return torch.Generator().manual_seed(0)


MIXTURE = mixture_from_loadings(
    torch.zeros(2).double(), normal(2, 16), normal(2, 16, 2, seed=1), torch.ones(2).double()
)
PRIOR = GaussianMixturePrior(MIXTURE, VPSchedule(), SHAPE)
FLAT = GaussianPrior(normal(3), torch.eye(3).double(), VPSchedule())
X = normal(2, *SHAPE)
POOL = average_pool(2)
LIKELIHOOD = GaussianLikelihood(POOL, normal(2, 1, 2, 2), 0.3)
PROCESS = ReverseProcess(PRIOR, 2)
HALVED = super_resolution(2)
PROBLEM = ControlProblem(PROCESS.step, ControlCost(1.0), LIKELIHOOD, 2)


def solve(x, controls, control_cost, rank, iterations, regularization, budget):
    return diffoc.solve(
        PROCESS,
        LIKELIHOOD,
        x,
        controls,
        control_cost=control_cost,
        rank=rank,
        iterations=iterations,
        regularization=regularization,
        budget=budget,
    )


def ancestral(x, noise):
    return diffoc.solve(
        ReverseProcess(PRIOR, 2, "ddpm", noise=noise), LIKELIHOOD, x, rank=0, iterations=1
    ).x0


@dataclass(frozen=True)
class Door:
    """A function, good arguments, other words for them in messages, and what it is a door of.

    What is `positive` has no good value from zero down: no whole one, and below zero no tensor.
    """

    function: Callable
    arguments: dict
    aliases: dict = field(default_factory=dict)
    of: object = None
    positive: tuple = ()


DOORS = [
    Door(
        solve,
        {
            "x": X,
            "controls": 0.1 * normal(2, 2, *SHAPE, seed=3),
            "control_cost": 1.0,
            "rank": 1,
            "iterations": 1,
            "regularization": 0.1,
            "budget": 4,
        },
        {"control_cost": "weights", "rank": "rank", "iterations": "iterations"},
        diffoc.solve,
    ),
    Door(ancestral, {"x": X, "noise": draw_noise(2, X.shape, generator())}, {}, ReverseProcess),
    Door(
        lambda x, regularization, iterations: ilqr(
            PROBLEM, x, regularization=regularization, iterations=iterations
        ),
        {"x": X, "regularization": torch.ones(2), "iterations": 1},
        {"x": "x_t|y"},
        ilqr,
    ),
    Door(
        lambda name_or_path: diffoc.load_prior(name_or_path),
        {"name_or_path": "mnist"},
        {"name_or_path": "pipeline"},
    ),
    Door(lambda name: diffoc.classifier(name), {"name": "judge"}, of=diffoc.classifier),
    Door(
        lambda steps, method, mode: ReverseProcess(PRIOR, steps, method, mode).rollout(X),
        {"steps": 2, "method": "ddim", "mode": "input"},
        positive=("steps",),
    ),
    Door(
        lambda steps: ReverseProcess(PRIOR, steps).rollout(X),
        {"steps": torch.tensor([1.0, 0.5, 0.0])},
    ),
    Door(PROCESS.rollout, {"x": X, "controls": normal(2, *X.shape), "start": 0}),
    Door(
        lambda y, noise_std: GaussianLikelihood(POOL, y, noise_std)(X),
        {"y": LIKELIHOOD.y, "noise_std": 0.1},
        of=GaussianLikelihood,
    ),
    Door(lambda y: ResidualNorm(POOL, y)(X), {"y": LIKELIHOOD.y}, of=ResidualNorm),
    Door(
        lambda labels: ClassLikelihood(lambda x: x.flatten(1), labels)(X),
        {"labels": torch.tensor([3, 5])},
        of=ClassLikelihood,
        positive=("labels",),
    ),
    Door(lambda weights: ControlCost(weights)(1, X, X), {"weights": 0.5}, of=ControlCost),
    Door(
        lambda weights: ControlCost(weights)(1, X, X),
        {"weights": torch.ones(2)},
        positive=("weights",),
    ),
    Door(
        lambda factor: average_pool(factor)(X),
        {"factor": 2},
        {"factor": "x"},
        average_pool,
        ("factor",),
    ),
    Door(
        lambda shape, dropped: random_mask(shape, dropped, generator()),
        {"shape": (4, 4), "dropped": 0.5},
        of=random_mask,
    ),
    Door(
        lambda shape: as_matrix(POOL, shape, torch.float64),
        {"shape": SHAPE},
        {"shape": "x"},
        as_matrix,
    ),
    Door(
        lambda matrix, y, noise_std: FLAT.posterior(LinearMeasurement(matrix, y, noise_std)).mean,
        {"matrix": normal(2, 3), "y": normal(2, 2), "noise_std": 0.1},
        of=LinearMeasurement,
    ),
    Door(
        lambda mean, covariance: GaussianPrior(mean, covariance, VPSchedule())(normal(2, 3), 0.5),
        {"mean": normal(3), "covariance": torch.eye(3).double()},
        of=GaussianPrior,
    ),
    Door(
        lambda shape: GaussianMixturePrior(MIXTURE, VPSchedule(), shape),
        {"shape": SHAPE},
        of=GaussianMixturePrior,
    ),
    Door(
        lambda **given: mixture_from_loadings(**given).means,
        {
            "log_weights": normal(2),
            "means": normal(2, 5),
            "loadings": normal(2, 5, 2),
            "noise_variance": torch.ones(2).double(),
        },
        of=mixture_from_loadings,
        positive=("noise_variance",),
    ),
    Door(super_resolution, {"factor": 2}, positive=("factor",)),
    Door(
        lambda shape, dropped: random_inpainting(shape, generator(), dropped),
        {"shape": SHAPE, "dropped": 0.5},
        of=random_inpainting,
    ),
    Door(lambda shape: box_inpainting(shape, generator()), {"shape": SHAPE}, of=box_inpainting),
    Door(gaussian_blur, {"side": 16}, positive=("side",)),
    Door(
        lambda side: motion_blur(side, generator()),
        {"side": 16},
        of=motion_blur,
        positive=("side",),
    ),
    Door(
        lambda side: nonlinear_blur(side, generator()),
        {"side": 16},
        of=nonlinear_blur,
        positive=("side",),
    ),
    Door(phase_retrieval, {"shape": SHAPE}),
    Door(
        lambda name, shape: task(name, shape, generator()),
        {"name": "phase_retrieval", "shape": SHAPE},
        {"name": "task"},
        task,
    ),
    Door(
        lambda x, noise_std: measure(HALVED, x, generator(), noise_std),
        {"x": X.float(), "noise_std": 0.1},
        of=measure,
    ),
    Door(
        lambda side, intensity: motion_kernel(side, intensity, generator()),
        {"side": 9, "intensity": 0.5},
        of=motion_kernel,
        positive=("side",),
    ),
    Door(image_metrics, {"images": torch.zeros(2, 1, 12, 12), "truth": torch.ones(2, 1, 12, 12)}),
    Door(frechet_distance, {"first": normal(5, 2), "second": normal(4, 2, seed=1)}),
    Door(moments, {"features": normal(5, 2)}),
    Door(
        lambda y, x, noise_std: greedy_controls(PROCESS, HALVED, y, x, noise_std),
        {"y": LIKELIHOOD.y.float(), "x": X.float(), "noise_std": 0.1},
        of=greedy_controls,
    ),
    Door(LineSearch, {"contraction": 0.5, "trials": 3}, positive=("trials",)),
    Door(Adam, {"rate": 0.1, "weight_decay": 0.1}),
    Door(LBFGS, {"contraction": 0.5, "trials": 3, "first": 1e-3}, positive=("trials",)),
    Door(portrait, {"name": "astronaut", "size": 8}, positive=("size",)),
    Door(lambda split: mnist(split, Path("nowhere")), {"split": "test"}, of=mnist),
    Door(
        lambda split, size: faces(split, size, Path("no")),
        {"split": "test", "size": 8},
        of=faces,
        positive=("size",),
    ),
    Door(checked_bytes, {"file": "digits.npz"}),
    Door(load_weights, {"name": "digit_features"}, {"name": "file"}),
    Door(
        lambda i, n: shard_path(Path("a.csv"), (i, n)),
        {"i": 1, "n": 2},
        {"i": "shard", "n": "shard"},
        shard_path,
        ("i", "n"),
    ),
    Door(
        lambda task, method, budget, batch: cells_of(
            "faces64", [task], [method], [budget], [0], ["1"], batch, "float32", {"guidance": 1.0}
        ),
        {"task": "gaussian_blur", "method": "dps", "budget": 10, "batch": 1},
        {"task": "tasks", "budget": "budgets"},
        cells_of,
        ("budget", "batch"),
    ),
]


def spoilt_tensors(draw, good):
    """A tensor that is wrong in one way, and whether no answer can be right."""
    kind = draw(
        st.sampled_from(["number", "integers", "half", "fewer", "more", "longer", "empty", "meta"])
    )
    if kind == "number" and good.is_floating_point():
        bad = good.clone()
        place = draw(st.integers(0, good.numel() - 1))
        bad.view(-1)[place] = draw(st.sampled_from([math.nan, math.inf, -math.inf]))
        return bad, True
    if kind == "integers":
        return good.round().int(), False
    if kind == "half":
        return good.half(), False
    if kind == "fewer":
        return good[0], False
    if kind == "more":
        return good[..., None], False
    if kind == "longer":
        axis = draw(st.integers(0, good.ndim - 1))
        return torch.cat([good, good], dim=axis), False
    if kind == "empty":
        return good[:0], False
    return (good.to("meta"), True) if kind == "meta" else (-good - 1, False)


def spoilt(draw, good):
    """A value like a good one, but wrong, and whether no answer can be right."""
    if isinstance(good, torch.Tensor):
        return spoilt_tensors(draw, good)
    if isinstance(good, float):
        none = st.sampled_from([math.nan, math.inf, -math.inf])
        return draw(st.one_of(none, st.floats(max_value=-1e-3, min_value=-1e9))), True
    if isinstance(good, int):
        return draw(st.one_of(st.just(0), st.integers(-(10**6), -1))), False
    if isinstance(good, str):
        text = st.text(alphabet="abz./-_ \n\0é", max_size=12)
        return draw(text.filter(lambda name: name != good)), True
    if draw(st.booleans()):
        return good[1:], False
    place = draw(st.integers(0, len(good) - 1))
    wrong = draw(st.integers(-3, 0))
    return tuple(wrong if i == place else side for i, side in enumerate(good)), False


def tensors(answer):
    """The floating-point tensors in an answer."""
    if isinstance(answer, torch.Tensor):
        return [answer] if answer.is_floating_point() else []
    if isinstance(answer, dict):
        return [t for value in answer.values() for t in tensors(value)]
    if hasattr(answer, "x0"):
        return [answer.x0, answer.controls, answer.cost]
    return [torch.tensor(answer)] if isinstance(answer, float) else []


def call(door, name, value, hopeless):
    """Calls a door with a wrong argument, and judges what happens.

    Of two shapes that do not agree the error may name either.
    """
    words = {door.aliases.get(word, word) for word in (*([name] if hopeless else door.arguments),)}
    words |= {name}
    try:
        answer = door.function(**door.arguments | {name: value})
    except (ValueError, TypeError, FileNotFoundError) as error:
        said = str(error)
        assert any(re.search(rf"\b({word})\b", said) for word in words), f"{name} is not in: {said}"
        return
    assert not hopeless, f"{name} = {value!r} was taken"
    assert all(tensor.isfinite().all() for tensor in tensors(answer)), f"{name} = {value!r}"


def names(doors):
    found = [getattr(door.of or door.function, "__name__", "") for door in doors]
    return [f"{name}-{i}" for i, name in enumerate(found)]


@pytest.mark.parametrize("door", DOORS, ids=names(DOORS))
@settings(
    max_examples=20,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_wrong_argument_is_named(door, data, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    name = data.draw(st.sampled_from(sorted(door.arguments)))
    value, hopeless = spoilt(data.draw, door.arguments[name])
    call(door, name, value, hopeless)


@pytest.mark.parametrize(
    ("door", "name"), [(door, name) for door in DOORS for name in door.positive]
)
def test_what_must_be_positive_is_nothing_else(door, name):
    good = door.arguments[name]
    for wrong in (-good - 1,) if isinstance(good, torch.Tensor) else (0, -1, -(10**6)):
        call(door, name, wrong, True)


@pytest.mark.parametrize("door", DOORS, ids=names(DOORS))
def test_the_good_arguments_are_good(door, monkeypatch):
    if door.of in (mnist, faces):  # which are asked for where they are not
        with pytest.raises(FileNotFoundError, match="DIFFOC_DATA"):
            door.function(**door.arguments)
    else:
        answer = door.function(**door.arguments)
        assert all(tensor.isfinite().all() for tensor in tensors(answer))


# Methods, which have one signature

SMALL = mixture_from_loadings(
    torch.zeros(2), normal(2, 64).float(), normal(2, 64, 2, seed=1).float(), torch.ones(2)
)
IMAGES = GaussianMixturePrior(SMALL, VPSchedule(alpha_min=1e-2, sigma_min=1e-2), (1, 8, 8))
DROPPING = random_inpainting((1, 8, 8), generator(), 0.5)
NOISY = normal(1, 1, 8, 8).float()
MEASURED = measure(DROPPING, NOISY, generator(), 0.1)


def settings_by_name(name):
    """A method's settings for few evaluations."""
    method = METHODS[name]
    # Ours from the guess has to have four evaluations for each of its thirty steps.
    budgets = {"stopped": 120, "ours": 120}
    budgets |= {"paper": 1000, "paper_tuned": 1000, "released": 1000}
    nfe = budgets.get(name, 12)
    found = method.settings("random_inpainting", nfe)
    return found | (method.trials(nfe)[-1] if method.tuned else {})


def run_method(name, **changes):
    given = {"prior": IMAGES, "physics": DROPPING, "y": MEASURED, "x": NOISY, "noise_std": 0.1}
    given |= settings_by_name(name) | changes
    positional = [given.pop(key) for key in ("prior", "physics", "y", "x")]
    return METHODS[name].run(*positional, generator(), **given)


@pytest.mark.parametrize("name", METHODS)
def test_methods_refuse_what_is_no_measurement(name):
    for argument, wrong in (
        ("y", MEASURED * math.nan),
        ("y", MEASURED.to("meta")),
        ("y", MEASURED.int()),
        ("x", NOISY / 0),
        ("x", NOISY[:0]),
        ("noise_std", -0.1),
        ("noise_std", math.nan),
        ("noise_std", math.inf),
    ):
        with pytest.raises(ValueError, match=rf"^{argument} "):
            run_method(name, **{argument: wrong})
    if METHODS[name].latent:  # which look at the prior before the shape of x
        return
    for argument, wrong in (
        ("y", MEASURED[..., :4]),
        ("y", torch.cat([MEASURED] * 2)),
        ("x", NOISY[..., :4]),
    ):
        with pytest.raises(ValueError, match=r"^(y has|physics cannot measure images of) shape"):
            run_method(name, **{argument: wrong})
    lost = Inpainting((1, 8, 8), mask=torch.zeros(1, 8, 8))
    for argument, wrong in (
        ("physics", None),
        ("physics", DROPPING.A),
        ("physics", lost),
        ("prior", None),
        ("prior", DROPPING),
        ("x", NOISY.double()),
        ("y", MEASURED.double()),
    ):
        with pytest.raises((TypeError, ValueError), match=rf"^{argument} |prior's|, y torch"):
            run_method(name, **{argument: wrong})
    with pytest.raises(ValueError, match="but the prior's weights are"):
        run_method(name, x=NOISY.double(), y=MEASURED.double())


@pytest.mark.parametrize("name", METHODS)
def test_methods_refuse_settings_out_of_their_range(name):
    """Counts of nothing, and numbers that are none; what is allowed to be zero is."""
    for key, value in settings_by_name(name).items():
        if METHODS[name].latent or isinstance(value, bool):
            continue
        for wrong in (math.nan,) if isinstance(value, float) else (-1,):
            with pytest.raises(ValueError, match=rf"{SAID.get(key, key)}"):
                run_method(name, **{key: wrong})


SAID = {"control_cost": "weight|control_cost", "weight_scale": "weight", "rank": "rank"}
SAID |= {"iterations": "iterations"}

# Images that are not images


def pictures():
    """The bytes of a picture in several formats."""
    pixels = (normal(9, 9, 3) * 99).byte().numpy()
    for kind in ("PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP"):
        content = BytesIO()
        Image.fromarray(pixels).save(content, kind)
        yield content.getvalue()


PICTURES = list(pictures())


@settings(max_examples=150, derandomize=True, database=None, deadline=None)
@given(
    content=st.one_of(
        st.binary(max_size=64),
        st.builds(lambda p, size: p[:size], st.sampled_from(PICTURES), st.integers(0, 400)),
        st.builds(
            lambda p, place, new: p[:place] + new + p[place + len(new) :],
            st.sampled_from(PICTURES),
            st.integers(0, 120),
            st.binary(min_size=1, max_size=4),
        ),
    ),
    read=st.sampled_from(
        [lambda path: read_picture(path, (1, 8, 8))[0], picture_size, read_transparency, values_of]
    ),
)
def test_whatever_is_no_picture_is_refused(content, read):
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of metadata and sizes
        path = Path(folder) / "a.png"
        path.write_bytes(content)
        try:
            answer = read(path)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017  both may happen
            return
    if isinstance(answer, torch.Tensor):
        assert answer.isfinite().all()
        assert answer.abs().max() <= 1


# Nothing is forgotten

MODULES = [
    "diffoc.baselines",
    "diffoc.costs",
    "diffoc.data.images",
    "diffoc.data.pictures",
    "diffoc.experiments.cells",
    "diffoc.greedy",
    "diffoc.ilqr",
    "diffoc.priors.gaussian",
    "diffoc.priors.pretrained",
    "diffoc.problems.kernels",
    "diffoc.problems.metrics",
    "diffoc.problems.operators",
    "diffoc.problems.tasks",
    "diffoc.process",
    "diffoc.rules",
    "diffoc.solve",
]
"""Modules whose public names are doors: users' values reach them directly."""

OTHERS = {
    "COLD": "a recipe",
    "OURS": "a recipe",
    "PAPER": "a recipe",
    "QUICK": "a recipe",
    "RELEASED": "a recipe",
    "RICCATI": "a recipe",
    "STOPPED": "a recipe",
    "Problem": "test_recipes",
    "Recipe": "test_recipes",
    "reconstruct": "test_recipes",
    "Reconstructor": "test_wrappers",
    "Result": "a result",
    "Method": "behind ilqr",
    "State": "behind ilqr",
    "choose": "behind ilqr",
    "converged": "behind ilqr",
    "expand": "behind ilqr",
    "init": "behind ilqr",
    "result": "behind ilqr",
    "step": "behind ilqr",
    "terminate": "behind ilqr",
    "Rule": "behind ilqr",
    "Direction": "behind ilqr",
    "FullStep": "has no setting",
    "Damping": "test_ilqr, as regularization",
    "Tikhonov": "has no setting",
    "GaussianPosterior": "a result",
    "UnsupportedTask": "an error",
    "as_picture": "test_latent_baselines",
    "residual_of": "behind the costs",
    "correction": "behind greedy_controls and the methods",
    "cosines": "behind greedy_controls",
    "image_correction": "behind greedy_controls",
    "image_spectrum": "behind greedy_controls",
    "method": "decorates the methods, above",
    "methods": "has no argument",
    "Share": "a number",
    "Given": "behind the methods",
    "one_a_step": "behind the methods",
    "product_a_step": "behind the methods",
    "no_products": "behind the methods",
    "PerImage": "test_operator_per_image",
    "LinearPerImage": "test_operator_per_image",
    "Bicubic": "test_tasks",
    "BlurPerImage": "test_operator_per_image",
    "for_each": "test_operator_per_image",
    "parts_of": "test_operator_per_image",
    "global_generator": "behind the methods",
    "Computer": "computes cells, which cells_of makes",
    "best_trial": "of records",
    "few_faces": "fixed names",
    "folder_of": "of a cell",
    "keep_in": "test_rough_handling",
    "load_once": "load_prior",
    "metrics_of": "image_metrics",
    "picture_names": "test_pictures",
    "read_images": "test_experiments",
    "time_prior": "measures",
    "tuning_cells": "of a cell",
    "work_of": "of a cell",
    "as_states": "of a data set",
    "colour_faces": "test_colour_faces",
    "digits": "has no argument",
    "frechet_between": "frechet_distance",
    "mse_255": "a factor",
    "EDMDenoiser": "a network's forward pass",
    "default_schedule": "has no argument",
    "shape_of": "test_inaccurate",
    "untrained_adm": "test_benchmark",
    "drift_and_diffusion": "behind the process",
    "draw_noise": "torch.randn",
    "check_inputs": "of a grid, which it checks",
    "check_recorded": "of a grid, which it checks",
    "check_settings": "of a method, which it checks",
    "take_nearest_timesteps": "of a network that was just loaded",
    "evaluate_once": "of a network that was just made",
    "LBFGSMemory": "behind ilqr",
    "image_units": "of a process's times, which it has checked",
    "measured": "of a measurement",
    "read_picture": "above",
    "open_picture": "behind read_picture",
    "picture_size": "above",
    "read_transparency": "above",
    "values_of": "above",
    "write_picture": "of a result",
}
"""Public names of those modules that are no doors, or have tests elsewhere; why."""


def test_every_public_name_is_a_door_or_said_not_to_be():
    doors = {door.of or door.function for door in DOORS} | {diffoc.load_prior}
    known = {getattr(door, "__name__", "") for door in doors} | set(OTHERS)
    for name in MODULES:
        for key, value in vars(importlib.import_module(name)).items():
            public = inspect.isfunction(value) or inspect.isclass(value)
            if public and not key.startswith("_") and value.__module__ == name:
                assert key in known, f"{name}.{key} is no door here"
    for key in diffoc.__all__:
        assert key in known
