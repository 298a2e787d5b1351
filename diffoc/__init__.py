"""Diffusion optimal control: reverse diffusion as a dynamical system, steered by iLQR.

The executable companion of "Solving Inverse Problems via Diffusion Optimal Control"
(Li & Pereira, NeurIPS 2024, arXiv:2412.16748). The modules beside this file are the controller::

    process -> costs -> system -> riccati, lowrank, hessian -> rules, result -> ilqr -> solve
    solve, problem, greedy -> recipe -> reconstruct

Whatever compares, trains, records, draws or loads lies in a folder of its own: `data`, `problems`,
`priors`, `baselines`, `theory`, `training`, `experiments`, `figures` and `commands`. Pretrained
priors come by name, from :func:`load_prior`; :func:`reconstruct` gives the images of a
:class:`Problem` by a :class:`Recipe`, and :func:`solve` is the controller that it calls.

Equation numbers in the docstrings are the paper's.
"""

from typing import Any

from diffoc.baselines.paper import PAPER
from diffoc.baselines.released import RELEASED
from diffoc.priors.pretrained import load_prior
from diffoc.priors.weights import classifier
from diffoc.problem import Problem
from diffoc.recipe import COLD, OURS, QUICK, STOPPED, Recipe
from diffoc.reconstruct import reconstruct
from diffoc.result import Result
from diffoc.solve import solve
from diffoc.theory.riccati_draws import RICCATI

__all__ = [
    "COLD",
    "OURS",
    "PAPER",
    "QUICK",
    "RELEASED",
    "RICCATI",
    "STOPPED",
    "Problem",
    "Recipe",
    "Reconstructor",
    "Result",
    "classifier",
    "load_prior",
    "reconstruct",
    "solve",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Imports `Reconstructor` when it is asked for: deepinv takes as long as all else."""
    if name == "Reconstructor":
        from diffoc.problems.reconstructor import Reconstructor

        return Reconstructor
    raise AttributeError(f"module 'diffoc' has no attribute {name!r}")
