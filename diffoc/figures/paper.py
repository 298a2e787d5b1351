"""The figures for print, each from its records or from a computation of seconds."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from azula.noise import VPSchedule
from matplotlib.figure import Figure
from torch import Tensor

from diffoc.costs import ControlCost, GaussianLikelihood
from diffoc.data import portrait
from diffoc.data.provenance import ROOT
from diffoc.experiments import ablation_summary as summary
from diffoc.experiments import ffhq
from diffoc.experiments.ablations import TUNED
from diffoc.experiments.records import frame, rows_of
from diffoc.experiments.summary import by_budget, by_method, by_setting
from diffoc.figures import plots, save_for_print
from diffoc.ilqr import ilqr
from diffoc.priors.gaussian import GaussianMixturePrior
from diffoc.priors.mixture import mixture_from_loadings
from diffoc.priors.pretrained import load_prior
from diffoc.problem import Problem
from diffoc.problems.metrics import image_metrics
from diffoc.problems.operators import LinearMeasurement
from diffoc.problems.tasks import NOISE_STD, measure, task
from diffoc.process import ReverseProcess
from diffoc.recipe import OURS
from diffoc.reconstruct import reconstruct
from diffoc.riccati import Dense, terminal_value
from diffoc.system import ControlProblem, backward_sweep, roll_out
from diffoc.theory.identities import rollout_gradients, uncontrolled
from diffoc.theory.linear_gaussian import relative_error, standard_normal

Made = tuple[str, Figure, tuple[str, ...]]
"""A figure's name, the figure, and the records or computations that it shows."""

ITERATIONS = 6  # of the reconstructions, which take most of the time

PSNR = "PSNR (dB)"
METRICS = {"psnr": PSNR, "ssim": "SSIM", "lpips_alex": "LPIPS (AlexNet)"}


def write_all(folder: Path | None = None, records: Path = ROOT / "data" / "records") -> list[Path]:
    """Draws and writes every figure whose data exist; returns the files in the order of writing."""
    paths: list[Path] = []
    made = [*from_records(records), *from_ablations(records), *from_paper(), *computed()]
    for name, figure, sources in made:
        paths += save_for_print(figure, name, sources, folder)
    return paths


def from_records(folder: Path) -> Iterator[Made]:
    """Yields methods by tasks, quality over the budget, and tuning, of what has been run."""
    for path, rows in _tables(folder, "table1"):
        for metric, label in METRICS.items():
            if values := by_method(rows, metric):
                figure = plots.metric_by_method(values, label)
                yield f"{path.stem}_{metric}", figure, (path.name,)
            panels = by_budget(rows, metric)
            if any(len(curve) > 1 for lines in panels.values() for curve in lines.values()):
                figure = plots.quality_curves(panels, "evaluations", label)
                yield f"{path.stem}_{metric}_budget", figure, (path.name,)
    for path, rows in _tables(folder, "tuning"):
        figure = plots.quality_curves(by_setting(rows, "psnr"), "value of the keyword", PSNR)
        yield path.stem, figure, (path.name,)


def from_ablations(folder: Path) -> Iterator[Made]:
    """Yields Figures 3 and 6 and Tables 4 to 6, of what has been run: names, figures, records."""
    tuned = f"tuning_{TUNED[0]}"
    trials = {path.stem: rows for path, rows in _tables(folder, "tuning")}.get(tuned, frame([]))
    for path, rows in _tables(folder, "few_steps"):
        sources = (path.name, f"{tuned}.csv") if len(trials) else (path.name,)
        if panels := summary.equal_budgets(rows, trials, "psnr"):
            figure = plots.quality_curves(panels, "evaluations", PSNR)
            yield f"{path.stem}_budget", figure, sources
        if panels := summary.equal_horizons(rows, "psnr"):
            figure = plots.quality_curves(panels, "steps $T$", PSNR)
            yield f"{path.stem}_horizon", figure, (path.name,)
    for path, rows in _tables(folder, "rank"):
        if panels := summary.by_rank(rows, "psnr"):
            figure = plots.quality_curves(panels, "rank $k$", PSNR, logarithmic=False)
            yield path.stem, figure, (path.name,)
        if panels := summary.by_constant(rows, "psnr"):
            xlabel = "Tikhonov's constant $a$"
            figure = plots.quality_curves(panels, xlabel, PSNR, ticks=summary.CONSTANTS)
            yield f"{path.stem}_constant", figure, (path.name,)
    for path, rows in _tables(folder, "robustness"):
        known = set(rows["prior"].map(summary.prior_label))
        priors = [name for name in summary.PRIORS if name in known]
        if panels := summary.by_prior(rows, "psnr", priors):
            yield path.stem, plots.quality_curves(panels, "prior", PSNR, ticks=priors), (path.name,)


def _tables(folder: Path, name: str) -> Iterator[tuple[Path, pd.DataFrame]]:
    """Yields paths and rows of the tables that have any; shards need no table beside them."""
    names = {
        path.name.split(".shard-")[0].removesuffix(".csv") for path in folder.glob(f"{name}_*")
    }
    for path in (folder / f"{name}.csv" for name in sorted(names)):
        if len(rows := rows_of(path)):
            yield path, rows


def from_paper() -> Iterator[Made]:
    """Yields the paper's own numbers: Table 3's PSNR, and Table 4."""
    nothing = float("nan")
    psnr = {
        label: {
            task: (row[task]["psnr"], nothing)
            for task in ffhq.tasks_of("table3")
            if row[task]["psnr"] is not None
        }
        for label, row in ffhq.paper_numbers("table3").items()
    }
    figure = plots.metric_by_method(psnr, "PSNR (dB), as the paper has it")
    yield "paper_table3", figure, ("paper_tables.json",)
    rows = dict(zip(ffhq.VARIED["table4"][1], ffhq.paper_numbers("table4").values(), strict=True))
    ranks = {
        label: {
            task: [(float(k), row[task][metric], nothing) for k, row in rows.items()]
            for task in ffhq.tasks_of("table4")
        }
        for metric, label in {"lpips": "LPIPS", "psnr": PSNR, "ssim": "SSIM"}.items()
    }
    figure = plots.quality_curves(ranks, "rank $k$", "as the paper has it", logarithmic=False)
    yield "paper_table4", figure, ("paper_tables.json",)


def computed() -> Iterator[Made]:
    """Yields figures 1 to 4 on the priors of the repository, and what the theorems miss."""
    yield (
        "steering",
        plots.steering(*steered(30.0)),
        ("mixture of three Gaussians, T 20, control cost 30",),
    )
    yield "predicted_x0", _predicted_x0(), ("prior faces64, T 20",)
    solver = f"greedy guess, {ITERATIONS} iterations of L-BFGS"
    for name, figure in _reconstructions():
        yield name, figure, (f"prior faces64, {solver}, noise 0.05, seed 0",)
    yield "theorem_errors", _theorem_errors(), ("linear-Gaussian setting, n 8, T 50",)
    yield "scores", _scores(), ("prior N(0, 1), y 0.7, x 0.3, noise 0.1",)


def steered(control_cost: float) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor], float, float]:
    """Returns what :func:`diffoc.figures.plots.steering` draws: noises, steered to a measured 1.

    The prior is a mixture of three Gaussians in the plane, and the control cost r the same for all
    of the 20 steps.
    """
    mixture = mixture_from_loadings(
        torch.tensor([0.40, 0.35, 0.25], dtype=torch.float64).log(),
        torch.tensor([[-1.3, 0.8], [1.3, 1.0], [0.1, -1.2]], dtype=torch.float64),
        torch.tensor([[[0.5], [0.35]], [[0.3], [-0.5]], [[0.6], [-0.1]]], dtype=torch.float64),
        torch.full((3,), 0.06, dtype=torch.float64),
    )
    prior = GaussianMixturePrior(mixture, VPSchedule(alpha_min=1e-3, sigma_min=0.0))
    y, noise_std = torch.ones(1, 1, dtype=torch.float64), 0.2
    cost = GaussianLikelihood(lambda x: x[:, :1], y, noise_std)
    paths = {}
    for mode in ("input", "output"):
        process = ReverseProcess(prior, 20, "ddim", mode)
        start = torch.randn(6, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        problem = ControlProblem(process.step, ControlCost(control_cost), cost, 20)
        result = ilqr(problem, start, iterations=25, gradient_tolerance=1e-5)
        paths[f"{mode} perturbation"] = result.states
    side = torch.linspace(-3, 3, 120, dtype=torch.float64)
    plane = torch.cartesian_prod(side, side)
    density = prior.log_prob(plane, torch.tensor(0.0, dtype=torch.float64)).exp()
    free = process.rollout(start)
    return side, density.reshape(120, 120).T, free, paths, y.item(), noise_std


@torch.no_grad()
def _predicted_x0() -> Figure:
    prior, truth = load_prior("faces64"), portrait("astronaut")
    process = ReverseProcess(prior, 20, "ddim")
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(3))
    starts = [1, 4, 7, 10, 13, 16]
    states, tweedie, rollout = [], [], []
    for i in starts:
        t = process.times[i].float()
        alpha, sigma = prior.schedule(t)
        states.append(alpha * truth + sigma * noise)
        tweedie.append(prior(states[-1], t).mean)
        rollout.append(process.rollout(states[-1], start=i)[-1])
    times = process.times[starts].tolist()
    rows = [torch.cat(images) for images in (states, tweedie, rollout)]
    return plots.predicted_x0(times, rows[0], rows[1], rows[2], truth[0])


def _reconstructions() -> Iterator[tuple[str, Figure]]:
    prior, truth = load_prior("faces64"), portrait("astronaut")

    def solved(name: str, steps: int) -> tuple[Tensor, Tensor, str]:
        """Returns measurement, image and its quality, by ours with few iterations."""
        generator = torch.Generator().manual_seed(0)
        physics = task(name, prior.image_shape, generator)
        y = measure(physics, truth, generator)
        recipe = replace(OURS, steps=steps, iterations=ITERATIONS)
        x0 = reconstruct(Problem(physics, y, NOISE_STD), prior, recipe).x0
        return y, x0, f"{image_metrics(x0, truth)['psnr'].item():.1f} dB"

    names = ("super_resolution", "box_inpainting", "gaussian_blur")
    by_task = {name: solved(name, 10) for name in names}
    titles = {name: name.replace("_", " ") for name in names}
    columns = {titles[name]: [truth[0], y[0], x[0]] for name, (y, x, _) in by_task.items()}
    captions = {titles[name]: ["", "", quality] for name, (*_, quality) in by_task.items()}
    rows = ["truth", "measurement", "reconstruction"]
    yield "reconstructions", plots.reconstructions(columns, rows, captions)

    first = names[0]
    by_steps = {steps: solved(first, steps) for steps in (2, 5)} | {10: by_task[first]}
    shown = {"truth": truth, "measurement": by_task[first][0]}
    shown |= {f"$T = {steps}$": image for steps, (_, image, _) in by_steps.items()}
    captions = {f"$T = {steps}$": [quality] for steps, (*_, quality) in by_steps.items()}
    columns = {title: list(images) for title, images in shown.items()}
    yield "steps", plots.reconstructions(columns, [titles[first]], captions)


def _theorem_errors() -> Figure:
    steps = 50
    constants = [10.0**exponent for exponent in range(0, 19, 3)]
    errors = {}
    for mode, theorem in {"output": "Theorem 4.1", "input": "Theorem 4.3"}.items():
        setting, process, path = uncontrolled(mode, steps)
        gradients = rollout_gradients(setting, process, path)
        problem = ControlProblem(process.step, ControlCost(0.0), setting.likelihood, steps)
        # Around the uncontrolled path; no constant and no rank has a part in the expansion.
        trajectory = roll_out(problem, path[0], torch.zeros_like(path[1:]), Dense())
        expansions = [expand() for expand in trajectory.steps]
        for rank, terms in {None: "second-order terms kept", 0: "dropped"}.items():
            value = terminal_value(setting.likelihood, path[-1], rank)
            gains = [
                backward_sweep(expansions, value, path.new_full((steps, 1), a), "full")[0]
                for a in constants
            ]
            errors[f"{theorem}, {terms}"] = [
                relative_error(a * torch.stack([gain.k for gain in sweep]), gradients)
                for a, sweep in zip(constants, gains, strict=True)
            ]
    return plots.theorem_errors(constants, errors, 1e-12)


def _scores() -> Figure:
    (prior, one), y, noise_std, x = standard_normal(), 0.7, 0.1, 0.3
    measured = LinearMeasurement(one, y * one, noise_std)
    times = torch.linspace(0.005, 1, 100, dtype=torch.float64)
    exact = [prior.conditional_score(x * one, t, measured).item() for t in times]
    alpha, _ = prior.schedule(times)
    # In one dimension and for this prior Tweedie's estimate is alpha x, and the flow's is x.
    sizes = {
        "exact": exact,
        "Tweedie (DPS)": (alpha * (y - alpha * x) / noise_std**2).tolist(),
        "rollout (Theorem 4.1)": [(y - x) / noise_std**2] * len(times),
    }
    return plots.sizes_over_time(times.tolist(), sizes)
