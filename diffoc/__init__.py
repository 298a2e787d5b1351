"""Diffusion optimal control: reverse diffusion as a dynamical system, steered by iLQR.

The executable companion of "Solving Inverse Problems via Diffusion Optimal Control"
(Li & Pereira, NeurIPS 2024, arXiv:2412.16748). Data flows through the modules in this order::

    priors, operators -> process -> costs -> riccati, lowrank, matrix_free, projected -> sweeps ->
    ilqr -> solver

Pretrained priors come by name, from :func:`load_prior`; :func:`solve` is the entry point for
images.

Equation numbers in the docstrings are the paper's.
"""

from diffoc.pretrained import load_prior
from diffoc.solver import Result, solve
from diffoc.weights import classifier

__all__ = ["Result", "classifier", "load_prior", "solve"]
__version__ = "0.1.0"
