"""The methods of the tables by name, with their settings: the controller's and the baselines'.

All have the signature that :mod:`diffoc.baselines` describes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from diffoc.baselines.admm_tv import admm_tv
from diffoc.baselines.d_flow import d_flow
from diffoc.baselines.daps import daps
from diffoc.baselines.ddnm import ddnm
from diffoc.baselines.ddrm import ddrm
from diffoc.baselines.deep_image_prior import deep_image_prior
from diffoc.baselines.diffpir import diffpir
from diffoc.baselines.dps import dps
from diffoc.baselines.flash_diffusion import flash_diffusion
from diffoc.baselines.mcg import mcg
from diffoc.baselines.mmps import mmps
from diffoc.baselines.ndtm import ndtm
from diffoc.baselines.paper import PAPER
from diffoc.baselines.pgdm import pgdm
from diffoc.baselines.pnp_admm import pnp_admm
from diffoc.baselines.psld import psld
from diffoc.baselines.released import RELEASED
from diffoc.baselines.score_sde import score_sde
from diffoc.data.files import replacing
from diffoc.data.manifest import data_folder
from diffoc.experiments.controllers import (
    STEPS,
    cold,
    iterations_within,
    ours,
    paper,
    released,
    stopped,
)
from diffoc.reconstruct import COLD, OURS, STOPPED, Recipe

TRIALS = 4
"""At most, of the keyword that is tuned: for every method and task alike. Where the best of them is
at the grid's edge, the grid goes on, to twice as many, see
:func:`diffoc.experiments.cells.next_value`."""

EDGE_GAIN = 0.1
"""What a value at the grid's edge has to be ahead of its neighbour for the grid to go on, in dB."""


@dataclass(frozen=True)
class Method:
    """A method and how it is set.

    Attributes:
        label: as in the paper's tables.
        run: see :mod:`diffoc.baselines`.
        settings: from a task's name and a budget of evaluations to keyword arguments; it may raise
            ValueError for a budget that the method cannot have.
        tuned: the keyword that is tuned for each task, and the values to try; None if there is
            nothing to tune.
        work: from keyword arguments to evaluations and products an image, for estimates; None
            where both are the budget.
        largest: that the tuned keyword may be.
        latent: whether it needs a :class:`diffoc.priors.latent.LatentPrior`.
        recipe: of the controller, which `run` puts the settings into; None for other methods.

    Raises:
        ValueError: for more values than all methods have.
    """

    label: str
    run: Callable[..., Tensor]
    settings: Callable[[str, int], dict]
    tuned: tuple[str, tuple[float, ...]] | None = None
    work: Callable[[dict], tuple[int, int]] | None = None
    largest: float = math.inf
    latent: bool = False
    recipe: Recipe | None = None

    def __post_init__(self) -> None:
        if self.tuned and not 1 <= len(self.tuned[1]) <= TRIALS:
            raise ValueError(f"tuned has {len(self.tuned[1])} values, expected 1 to {TRIALS}")


# Steps, iterations and rank by Table 2, Adam's rate and the cost's scale as in the released code,
# whose weights are others: diffoc.baselines.released.released_weights.
# By Table 5 any regularization does but none: ours is well above the rounding of 1 / s^2 = 400.
_USUAL: dict[str, float] = {"steps": 50, "iterations": 100, "rank": 1}
_USUAL |= {"rate": 5e-3, "weight_scale": 1e-6, "regularization": 1e-3}
TABLE_2 = {
    "super_resolution": _USUAL | {"iterations": 50},
    "random_inpainting": _USUAL,
    "box_inpainting": _USUAL,
    "gaussian_blur": _USUAL | {"rate": 1e-2, "weight_scale": 1e-5},
    "motion_blur": _USUAL,
    "nonlinear_blur": _USUAL | {"rate": 1e-2},
    "phase_retrieval": _USUAL | {"rate": 1e-2},
}
"""The paper's hyper-parameters for what it calls NFE 2500."""


def _table_2(task: str, nfe: int) -> dict:
    if nfe == 1000:  # the released code's
        return TABLE_2[task] | {"steps": 20, "iterations": 50}
    if nfe != 2500:
        raise ValueError(f"nfe is {nfe}: the paper's settings are for 1000 and 2500 only")
    return TABLE_2[task]


def _released(task: str, nfe: int) -> dict:
    if nfe != 1000:
        raise ValueError(f"nfe is {nfe}: the released code's settings are for 1000 only")
    usual = {key: TABLE_2[task][key] for key in ("rate", "weight_scale")}
    return {"steps": 20, "iterations": 50} | usual


def _one_a_step(task: str, nfe: int) -> dict:
    return {"steps": nfe}


def _diffpir(task: str, nfe: int) -> dict:
    # The released code's shares of new noise.
    return {"steps": nfe, "renewal": 1.0 if task.endswith("inpainting") else 0.1}


def _daps(task: str, nfe: int) -> dict:
    # The released code has 200 levels of five steps. Where the budget is less, levels come first,
    # which on tuning faces is worth some 5 dB of random inpainting at 100 evaluations.
    ode_steps = min(5, max(1, nfe // 100))
    return {"steps": max(1, nfe // ode_steps), "ode_steps": ode_steps}


def _ndtm(task: str, nfe: int) -> dict:
    # The released code's, by its scripts for faces, and for blurs by its example of one.
    if task == "super_resolution":
        found = {"iterations": 5, "guidance": 50.0, "eta": 0.7, "start": 0.4}
    elif task.endswith("inpainting"):
        found = {"iterations": 2, "guidance": 1.0, "eta": 0.2, "start": 0.5}
        found |= {"control_cost": 0.0, "score_cost": 0.0}
    else:
        found = {"iterations": 2, "guidance": 50.0, "eta": 0.1, "start": 0.6}
    return found | {"steps": max(1, nfe // (found["iterations"] + 1))}


def _no_products(settings: dict) -> tuple[int, int]:
    return settings["steps"], 0


METHODS: dict[str, Method] = {
    "stopped": Method(
        "Ours, stopped",
        stopped,
        lambda task, nfe: {"budget": nfe},
        ("steps", (5, 10, 20, 30)),
        lambda settings: (settings["budget"],) * 2,
        recipe=STOPPED,
    ),
    "ours": Method(
        "Ours",
        ours,
        lambda task, nfe: {"budget": nfe},
        ("weight", (1.0, 4.0, 16.0, 64.0)),
        lambda settings: (settings["budget"],) * 2,
        recipe=OURS,
    ),
    "cold": Method(
        "Ours, cold",
        cold,
        lambda task, nfe: {"steps": STEPS, "iterations": iterations_within(nfe, STEPS)},
        ("control_cost", (0.1, 0.3, 1.0, 3.0)),
        recipe=COLD,
    ),
    "paper": Method(
        "Paper",
        paper,
        _table_2,
        work=lambda s: (
            s["steps"] * (1 + 2 * s["iterations"]),
            s["steps"] * (1 + s["rank"]) * s["iterations"],
        ),
        recipe=PAPER,
    ),
    "released": Method(
        "Released",
        released,
        _released,
        work=lambda s: (
            (s["steps"] - 1) * (1 + s["iterations"]),
            (s["steps"] - 1) * s["iterations"],
        ),
        recipe=RELEASED,
    ),
    "dps": Method("DPS", dps, _one_a_step, ("guidance", (0.1, 0.3, 1.0, 3.0))),
    "ddrm": Method("DDRM", ddrm, _one_a_step, ("eta", (0.3, 0.6, 0.85, 1.0)), _no_products, 1.0),
    "ddnm": Method("DDNM+", ddnm, _one_a_step, ("eta", (0.3, 0.6, 0.85, 1.0)), _no_products, 1.0),
    "mcg": Method("MCG", mcg, _one_a_step, ("guidance", (0.03, 0.1, 0.3, 1.0))),
    "score_sde": Method(
        "Score-SDE", score_sde, _one_a_step, ("strength", (0.1, 0.3, 0.6, 1.0)), _no_products, 1.0
    ),
    "pnp_admm": Method(
        "PnP-ADMM", pnp_admm, _one_a_step, ("first_std", (0.1, 0.2, 0.4, 1.0)), _no_products
    ),
    "admm_tv": Method(
        "ADMM-TV",
        admm_tv,
        lambda task, nfe: {},
        ("weight", (0.003, 0.01, 0.03, 0.1)),
        lambda settings: (0, 0),
    ),
    "psld": Method("PSLD", psld, _one_a_step, ("guidance", (0.25, 0.5, 1.0, 2.0)), latent=True),
    "flash_diffusion": Method(
        "Flash-Diffusion",
        flash_diffusion,
        # It starts at some fifth of the time, by the severity of the picture.
        lambda task, nfe: {"steps": 5 * nfe},
        ("guidance", (0.1, 0.25, 0.5, 1.0)),
        lambda settings: (settings["steps"] // 5, settings["steps"] // 5),
        latent=True,
    ),
    "diffpir": Method(
        "DiffPIR",
        diffpir,
        _diffpir,
        # The released code's is 0.25.
        ("strength", (0.1, 0.25, 0.8, 2.0)),
        _no_products,
    ),
    "pgdm": Method("PiGDM", pgdm, _one_a_step, ("guidance", (0.25, 0.5, 1.0, 2.0))),
    "mmps": Method(
        "MMPS",
        mmps,
        # One iteration of GMRES, as in the paper: two products.
        lambda task, nfe: {"steps": nfe, "iterations": 1},
        ("eta", (0.0, 0.3, 0.6, 1.0)),
        lambda settings: (settings["steps"], 2 * settings["steps"]),
        1.0,
    ),
    "daps": Method(
        "DAPS",
        daps,
        _daps,
        ("likelihood_std", (0.01, 0.02, 0.03, 0.05)),
        lambda settings: (settings["steps"] * settings["ode_steps"], 0),
    ),
    "d_flow": Method(
        "D-Flow",
        d_flow,
        lambda task, nfe: {"steps": 6, "iterations": max(1, nfe // 6 - 1)},
        ("regularization", (0.0, 1e-3, 1e-2, 1e-1)),
    ),
    "ndtm": Method(
        "NDTM",
        ndtm,
        _ndtm,
        # The released code's is 1 or 4. The guidance is not tuned: Adam does without its scale.
        ("scale", (1.0, 2.0, 4.0, 8.0)),
        lambda settings: (
            settings["steps"] * (settings["iterations"] + 1),
            settings["steps"] * settings["iterations"],
        ),
    ),
    "deep_image_prior": Method(
        "Deep image prior", deep_image_prior, lambda task, nfe: {}, work=lambda settings: (0, 0)
    ),
}

NOT_IN_TABLE_1 = ("paper", "released", "deep_image_prior")
"""Methods that are too long for it, or of another table."""


def read_tuned(path: Path | None = None) -> dict:
    """The tuned keyword arguments by prior, method, task and budget; `data/tuned.json`."""
    path = path or data_folder() / "tuned.json"
    if not path.exists():
        return {}
    try:
        tuned = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged, restore it from git: {error}") from error
    if not isinstance(tuned, dict):
        raise ValueError(f"{path} is damaged, restore it from git: expected values by prior")
    return tuned


def write_tuned(tuned: dict, path: Path | None = None) -> None:
    """Replaces what :func:`read_tuned` reads."""
    path = path or data_folder() / "tuned.json"
    with replacing(path) as part:
        part.write_text(json.dumps(tuned, indent=2, sort_keys=True) + "\n")


def settings_of(
    prior: str, method: str, task: str, nfe: int, overrides: dict, tuned: dict | None = None
) -> dict:
    """All keyword arguments of a method: by its budget, tuned, and overridden.

    Args:
        prior, method, task, nfe: what for.
        overrides: those that count more than all others.
        tuned: as of :func:`read_tuned`, which is the default.

    Raises:
        ValueError: if there is no such method, or it was not tuned for this.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(METHODS)}")
    found = METHODS[method].settings(task, nfe)
    tunable = METHODS[method].tuned
    if tunable and tunable[0] not in overrides:
        tuned = read_tuned() if tuned is None else tuned
        best = tuned.get(prior, {}).get(method, {}).get(task, {}).get(str(nfe))
        if best is None:
            raise ValueError(
                f"method {method} is not tuned for {task} with {prior} and nfe {nfe}: run `python "
                f"-m diffoc tune {method} --prior {prior} --tasks {task} --nfe {nfe}`, or give "
                f"--set {tunable[0]}=VALUE"
            )
        found = found | best
    return found | overrides
