"""Diffusion optimal control: reverse diffusion as a dynamical system, steered by iLQR.

The executable companion of "Solving Inverse Problems via Diffusion Optimal Control"
(Li & Pereira, NeurIPS 2024, arXiv:2412.16748). The modules beside this file are the controller::

    process -> costs -> system -> riccati, lowrank, hessian -> rules -> ilqr -> solve

Whatever compares, trains, records, draws or loads lies in a folder of its own: `data`, `problems`,
`priors`, `baselines`, `theory`, `training`, `experiments`, `figures` and `commands`. Pretrained
priors come by name, from :func:`load_prior`; :func:`solve` is the entry point for images.

Equation numbers in the docstrings are the paper's.
"""

from diffoc.priors.pretrained import load_prior
from diffoc.priors.weights import classifier
from diffoc.solve import Result, solve

__all__ = ["Result", "classifier", "load_prior", "solve"]
__version__ = "0.1.0"
